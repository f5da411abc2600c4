"""Training jobs: processes that step, wait, apply and report as `flyball.governor` does, and the scheduler that starts
them again after a crash.

Rule of this module: a process keeps what it did in `Story`s, which only the judges read.
"""

import asyncio
import json
from typing import Any, NamedTuple

from tests.simulation.link import Link

from flyball import wire
from flyball.base import build
from flyball.session import Session


class Step(NamedTuple):
    """What was done at one optimizer step. lr: what each rank's optimizer really used; answered: whether an answer had
    come since a step was last waited for in vain; based: whether the base schedule was followed; known: whether the
    session was attached."""

    local: int
    model: int
    target: Any
    lr: tuple[Any, ...]
    waited_s: float
    answered: bool
    based: bool
    known: bool


class Story:
    """What a process did under one session. offset: what the run's count is ahead of the process's own."""

    def __init__(self, job, session_id, start, inherited, elsewhere):
        self.session = session_id
        #: The job's own step it begins with, and how many incidents came before it.
        self.start = start
        self.after = len(job.plan.incidents) - len(job.incidents)
        self.steps = []
        self.seen = []
        #: What was seen before under another session and must arrive all the same, and what belongs to another line.
        self.inherited = inherited
        self.elsewhere = elsewhere
        self.offset = 0
        self.acknowledged = set()
        #: How many of the steps count: those of a process that lived on beside its successor do not.
        self.kept = None

    def observed(self):
        """Everything reported under this session, by the run's steps."""
        return {**self.inherited, **{local + self.offset: signals for local, signals in self.seen}}


class Checkpoint(NamedTuple):
    """What is saved with a model: its step, the token (None: the job has not begun), and what was seen until then."""

    model: int
    token: Any
    path: Any


class Job:
    """One job, from its first process to its last."""

    def __init__(self, world, plan):
        self.world = world
        self.plan = plan
        self.stories = []
        self.lingering = []
        self.process = None
        #: What a crashed job goes on from, and all there ever were.
        self.checkpoints = [Checkpoint(0, None, {})]
        self.abandoned = []
        self.incidents = list(plan.incidents)

    async def run(self):
        """Until the job has made all its steps and everything is acknowledged."""
        start, how = self.checkpoints[0], "begin"
        while True:
            self.process = process = Process(self, start, how)
            ended = await process.train()
            if ended == "done":
                break
            if ended == "superseded":
                self.world.fail("no wrong refusal", f"{self.plan.name} was superseded: {process.session.last_error}")
            if ended == "refused":
                # A script that begins anew may find its run there already, and one that resumes may not.
                process.die()
                if how != ("begin" if process.session.last_error.startswith("run ") else "checkpoint"):
                    self.world.fail("no wrong refusal", f"{self.plan.name} ({how}): {process.session.last_error}")
                del self.checkpoints[1:]
                start, how = self.checkpoints[0], "checkpoint" if how == "begin" else "begin"
                continue
            known = process.session.attached is not None
            if ended.how == "linger" and known:
                self.world.count("process lingers")
                process.story.kept = len(process.story.steps)
                self.lingering.append(self.world.loop.create_task(process.linger()))
            else:
                self.world.count("process crashed")
                process.die()
            start = self.back(ended)
            if ended.how == "newest" and known:
                how = "newest"
            else:
                how = "checkpoint" if _token(start.token)["attempt"] is not None else "begin"
        await asyncio.gather(*self.lingering)

    def lost(self, record):
        """By incident: how many of the steps before the checkpoint gone back to never left the process that died."""
        out = [0] * len(self.plan.incidents)
        for story in self.stories:
            number, line = record.line_of(story.session)
            if line is not None and story.after:
                before = max((step for step in record.steps_of(number) if step < story.start), default=-1)
                out[story.after - 1] = story.start - 1 - before
        return out

    def due(self, model):
        """The incident that happens before this step, if any; each happens once."""
        if self.incidents and self.incidents[0].at <= model:
            return self.incidents.pop(0)
        return None

    def back(self, incident):
        """The checkpoint to go on from; those behind it are of a future that did not happen, and may be asked for."""
        places = max(1, len(self.checkpoints) - incident.back)
        if incident.how == "astray" and self.abandoned:
            self.world.count("another future's checkpoint")
            self.checkpoints = [self.abandoned[incident.at % len(self.abandoned)]]
            return self.checkpoints[-1]
        self.abandoned += [one for one in self.checkpoints[places:] if one.token["attempt"] is not None]
        del self.checkpoints[places:]
        return self.checkpoints[-1]


class Process:
    """One process of a job. start: the model's step and the token it was saved with; how: "begin", "checkpoint" (resume
    there) or "newest" (resume behind the run's newest step)."""

    def __init__(self, job, start, how):
        self.world, self.job, self.plan = job.world, job, job.plan
        plan = self.plan
        self.name = plan.name
        self.model = start.model
        self.local = 0
        self.requests = {}
        token = _token(start.token) if how == "checkpoint" else None
        self.lr = [[group[1] for group in plan.groups] for _ in range(plan.ranks)]
        attach = wire.Attach(
            "default",
            plan.name,
            self.world.new_id(),
            {},
            tuple(wire.Group(*group) for group in plan.groups),
            plan.policy,
            plan.base,
            plan.guard,
            "absolute",
            plan.seed,
            plan.lag,
            how != "begin",
            None if token is None else token["step"],
            None if token is None else token["attempt"],
            0 if token is None else token["seq"],
            "" if token is None else token["digest"],
            "simulated",
        )
        base = None if plan.base is None else build(plan.base)
        self.session = Session(attach, base=base, on_outage=plan.on_outage, now=self.world.loop.now)
        self.link = Link(self.world, self.session, self)
        self.story = self._new_story(attach.session, self.model, {}, {})
        self._forget()
        self._missed_at = -1
        self._momentum = [group[2] for group in plan.groups]
        self._receipts = 0
        self.world.note(self.name, f"starts at step {self.model}: {how}")

    def _forget(self):
        self._receipted = self._wanted = self._decided = None
        self._late = False

    def _new_story(self, session_id, start, inherited, elsewhere):
        story = Story(self.job, session_id, start, inherited, elsewhere)
        self.job.stories.append(story)
        self.world.stories[session_id] = story
        return story

    async def train(self):
        """Until an incident, a refusal or the end: which of them."""
        plan, session = self.plan, self.session
        self.link.start()
        await self.link.wait(lambda: session.state != "connecting", plan.start_wait_s)
        while self.model < plan.steps:
            incident = self.job.due(self.model)
            if incident is not None and incident.how in ("rewind", "astray"):
                known = incident.how == "rewind" or not self.job.abandoned
                await self._rewind(self.job.back(incident), known)
                continue
            if incident is not None:
                return incident
            await self._step()
            if session.state in ("refused", "superseded"):
                return session.state
        return await self._end()

    async def linger(self):
        """On, without knowing that the job was started again elsewhere."""
        while self.model < self.plan.steps and self.session.state not in ("refused", "superseded"):
            await self._step()
        await self._end()
        self.die()

    async def _end(self):
        session = self.session
        session.end("finished")
        await self.link.wait(lambda: session.drained, None)
        if session.drained:
            self.world.note(self.name, "done")
        self.story.offset = session._offset
        self.link.stop()
        return "done" if session.drained else session.state

    def die(self):
        """Nothing of this process is sent any more; what is on its way may still arrive, but for an attach."""
        self.story.offset = self.session._offset
        self.link.stop()
        for task in list(self.requests):
            self.world.network._cut_off(task)

    async def _step(self):
        plan, session, world = self.plan, self.session, self.world
        if self is self.job.process:
            self._save()
        self._part_before_going_back()
        await asyncio.sleep(plan.step_s * (0.5 + world.chance.random()))
        waited_s, answered = await self._before_step()
        if session.state in ("refused", "superseded") and self.plan.exact:
            return
        self._after_step(waited_s, answered)
        signals = plan.signals(self.model, self.lr[0][0], len(self.job.stories))
        self.story.seen.append((self.local, signals))
        if session.observe(self.local, signals):
            self.link.wake()
        self.local += 1
        self.model += 1

    def _save(self):
        """A checkpoint, where one is due; none before it is known from where the run goes on: it would count from 0."""
        session, checkpoints = self.session, self.job.checkpoints
        unknown = session.attached is None and session.attach.resume and session.attach.from_step is None
        if self.model % self.plan.every == 0 and self.model > checkpoints[-1].model and not unknown:
            self.story.offset = session._offset
            path = {} if self.plan.exact else self.story.observed()
            checkpoints.append(Checkpoint(self.model, session.token(self.local), path))

    def _part_before_going_back(self):
        """Going back matters most while there is much that was not acknowledged."""
        network, coming = self.world.network, self.job.incidents[:1]
        if self.world.faults and coming and coming[0].how in ("rewind", "astray") and coming[0].at == self.model + 5:
            network.cut.add(self.name)
            self.world.loop.call_later(2.0 * self.world.chance.random() ** 2, network.cut.discard, self.name)

    async def _before_step(self):
        session, loop, step = self.session, self.world.loop, self.local
        session.tick(loop.now)
        waited_s, answered = 0.0, self.link.answers != self._missed_at
        if session.lag is not None and session.missing(step):
            started = loop.now
            if not await self.link.wait(lambda: not session.missing(step), self.plan.wait_s):
                session.missed()
                self._missed_at = self.link.answers
                self.world.count("decision missed")
            waited_s = loop.now - started
        self.based = session.outage and self.plan.on_outage == "base"
        if self.based:
            self.world.count("base followed in an outage")
        self.target = session.target(step)
        if self.target is not None:
            self._wanted, self._decided, self._late = self.target
            sent = json.dumps(self._wanted)  # what rank 0 tells the others
            for lr in self.lr:
                lr[:] = json.loads(sent)[0]
            if self._wanted.momentum is not None:
                self._momentum = [
                    m if g[2] is not None or g[3] else None
                    for m, g in zip(self._wanted.momentum, self.plan.groups, strict=True)
                ]
        return waited_s, answered

    def _after_step(self, waited_s, answered):
        noise = None if self._wanted is None else self._wanted.noise_std
        momentum = tuple(self._momentum)
        used = wire.Settings(tuple(self.lr[0]), None if set(momentum) == {None} else momentum, noise)
        seen = (used, self._wanted, self._late)
        if seen != self._receipted:
            self._receipted = seen
            self.session.receipt(self.local, self._decided, used, self._late, "", self.plan.ranks)
        lr = tuple(tuple(rank) for rank in self.lr)
        known = self.session.attached is not None
        self.story.steps.append(Step(self.local, self.model, self.target, lr, waited_s, answered, self.based, known))

    async def _rewind(self, checkpoint, same_line):
        """`governor.load_state_dict`. same_line: whether the checkpoint lies on the line that is left."""
        self.world.count("process rewinds")
        session, link, story = self.session, self.link, self.story
        model, token = checkpoint.model, _token(checkpoint.token)
        wait_s = 1.0 if self.plan.wait_s is None else self.plan.wait_s
        if session.state == "steering":
            await link.wait(lambda: session.drained, wait_s)
        story.offset = session._offset
        unknown = session.attached is None and session.attach.resume and session.attach.from_step is None
        before = {} if unknown or not same_line else _until(token["step"], story.observed())
        elsewhere = _until(token["step"], story.elsewhere) if same_line else checkpoint.path
        self.story = self._new_story(self.world.new_id(), model, before, elsewhere)
        session.reattach(self.story.session, token["attempt"], token["step"], token["seq"], token["digest"])
        self.story.offset = session._offset
        self.model, self.local = model, 0
        self._forget()
        for task in list(self.requests):
            self.world.network._cut_off(task)
        link.restart()
        await link.wait(lambda: session.attached is not None, wait_s)

    def acknowledged(self, report, advice):
        """The link tells what the service has answered."""
        steps = [step for step in report.steps if step <= advice.through]
        self.world.stories[report.session].acknowledged.update(steps)

    def rejected(self, report, error):
        self.world.fail("no surprise", f"a report of {self.name} was called invalid: {error}")


def _until(step, observed):
    return {before: signals for before, signals in observed.items() if before < step}


def _token(token):
    return token or {"step": 0, "attempt": None, "seq": 0, "digest": ""}
