"""Goal: what the service decides is what a jitted step uses, with nothing compiled again and nothing waited for.

Method: real jitted Optax steps on a real service; what a step used is read from the state that it put out.
"""

from itertools import count

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flyball_server
from flyball.adapters.from_jax import FromJax
from flyball.adapters.optax import attach

names = (f"o{i}" for i in count())


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def steer(service):
    opened = []

    def steer(opt_state, **options):
        steered = attach(opt_state, **{"run": next(names), "server": service.http, "lag": 0, "wait_s": 10.0, **options})
        opened.append(steered)
        return steered

    yield steer
    for one in opened:
        one.close("")


def adam(lr=0.1):
    return optax.inject_hyperparams(optax.adam)(learning_rate=lr)


def stepper(optimizer, donate=False):
    """A jitted training step: params, opt_state, value -> params, opt_state, loss."""

    def step(params, opt_state, value):
        loss, grads = jax.value_and_grad(lambda p: (p * 0).sum() + value)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def train(steered, step, params, opt_state, count, rate):
    used = []
    for i in range(count):
        opt_state = steered.before(opt_state)
        params, opt_state, loss = step(params, opt_state, jnp.float32(1 / (i + 1)))
        steered.step(loss)
        used.append(rate(opt_state))
    return used, opt_state


@pytest.mark.parametrize("donate", [False, True])
def test_a_hundred_settings_are_each_used_by_the_very_next_step_and_compile_nothing(steer, scripted, donate):
    optimizer = adam()
    params = jnp.ones(3)
    opt_state = optimizer.init(params)
    factors = tuple(round(1 - i / 200, 6) for i in range(100))
    steered = steer(opt_state, policy=scripted(factor=factors, momentum=0.8))
    step = stepper(optimizer, donate)
    seen = lambda state: (float(state.hyperparams["learning_rate"]), float(state.hyperparams["b1"]))  # noqa: E731
    used, opt_state = train(steered, step, params, opt_state, 100, seen)
    base = float(np.float32(0.1))
    assert used == [(float(np.float32(factor * base)), float(np.float32(0.8))) for factor in factors]
    assert step._cache_size() == 1
    assert steered.governor.status.conflicts == 0


def test_type_and_placement_of_the_hyperparameters_stay_what_they_were(steer, scripted):
    mesh = jax.make_mesh((1,), ("data",))
    optimizer = optax.inject_hyperparams(optax.sgd, hyperparam_dtype=jnp.bfloat16)(learning_rate=0.1)
    opt_state = jax.device_put(optimizer.init(jnp.ones(2)), NamedSharding(mesh, PartitionSpec()))
    before = opt_state.hyperparams["learning_rate"]
    steered = steer(opt_state, policy=scripted(factor=(0.5,)))
    now = steered.before(opt_state).hyperparams["learning_rate"]
    assert (now.dtype, now.sharding, now.weak_type) == (before.dtype, before.sharding, before.weak_type)
    assert float(now) == float(before) / 2
    assert float(opt_state.hyperparams["learning_rate"]) == float(before), "the caller's own state is left alone"


def test_groups_are_known_by_their_labels_else_by_their_place(steer, service):
    groups = lambda steered: [  # noqa: E731
        group["group"]
        for group in httpx.get(f"{service.http}/v1/runs/{steered.governor.status.run}", trust_env=False).json()[
            "settings"
        ]
    ]
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    labelled = optax.multi_transform({"body": adam(), "head": adam(0.01)}, {"body": "body", "head": "head"})
    assert groups(steer(labelled.init(params))) == ["body", "head"]
    chained = optax.chain(optax.clip(1.0), adam())
    assert groups(steer(chained.init(params))) == ["default"]
    assert groups(steer(optax.chain(adam(), adam(1.0)).init(params))) == ["group0", "group1"]


def test_a_schedule_is_refused_before_training_and_a_factor_behind_it_is_steered(steer, scripted):
    schedule = optax.cosine_decay_schedule(0.1, 100)
    with pytest.raises(ValueError, match=r"learning_rate is a schedule.*inject_hyperparams\(optax.scale\)"):
        attach(adam(schedule).init(jnp.ones(2)), run="r", server="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="no injected learning rate"):
        attach(optax.adam(0.1).init(jnp.ones(2)), run="r", server="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="multiplier"):
        attach(adam().init(jnp.ones(2)), run="r", server="http://127.0.0.1:9", mode="multiplier")
    optimizer = optax.chain(optax.sgd(schedule), optax.inject_hyperparams(optax.scale)(step_size=1.0))
    opt_state = optimizer.init(jnp.ones(2))
    steered = steer(opt_state, policy=scripted(factor=(0.5, 0.25)))
    rate = lambda state: float(state[1].hyperparams["step_size"])  # noqa: E731
    used, _ = train(steered, stepper(optimizer), jnp.ones(2), opt_state, 4, rate)
    assert used == [0.5, 0.25, 0.5, 0.25]


def test_a_plain_number_that_somebody_writes_is_named_and_compiles_nothing(steer):
    optimizer = adam()
    params = jnp.ones(3)
    opt_state = optimizer.init(params)
    steered, step = steer(opt_state), stepper(optimizer)
    _, opt_state = train(steered, step, params, opt_state, 2, lambda state: 0)
    opt_state.hyperparams["learning_rate"] = 0.05  # as the documentation of Optax has it
    used, _ = train(steered, step, params, opt_state, 1, lambda state: float(state.hyperparams["learning_rate"]))
    assert used == [float(np.float32(0.1))]
    assert (steered.governor.status.conflicts, step._cache_size()) == (1, 1)


def test_what_before_returned_and_nobody_used_is_named_and_not_recorded_as_used(steer, service, scripted, caplog):
    optimizer, params = adam(), jnp.ones(3)
    opt_state = optimizer.init(params)
    steered, step = steer(opt_state, policy=scripted(factor=(0.5, 0.25, 0.125))), stepper(optimizer)
    for _ in range(8):
        steered.before(opt_state)
        params, opt_state, loss = step(params, opt_state, jnp.float32(1.0))
        jax.block_until_ready(opt_state)
        steered.step(loss)
    steered.close()
    run = httpx.get(f"{service.http}/v1/runs/{steered.governor.status.run}", trust_env=False).json()
    assert run["settings"][0]["applied_lr"] == float(np.float32(0.1))
    assert run["settings"][0]["lr"] != run["settings"][0]["applied_lr"]
    assert "is what before() returned used?" in caplog.text
    assert "somebody else" not in caplog.text


def test_a_writer_that_returns_to_the_first_value_is_not_taken_for_dropped_results(steer, scripted, caplog):
    optimizer, params = adam(), jnp.ones(3)
    opt_state = optimizer.init(params)
    steered, step = steer(opt_state, policy=scripted(factor=(0.5,))), stepper(optimizer)
    _, opt_state = train(steered, step, params, opt_state, 3, lambda state: 0)
    opt_state.hyperparams["learning_rate"] = jnp.float32(0.1)
    train(steered, step, params, opt_state, 2, lambda state: 0)
    assert "somebody else writes the learning rate" in caplog.text
    assert "is what before() returned used?" not in caplog.text


def test_a_loop_that_never_calls_before_is_told_once(steer, caplog):
    steered = steer(adam().init(jnp.ones(2)))
    for _ in range(60):
        steered.step(1.0)
    assert caplog.text.count("before() never") == 1


def test_under_multi_steps_only_updates_are_steps(steer, caplog):
    optimizer, params = optax.MultiSteps(adam(), 4), jnp.ones(3)
    opt_state = optimizer.init(params)
    with pytest.raises(ValueError, match="accumulate='mean', call before"):
        attach(opt_state, run="r", server="http://127.0.0.1:9")
    steered, step = steer(opt_state, accumulate="mean"), stepper(optimizer)
    for i in range(12):
        if i % 4 == 3:
            opt_state = steered.before(opt_state)
        params, opt_state, loss = step(params, opt_state, jnp.float32(i))
        steered.step(loss)
    assert steered.state_dict()["step"] == 3
    assert "counted as steps" not in caplog.text
    for _ in range(3):
        opt_state = steered.before(jax.block_until_ready(opt_state))
        params, opt_state, loss = step(params, opt_state, jnp.float32(1.0))
        steered.step(loss)
    assert caplog.text.count("counted as steps") == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jax.vmap(adam().init)(jnp.ones((4, 2))), r"hyperparams\['learning_rate'\].*shape \(4,\)"),
        (
            lambda: optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.bfloat16)(0.1).init(jnp.ones(2)),
            r"hyperparams\['b2'\].*is 1 as bfloat16.*rounds",
        ),
        (
            lambda: optax.inject_hyperparams(optax.scale)(step_size=-0.1).init(jnp.ones(2)),
            "negative.*optax.scale_by_learning_rate",
        ),
    ],
)
def test_hyperparameters_that_cannot_be_steered_are_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        attach(make(), run="r", server="http://127.0.0.1:9")


class Late:
    """An array that the device has not computed yet, until `done`."""

    def __init__(self, value):
        self.value, self.done = value, False

    def __getattr__(self, name):
        return getattr(self.value, name)

    def is_ready(self):
        return self.done


def test_a_loss_is_fetched_without_waiting_and_one_that_was_given_away_is_no_number():
    late = Late(jnp.float32(2.5))
    pending = FromJax(late)
    assert not pending.ready()
    late.done = True
    assert pending.ready()
    assert pending.value() == 2.5
    gone = jnp.float32(1.0)
    pending = FromJax(gone)
    gone.delete()
    assert pending.ready()
    assert np.isnan(pending.value())


def test_inside_a_jitted_function_the_first_call_says_where_it_belongs(steer):
    opt_state = adam().init(jnp.ones(2))
    steered = steer(opt_state)
    with pytest.raises(TypeError, match="outside of the jitted function"):
        jax.jit(steered.before)(opt_state)


def test_training_goes_on_when_the_state_is_no_longer_what_was_attached(steer, caplog):
    steered = steer(adam().init(jnp.ones(2)))
    other = optax.sgd(0.1).init(jnp.ones(2))
    assert steered.before(other) is other
    steered.step(1.0)
    assert "could not be applied" in caplog.text
