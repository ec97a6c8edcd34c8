"""The control of a run: what was asked of it from elsewhere, its last status, who plays, and its newest policy.

Owns: wishes and whether they can be, the name by which a run is found on its cluster, and that a name means one run.
Does not know how a wish is fulfilled, nor who asks.

`Control` is a plain class; `Line` makes it one small named actor and is the trainer's end of it. The actor lives with
the trainer: when the trainer dies, Ray ends it, and the name is free again.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollcast.errors import RollcastError, RunFailed, UsageError
from rollcast.weights import StoreHandle
from rollcast_learners.types import Weights

PREFIX = "control-"
SAY_EVERY_S = 0.5
NAME_FREES_S = 10.0
"""A name still taken after so long is not of a trainer that has just died."""
ANSWER_S = 30.0


def name_of(run: str) -> str:
    """The name of the run's control actor."""
    return f"{PREFIX}{run}"


@dataclass(frozen=True)
class Wishes:
    """What was asked of a run. Control -> trainer."""

    workers: int | None = None
    """How many rollout workers; None leaves it to the configuration."""
    paused: bool = False
    stop: bool = False


@dataclass(frozen=True)
class Member:
    """A rollout worker that holds a policy. Trainer -> control -> live policy."""

    worker: int
    version: int
    actor: Any = field(compare=False, repr=False)


class Control:
    """Hears the trainer and whoever asks. All methods are coroutines of one event loop."""

    def __init__(self, run: str, owner: str, wishes: Wishes = Wishes()) -> None:
        self.run = run
        self._owner = owner
        self._wishes = wishes
        self._status: dict[str, Any] = {}
        self._heard = time.monotonic()
        self._policy: tuple[Weights, StoreHandle] | None = None
        self._crew: tuple[Member, ...] = ()
        self._shown = 0
        self._newer = asyncio.Condition()

    async def owner(self) -> str:
        """Who trains the run, in words."""
        return self._owner

    async def say(self, status: dict[str, Any]) -> Wishes:
        """The trainer tells its status, and hears what was asked of it."""
        self._status, self._heard = status, time.monotonic()
        return self._wishes

    async def status(self) -> dict[str, Any]:
        """What the trainer last said, `heard_s` seconds ago, and `policy_version`, the newest published one."""
        version = None if self._policy is None else self._policy[0].version
        return {**self._status, "heard_s": time.monotonic() - self._heard, "policy_version": version}

    async def ask(self, **wish: Any) -> Wishes:
        """Notes a wish: `workers` (a number, or None for the configured), `paused`, `stop=True`.

        Raises `UsageError` with what is possible, and then nothing of the wish counts.
        """
        for name, value in wish.items():
            self._refuse_impossible(name, value)
        self._wishes = replace(self._wishes, **wish)
        return self._wishes

    async def announce(self, weights: Weights, store: StoreHandle) -> None:
        """The trainer published a policy; whoever waits for a newer one gets it."""
        async with self._newer:
            self._policy = weights, store
            self._newer.notify_all()

    async def newest(self, above: int, wait_s: float) -> tuple[Weights, StoreHandle] | None:
        """The newest policy once its version is above `above`; None when it is not within `wait_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._newer:
                await self._newer.wait_for(lambda: self._policy is not None and self._policy[0].version > above)
                return self._policy
        return None

    async def show(self, crew: tuple[Member, ...]) -> None:
        """The trainer tells who plays."""
        async with self._newer:
            self._crew, self._shown = crew, self._shown + 1
            self._newer.notify_all()

    async def crew(self, seen: int, wait_s: float) -> tuple[int, tuple[Member, ...]]:
        """Who plays, and how often that has changed; waits up to `wait_s` seconds for more than `seen` changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._newer:
                await self._newer.wait_for(lambda: self._shown > seen)
        return self._shown, self._crew

    def _refuse_impossible(self, name: str, value: object) -> None:
        known = {"workers": "a whole number", "paused": "true or false", "stop": "true"}
        if name not in known:
            what = f"Nobody can ask a run for {name!r}."
            raise UsageError(what, "A run has no such wish.", f"Ask for one of {', '.join(known)}.")
        if name == "workers":
            self._refuse_workers(value)
        elif not isinstance(value, bool) or (name == "stop" and not value):
            what = f"{name} cannot be {value!r}."
            raise UsageError(what, f"It is {known[name]}.", "Correct it.")

    def _refuse_workers(self, value: object) -> None:
        if "most_workers" in self._status and not self._status["most_workers"]:
            what = f"The run {self.run} has no rollout workers to scale."
            raise UsageError(what, "It learns from references and plays nothing.", "Scale a run of `rollcast train`.")
        if value is None:
            return
        most = self._status.get("most_workers")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (most is not None and value > most):
            possible = "0 or more" if most is None else f"0 to {most}"
            raise UsageError(
                f"The run {self.run} cannot have {value!r} rollout workers.",
                f"Possible are {possible}: so many fit on its cluster beside the learners.",
                f"Ask for {possible}, or add nodes to the cluster first.",
            )


def find(run: str, namespace: str | None = None) -> Any:
    """Handle of the run's control actor. Raises `UsageError` that names the runs that live in the namespace (without
    one, in that of this connection)."""
    where = namespace or ray.get_runtime_context().namespace
    try:
        return ray.get_actor(name_of(run), where)
    except ValueError:
        living = ", ".join(running(where)) or "none"
        what = f"There is no live run {run!r} on this cluster."
        raise UsageError(what, f"Those that live there: {living}.", "Name one of them, or start it.") from None


def running(namespace: str) -> list[str]:
    """Names of the runs that live on this cluster."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    here = (actor["name"] for actor in actors if actor["namespace"] == namespace)
    return sorted(name.removeprefix(PREFIX) for name in here if name.startswith(PREFIX))


def answer(reference: Any, run: str) -> Any:
    """What the run's control answers to a call. Raises the refusal itself, `RunFailed` where nobody answers."""
    try:
        return ray.get(reference, timeout=ANSWER_S)
    except GetTimeoutError:
        what = f"The control of {run} did not answer within {ANSWER_S:g} s."
        raise RunFailed(what, "Its node may be lost or overloaded.", "See `rollcast status`, then try again.") from None
    except RayTaskError as error:
        if isinstance(error.cause, RollcastError):
            raise error.cause from None
        raise
    except RayActorError:
        what = f"The run {run} has ended meanwhile."
        raise UsageError(what, "Its control ended with it.", "See `rollcast status`.") from None


def answers(control: Any, within_s: float = ANSWER_S) -> bool:
    """Whether a control still lives, and with it its run."""
    try:
        ray.get(control.owner.remote(), timeout=within_s)
    except (RayActorError, GetTimeoutError):
        return False
    return True


class Line:
    """The trainer's end of its run's control: says and hears without ever waiting, and keeps the actor alive."""

    def __init__(self, run: str, owner: str, name_frees_s: float = NAME_FREES_S) -> None:
        """Raises `UsageError` while another trainer on the cluster has the name."""
        self.run = run
        self.owner = owner
        self.wishes = Wishes()
        self._policy: tuple[Weights, StoreHandle] | None = None
        self._crew: tuple[Member, ...] = ()
        self._pending: Any = None
        self._said = 0.0
        self._actor = self._take_name(time.monotonic() + name_frees_s)

    def say(self, status: dict[str, Any]) -> Wishes:
        """Tells the status when it is time to, and returns what has been asked so far."""
        if self._pending is not None and ray.wait([self._pending], timeout=0)[0]:
            self._hear()
        if self._pending is None and time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            self._pending = self._actor.say.remote(status)
        return self.wishes

    def announce(self, weights: Weights, store: StoreHandle) -> None:
        self._policy = weights, store
        self._actor.announce.remote(weights, store)

    def show(self, crew: tuple[Member, ...]) -> None:
        """Tells who plays, if that has changed."""
        if crew != self._crew:
            self._crew = crew
            self._actor.show.remote(crew)

    def close(self) -> None:
        ray.kill(self._actor)

    def _hear(self) -> None:
        reference, self._pending = self._pending, None
        try:
            self.wishes = ray.get(reference)
        except ActorUnavailableError:
            return  # Nobody knows yet whether it is dead: it is asked again.
        except RayActorError:
            self._replace()

    def _replace(self) -> None:
        """The control's process is gone: another one, which knows what that one knew."""
        ray.kill(self._actor)  # A dead actor keeps its name as long as somebody holds it.
        with contextlib.suppress(ValueError):  # The name is free a moment later.
            self._actor = self._create()
            self._actor.show.remote(self._crew)
            if self._policy is not None:
                self.announce(*self._policy)

    def _take_name(self, deadline: float) -> Any:
        while True:
            try:
                return self._create()
            except ValueError:
                if time.monotonic() > deadline:
                    raise self._taken() from None
            time.sleep(0.25)

    def _create(self) -> Any:
        # Ray places an actor without CPUs anywhere, unless its place is a must.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = ray.remote(Control).options(
            name=name_of(self.run), num_cpus=0, max_concurrency=1000, scheduling_strategy=here
        )
        return options.remote(self.run, self.owner, self.wishes)

    def _taken(self) -> UsageError:
        owner = answer(find(self.run).owner.remote(), self.run)
        what = f"The run {self.run} is being trained already."
        return UsageError(what, f"{owner} trains it on this cluster.", "Stop it, or choose another name with --run.")
