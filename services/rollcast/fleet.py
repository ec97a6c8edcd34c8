"""The fleet of rollout workers: starts, feeds, listens, replaces. The only judge of who is alive.

Owns: worker actors (through RLlib's `FaultTolerantActorManager`), leases given to them, and what comes back. Does not
know the learner, when to publish, or what an episode is.

A worker is lost when Ray says so, or when it does not answer a ping in time. Its leases return to the ledger, its
readers are forgotten, and a new worker takes its place and pulls the current policy. A call that fails in a living
worker is a bug and is raised.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from rollcast.buffer import PlayedGroup
from rollcast.errors import RunFailed
from rollcast.intake import Loaded
from rollcast.ledger import Lease, Ledger
from rollcast.prompts import PromptStream
from rollcast.runner import Played, RolloutRunner, WorkerSpec
from rollcast.weights import Store
from rollcast.worker import Occupation
from rollcast_learners.types import Prompt, Sampling, Trajectory, Weights

PING_EVERY_S = 5.0
MAX_FAILED_STARTS = 5
EVALUATION = -1
"""The lease of calls that are no rollouts: the ledger knows nothing of them."""


@dataclass
class WorkerState:
    """What the fleet knows of one worker."""

    ready: bool = False
    version: int = -1
    playing: int = 0
    pinged: float = 0.0
    answered: float = field(default_factory=time.monotonic)
    loads: int = 0


@dataclass(frozen=True)
class FleetSettings:
    """Sizes and deadlines. Run -> fleet."""

    workers: int
    groups_per_worker: int
    cpus_per_worker: float
    gpus_per_worker: float
    lost_after_s: float


class Fleet:
    """`feed` gives work, `gather` takes results and keeps the fleet whole."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: FleetSettings,
        ledger: Ledger,
        prompts: PromptStream,
        store: Store,
        sampling: Sampling,
        weights: Weights,
    ) -> None:
        self.spec = spec
        self.settings = settings
        self.ledger = ledger
        self.prompts = prompts
        self.store = store
        self.sampling = sampling
        self.weights = weights
        self.restarts = 0
        self.refusals: list[str] = []
        self.loaded: list[Loaded] = []
        self.evaluated: list[Trajectory] = []
        self.lost_evaluations: list[Prompt] = []
        self.occupations: list[Occupation] = []
        self._failed_starts = 0
        self._leases: dict[int, Lease] = {}
        self._evaluations: dict[int, tuple[int, list[Prompt]]] = {}
        self._next_evaluation = EVALUATION
        self._states: dict[int, WorkerState] = {}
        self.manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=10_000)
        for _ in range(settings.workers):
            self._add()

    # ---- giving

    def feed(self, allowance: int) -> None:
        """Leases groups to ready workers, the least busy first, until `allowance` groups are outstanding."""
        while self.ledger.outstanding < allowance:
            free = [w for w, s in self._states.items() if s.ready and s.playing < self.settings.groups_per_worker]
            if not free:
                return
            worker = min(free, key=lambda w: self._states[w].playing)
            lease = self.ledger.lease(worker)
            self._leases[lease.id] = lease
            self._play(worker, lease.id, self.prompts.group(lease.group, lease.attempt), self.sampling)

    def evaluate(self, prompts: Sequence[Prompt], sampling: Sampling, chunk: int = 16) -> None:
        """Plays prompts under the current policy; results appear in `evaluated`."""
        ready = [worker for worker, state in self._states.items() if state.ready]
        for start in range(0, len(prompts), chunk):
            worker = ready[(start // chunk) % len(ready)]
            part = list(prompts[start : start + chunk])
            self._evaluations[self._next_evaluation] = (worker, part)
            self._play(worker, self._next_evaluation, part, sampling)
            self._next_evaluation -= 1

    def announce(self, weights: Weights) -> None:
        """Tells every ready worker of a new policy; one that is starting will be told when it is ready."""
        self.weights = weights
        for worker, state in self._states.items():
            if state.ready:
                self._load(worker)

    def ask_occupation(self) -> None:
        for worker, state in self._states.items():
            if state.ready:
                self._call(worker, "occupation")

    # ---- taking

    def gather(self, timeout_s: float = 0.1) -> list[PlayedGroup]:
        """Results that have come in; notices lost workers and expired leases on the way."""
        if not self.manager.num_outstanding_async_reqs():
            time.sleep(timeout_s)  # The manager would return at once, and this process would spin.
        groups: list[PlayedGroup] = []
        lost: dict[int, RayError] = {}
        for result in self.manager.fetch_ready_async_reqs(timeout_seconds=timeout_s):
            value = result.get()
            if not result.ok and not isinstance(value, RayActorError):
                raise value
            if not result.ok:
                lost[result.actor_id] = value
            elif result.actor_id in self._states:
                groups += self._take(result.actor_id, result.tag, value)
        for worker, error in lost.items():
            self._replace(worker, str(error))
        self._ping()
        self.ledger.expire()
        return groups

    def ready(self) -> int:
        return sum(state.ready for state in self._states.values())

    @property
    def workers(self) -> list[int]:
        return list(self._states)

    def pids(self) -> dict[int, int]:
        """Process ids of the worker actors, for whoever wants to look at (or end) one."""
        actors = {worker: self.manager.actors()[worker] for worker in self._states}
        return {worker: ray.get(actor.pid.remote()) for worker, actor in actors.items()}

    def close(self) -> None:
        """Asks every worker to end its engine, and ends what does not."""
        actors = list(self.manager.actors().values())
        asked = [actor.stop.remote() for actor in actors]
        ray.wait(asked, num_returns=len(asked), timeout=20)
        for actor in actors:
            ray.kill(actor)

    def _take(self, worker: int, tag: str, value: Any) -> list[PlayedGroup]:
        state = self._states[worker]
        state.answered = time.monotonic()
        if tag in ("start", "load"):
            self._take_loaded(worker, tag, value)
        elif tag == "occupation":
            self.occupations.append(value)
        elif tag == "sample":
            state.playing -= 1
            return self._take_played(value)
        return []

    def _take_loaded(self, worker: int, tag: str, loaded: Loaded) -> None:
        state = self._states[worker]
        if tag == "start":
            state.ready, self._failed_starts = True, 0
        else:
            state.loads -= 1
        state.version = loaded.version
        if loaded.refused is not None:
            self.refusals.append(loaded.refused)
        elif loaded.gap_mean is not None:
            self.loaded.append(loaded)
        if tag == "start" and loaded.version < self.weights.version:
            self._load(worker)

    def _take_played(self, played: Played) -> list[PlayedGroup]:
        if played.lease in self._evaluations:
            del self._evaluations[played.lease]
            self.evaluated += played.trajectories
            return []
        lease = self._leases.pop(played.lease)
        if not self.ledger.accept(lease):  # Its lease had expired, and somebody else plays the group.
            return []
        return [PlayedGroup(lease.group, tuple(played.trajectories))]

    # ---- keeping whole

    def _add(self) -> None:
        actor = ray.remote(RolloutRunner).options(
            num_cpus=self.settings.cpus_per_worker,
            num_gpus=self.settings.gpus_per_worker,
            max_concurrency=10_000,
            max_restarts=0,
        )
        worker = self.manager._next_id
        self.manager.add_actors([actor.remote(self.spec, worker)])
        self._states[worker] = WorkerState()
        self._call(worker, "start", weights=self.weights)

    def _replace(self, worker: int, why: str) -> None:
        if worker not in self._states:
            return
        state = self._states.pop(worker)
        if not state.ready:
            self._failed_starts += 1
            self._give_up_after(why)
        self.restarts += 1
        for lease in self.ledger.release_worker(worker):
            del self._leases[lease.id]
        self.store.forget(f"worker-{worker}")
        for call, (owner, prompts) in list(self._evaluations.items()):
            if owner == worker:
                self.lost_evaluations += prompts
                del self._evaluations[call]
        ray.kill(self.manager.remove_actor(worker))
        self._add()

    def _give_up_after(self, why: str) -> None:
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RunFailed(
                f"{self._failed_starts} rollout workers in a row died while they started.",
                why.strip(),
                "See the workers' logs in Ray's session folder; `rollcast doctor` checks engine, memory and devices.",
            )

    def _ping(self) -> None:
        now = time.monotonic()
        for worker, state in list(self._states.items()):
            if not state.ready:
                continue
            if now - state.answered > self.settings.lost_after_s:
                self._replace(worker, f"no answer for {self.settings.lost_after_s:g} s")
            elif now - state.pinged > PING_EVERY_S:
                state.pinged = now
                self._call(worker, "ping")

    # ---- calls

    def _play(self, worker: int, lease: int, prompts: list[Prompt], sampling: Sampling) -> None:
        # A worker in the middle of an update starts the group when it is through: never on the version before.
        state = self._states[worker]
        state.playing += 1
        version = self.weights.version if state.loads or lease <= EVALUATION else state.version
        self._call(worker, "sample", lease=lease, prompts=prompts, sampling=sampling, version=version)

    def _load(self, worker: int) -> None:
        self._states[worker].loads += 1
        self._call(worker, "load", weights=self.weights)

    def _call(self, worker: int, method: str, **kwargs: Any) -> None:
        # Always by id: the manager's own round robin breaks once an actor has been removed.
        self.manager.foreach_actor_async(method, tag=method, kwargs=kwargs, remote_actor_ids=[worker])
