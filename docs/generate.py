"""Writes docs/policies.md from the code of the policies, and with `--plots` one picture per policy.

Rule of this module: a fact about a policy is taken from its code or from what it did on the traces of
examples/traces.py; only what holds for all policies is written here. The same code gives the same page, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from io import BytesIO
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from flyball_server.core.base import SCHEDULES
from flyball_server.core.policies import POLICIES
from flyball_server.core.types import KNOWN_SIGNALS, Decision, Group, Observation, Policy
from flyball_server.policy_files import resolve, summary
from flyball_server.presets import GUARDS, PRESETS, Preset

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent))

from examples import traces  # noqa: E402 - found through the line above
from examples.traces import KINDS, trace  # noqa: E402

PAGE, TEMPLATE, PLOTS = DOCS / "policies.md", DOCS / "policies.template.md", DOCS / "plots"
GROUPS = (Group("body", 1e-3, 0.9), Group("head", 1e-2, None, (0.9, 0.999)))
SEED = 0
#: Most codes that one arrow of a diagram shows.
ARROW = 3
#: The columns of a plot.
COLUMNS = ("healthy", "plateau", "spike", "noise", "divergence")

#: What every policy is shown with: the first specification gives the plot and sees the long trace, too. In this order.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "constant": [{}],
    "plateau": [{}, {"patience": 3, "cooldown": 5}, {"metric": "reward", "mode": "max"}],
    "greedy": [{}, {"patience": 3, "cooldown": 5, "warmup": 5, "reset_start": 20}, {"metric": "reward", "mode": "max"}],
    "cycle": [{}, {"window_size": 20, "patience": 60}],
    "adaptive": [{}, {"use_reward": True, "use_cosine": True}],
    "rules": [
        {"lr_rule": "trend", "ema_loss_beta": 0.9, "momentum_rule": "relative"},
        {"lr_rule": "variance", "momentum_rule": "normalized", "reward_rule": "trend"},
        {"lr_rule": "grad_norm", "momentum_rule": "exp", "reward_rule": "scaling"},
        {"lr_rule": "cyclical", "momentum_rule": "inverse", "reward_rule": "kelly"},
        {"lr_rule": "loss_decay", "reward_rule": "variance"},
        {},
    ],
    "windowed": [{}, {"window_size": 10, "warmup_steps": 100, "patience": 5, "emergency": {}}],
    "aees": [
        {"lr_candidates": [0.5, 1.0, 2.0], "episode_length": 50, "bonus_scale": "reward_std"},
        {"noise_candidates": [0.0, 0.01], "episode_length": 20, "context_mode": "trend"},
    ],
    "warmup": [{"steps": 200}],
    "gradient_aware": [{"policy": {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96}}],
    "per_group": [{"policy": {"type": "adaptive"}, "groups": {"head": {"policy": {"type": "windowed"}, "scale": 0.5}}}],
    "range_test": [
        {"steps": 200},
        {"steps": 60, "spacing": "linear", "max_lr": 0.1, "after": "reference", "policy": {"type": "windowed"}},
    ],
    "spike_guard": [
        {"policy": "constant", "deviations": 5},
        {"policy": {"type": "adaptive"}, "confirm": 1, "cooldown_steps": 20, "max_cuts": 3, "max_restores": 1},
    ],
    "sequence": [
        {"stages": [{"policy": {"type": "warmup", "steps": 200}, "until": 200}, {"policy": {"type": "windowed"}}]}
    ],
}


# What the policies do on the traces


@cache
def observations(kind: str) -> list[Observation]:
    """The trace as a policy sees it."""
    rows = trace(kind)
    return [Observation(step, **{name: row.get(name) for name in KNOWN_SIGNALS}) for step, row in rows]  # type: ignore[arg-type]


def examples(name: str) -> list[dict[str, Any]]:
    """The specifications a policy is shown with; its defaults where nobody has thought of any."""
    return [{"type": name, **spec} for spec in EXAMPLES.get(name, [{}])]


def decisions(spec: Mapping[str, Any], kind: str) -> Iterator[Decision]:
    """The first decision of the policy, then one per observation."""
    policy, config, _ = resolve(spec)
    state, decision = policy.init(config, GROUPS, SEED)
    yield decision
    yield from traces.decisions(policy, config, state, observations(kind))


class Seen(NamedTuple):
    """What was observed: codes by (phase before, phase after), and the names of the audit fields."""

    arrows: dict[tuple[str, str], Counter[str]]
    audit: set[str]


def observed(name: str) -> Seen:
    """Everything the policy did on all kinds of traces, with all its examples."""
    seen = Seen({}, set())
    for number, spec in enumerate(examples(name)):
        for kind in KINDS:
            if kind == "long" and number:
                continue
            before = "[*]"
            for decision in decisions(spec, kind):
                seen.arrows.setdefault((before, decision.phase), Counter())[decision.code] += 1
                seen.audit.update(_names(decision.fields or {}))
                before = decision.phase
    return seen


def _names(found: Mapping[str, Any]) -> Iterator[str]:
    for key, value in found.items():
        yield from [f"{key}.{inner}" for inner in value] if isinstance(value, Mapping) else [key]


# Markdown


def code(text: object) -> str:
    """`text` as code; a value as JSON with 6 significant digits."""
    return f"`{text if isinstance(text, str) else json.dumps(_rounded(text))}`"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def prose(text: str) -> str:
    """A docstring's text as Markdown: names of the code as code, a blank line before a list."""
    lines = "\n".join(line.removeprefix("    ") for line in text.strip().splitlines())
    lines = re.sub(r"(?<!\n)\n(?=- )", "\n\n", lines, count=1)
    parts = lines.split("`")
    name = re.compile(r"\w+=\"\w+\"|\b[A-Za-z][\w.]*_\w*(?:\.\w+|\*)?")
    return "`".join(part if i % 2 else name.sub(r"`\g<0>`", part) for i, part in enumerate(parts))


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [heads, ("---",) * len(heads), *rows]
    return [*("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells), ""]


def rule(policy: Policy) -> str:
    """The head of the policy's module."""
    text = (sys.modules[policy.config.__module__].__doc__ or "").strip()
    text = prose(text.removeprefix(f"Policy `{policy.name}`: "))
    text = re.sub(r"^Rule: (.)", lambda found: f"**Rule.** {found[1].upper()}", text, flags=re.MULTILINE)
    return text[0].upper() + text[1:]


def parameters(config: type[Any], within: str = "") -> list[tuple[str, ...]]:
    """One row per parameter, those of nested mappings under their path."""
    whole = None if any(_required(entry) for entry in fields(config)) else config()
    rows: list[tuple[str, ...]] = []
    hints = get_type_hints(config)
    for entry in fields(config):
        name, hint = within + entry.name, hints[entry.name]
        value = getattr(whole, entry.name) if whole is not None else entry.default
        default = "required" if _required(entry) else code(value if value is not MISSING else {})
        rows.append((code(name), default, _allowed(hint, entry.metadata), prose(entry.metadata["description"])))
        for path, kind in _nested(hint, name):
            rows += parameters(kind, path + ".")
    return rows


def _required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _nested(hint: Any, path: str) -> Iterator[tuple[str, type[Any]]]:
    """Every dataclass in an annotation, with the path to it."""
    if is_dataclass(hint) and isinstance(hint, type):
        yield path, hint
    for inner in get_args(hint):
        yield from _nested(inner, path + ".*" if get_origin(hint) in (tuple, Mapping) else path)


_TYPES = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", NoneType: "`null`", Any: "policy"}
_LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "each_ge": "≥"}


def _allowed(hint: Any, limits: Mapping[str, Any]) -> str:
    """Which values an annotation and a field's limits allow."""
    bounds = [
        f"{sign} {limits[key]:g}".replace("e+0", "e").replace("e+", "e")
        for key, sign in _LIMITS.items()
        if key in limits
    ]
    return ", ".join([_kind(hint), *bounds])


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(code(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_kind(get_args(hint)[0])}s"
    if get_origin(hint) is Mapping or is_dataclass(hint):
        return "mapping"
    return ", ".join(map(_kind, get_args(hint))) if get_args(hint) else _TYPES[hint]


def sentences(policy: Policy) -> list[str]:
    """The decision codes with what they say."""
    title = "What it adds to the codes of the policies inside" if policy.parts else "Decision codes"
    if not policy.codes:
        return [f"**{title}:** no code of its own.", ""]
    rows = [(code(name), template(policy, name)) for name in policy.codes]
    return [f"**{title}**", "", *table(("Code", "Sentence"), rows)]


def template(policy: Policy, name: str) -> str:
    """The sentence of a code, with names for its numbers."""
    return re.sub(r"{(\w+)[^}]*}", r"{\1}", policy.codes[name])


def diagram(seen: Seen) -> list[str]:
    """The phases with what leads from one to the other."""
    phases = sorted({phase for arrow in seen.arrows for phase in arrow} - {"[*]"})
    names = {"[*]": "[*]"} | {phase: f"p{i}" for i, phase in enumerate(phases)}
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{_said(phase)}" as {names[phase]}' for phase in phases]
    for (before, after), codes in sorted(seen.arrows.items(), key=lambda arrow: (arrow[0][0] != "[*]", arrow[0])):
        most = sorted(sorted(codes), key=lambda one: -codes[one])[:ARROW]
        text = ", ".join(map(_said, most)) + (" ..." if len(codes) > ARROW else "")
        lines.append(f"    {names[before]} --> {names[after]}: {text}")
    return [*lines, "```", ""]


def _said(text: str) -> str:
    """A phase or code in words that Mermaid does not take for its own."""
    return text.replace(": ", " ").replace(" | ", " / ")


def section(policy: Policy) -> list[str]:
    """All about one policy."""
    seen = observed(policy.name)
    shown = [code(spec) for spec in examples(policy.name)]
    lines = [f"## {policy.name}", "", rule(policy), ""]
    lines += [f"![{policy.name} on five traces](plots/{policy.name}.png)", "", f"The plot shows {shown[0]}.", ""]
    lines += ["**Parameters.** " + prose(policy.config.__doc__ or ""), ""]
    rows = parameters(policy.config)
    lines += table(("Parameter", "Default", "Allowed", "Meaning"), rows) if rows else []
    lines += sentences(policy)
    lines += ["**Phases**, and the codes that lead from one to the next, as seen with " + ", ".join(shown) + ":", ""]
    lines += diagram(seen)
    audit = ", ".join(map(code, sorted(seen.audit))) or "none"
    return [*lines, f"**Audit fields** seen with it: {audit}.", ""]


def presets(known: Mapping[str, Preset]) -> list[str]:
    """A table of presets."""
    return table(("Name", "What for", "Stands for"), [(code(k), one.about, code(one.spec)) for k, one in known.items()])


def unusable() -> list[str]:
    """What each policy says after many unusable losses in a row."""
    rows = []
    for policy in POLICIES.values():
        codes = [name for name in policy.codes if "nonfinite" in name and name != "nonfinite_hold"]
        rows += [(code(policy.name), code(name), template(policy, name)) for name in codes]
    return table(("Policy", "Code", "Sentence"), rows)


def schedules() -> list[str]:
    """What each base schedule is, and its parameters."""
    lines = table(("Name", "What"), [(code(name), summary(name, base=True)) for name in SCHEDULES])
    rows = [
        (code(name), parameter, default, about)
        for name, schedule in SCHEDULES.items()
        for parameter, default, _, about in parameters(schedule.config)
        if parameter != "`warmup_steps`" or name == "wsd"
    ]
    return lines + table(("Schedule", "Parameter", "Default", "Meaning"), rows)


def page() -> str:
    """The whole page: the template with everything from code filled in."""
    ordered = [*EXAMPLES, *sorted(POLICIES.keys() - EXAMPLES.keys())]
    parts = {
        "presets": presets(PRESETS),
        "guards": presets(GUARDS),
        "schedules": schedules(),
        "unusable": unusable(),
        "policies": table(("Name", "What"), [(f"[{name}](#{name})", summary(name)) for name in ordered]),
        "sections": [line for name in ordered for line in section(POLICIES[name])],
        **{name: ["```json", json.dumps(examples(name)[0]), "```", ""] for name in EXAMPLES},
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: "\n".join(parts[found[1]]), text).rstrip() + "\n"


# Pictures


def plot(name: str) -> bytes:
    """The picture of one policy as PNG: losses above, learning rates below, dots where a decision moved something."""
    from matplotlib.figure import Figure  # here, since the page needs no more than the service

    figure = Figure(figsize=(14, 4), dpi=64, layout="constrained")
    axes = figure.subplots(2, len(COLUMNS), sharex=True, squeeze=False)
    colors = ("tab:blue", "tab:orange") if name == "per_group" else ("tab:blue",)
    for (upper, lower), kind in zip(axes.T, COLUMNS, strict=True):
        said = list(decisions(examples(name)[0], kind))
        upper.set_title(kind)
        _draw(upper, [nan if seen.loss in (None, inf) else seen.loss for seen in observations(kind)], [], "tab:gray")
        for group, color in enumerate(colors):
            pairs = enumerate(pairwise(said), 1)
            dots = [i for i, (one, other) in pairs if _told(one, other) and one.lr[group] != other.lr[group]]
            _draw(lower, [decision.lr[group] for decision in said], dots, color, GROUPS[group].name)
    if len(colors) > 1:
        axes[1, 0].legend()
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("learning rate")
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _told(before: Decision, now: Decision) -> bool:
    """Does a journal keep the decision with its numbers? As in `core.run`."""
    return now.milestone or (before[:3] != now[:3] and before.code != now.code)


def _draw(axis: Any, values: list[Any], dots: list[int], color: str, label: str = "") -> None:
    axis.plot(values, color=color, linewidth=1, label=label)
    axis.plot(dots, [values[i] for i in dots], "o", color=color, markersize=2.5, alpha=0.6)
    usable = [value for value in values if value == value]
    if min(usable) > 0 and max(usable) > 10 * min(usable):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)


def main() -> int:
    """Write the page (and the plots), or compare the page with what is there; 1: it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    parser.add_argument("--plots", action="store_true", help="write docs/plots/NAME.png, too")
    given, text = parser.parse_args(), page()
    if given.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"docs/{PAGE.name}: out of date\nRun `make docs` and commit what it writes.", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    if given.plots:
        PLOTS.mkdir(exist_ok=True)
        for name in POLICIES:
            (PLOTS / f"{name}.png").write_bytes(plot(name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
