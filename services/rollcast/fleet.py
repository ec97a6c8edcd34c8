"""The fleet of rollout workers: starts, feeds, listens, replaces, grows and shrinks. The only judge of who is alive.

Owns: worker actors (through RLlib's `FaultTolerantActorManager`), leases given to them, and what comes back. Does not
know the learner, when to publish, how many workers are wanted, or what an episode is.

A worker has three phases. It is placed by Ray, perhaps on a node that is still to come; then it starts its engine and
takes in the current policy; then it is ready and is fed. A worker that is not wanted any more drains: it is given
nothing, finishes what it plays, and hands back what it has not finished when its time is up.

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
from rollcast.control import Member
from rollcast.departures import Departures
from rollcast.errors import RunFailed
from rollcast.intake import Loaded
from rollcast.ledger import Lease, Ledger
from rollcast.prompts import PromptStream
from rollcast.runner import Placed, Played, RolloutRunner, WorkerSpec
from rollcast.weights import Store
from rollcast.worker import Occupation
from rollcast_learners.segments import spec_of
from rollcast_learners.types import Prompt, Sampling, Trajectory, Weights

PING_EVERY_S = 5.0
LOOK_EVERY_S = 1.0
"""How often nodes are counted, and a policy that did not arrive is asked for again."""
TOLD_AFTER_S = 30.0
"""A worker that Ray has not placed for so long is told of."""
MAX_FAILED_STARTS = 5
NODE_DIED = "its node has died"
"""Ray's words for an actor that it had placed on a node that turned out to be gone; it has no other sign of that."""
EVALUATION = -1
"""The lease of calls that are no rollouts: the ledger knows nothing of them."""


@dataclass
class WorkerState:
    """What the fleet knows of one worker."""

    place: Placed | None = None
    ready: bool = False
    leave_by: float | None = None
    """Until when it may finish what it plays; None for one that stays."""
    version: int = -1
    playing: int = 0
    pinged: float = 0.0
    since: float = field(default_factory=time.monotonic)
    """When its present phase began."""
    answered: float = field(default_factory=time.monotonic)
    loads: int = 0
    missing: bool = False
    """Whether the newest policy did not arrive and has to be asked for again."""
    told: bool = False

    @property
    def takes_work(self) -> bool:
        return self.ready and self.leave_by is None


@dataclass(frozen=True)
class FleetSettings:
    """Sizes and deadlines. Run -> fleet."""

    workers: int
    groups_per_worker: int
    cpus_per_worker: float
    gpus_per_worker: float
    lost_after_s: float
    drain_s: float
    start_s: float


class Fleet:
    """`feed` gives work, `gather` takes results and keeps the fleet whole, `set_size` says how large that is."""

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
        self.tensors = tuple(spec_of(entry) for entry in weights.manifest)
        self.wanted = 0
        self.restarts = 0
        self.notices: list[str] = []
        self.loaded: list[Loaded] = []
        self.evaluated: list[Trajectory] = []
        self.lost_evaluations: list[Prompt] = []
        self.occupations: list[Occupation] = []
        self._failed_starts = 0
        self._looked = time.monotonic()
        self._leases: dict[int, Lease] = {}
        self._evaluations: dict[int, tuple[int, list[Prompt]]] = {}
        self._next_evaluation = EVALUATION
        self._states: dict[int, WorkerState] = {}
        self._departures = Departures()
        self.manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=10_000)
        self.set_size(settings.workers)

    # ---- size

    def set_size(self, wanted: int) -> None:
        """New workers are started, or leaving ones stay after all; the least busy of too many begin to leave."""
        self.wanted = wanted
        staying = self._staying()
        for worker in self._draining()[: max(wanted - len(staying), 0)]:
            self._states[worker].leave_by = None
        for _ in range(wanted - len(self._staying())):
            self._add()
        if len(staying) > wanted:
            self.store.add_nodes()
            for worker in sorted(staying, key=self._worth)[: len(staying) - wanted]:
                self._states[worker].leave_by = time.monotonic() + self.settings.drain_s

    def ready(self) -> int:
        """Workers that can be given work."""
        return sum(state.takes_work for state in self._states.values())

    def crew(self) -> tuple[Member, ...]:
        """Those workers, with the policy that each holds and a handle to ask it."""
        actors = self.manager.actors()
        return tuple(Member(w, state.version, actors[w]) for w, state in self._states.items() if state.takes_work)

    def draining(self) -> int:
        return len(self._draining())

    def missing(self) -> str:
        """Who is not ready, in words."""
        late = {worker: state.place for worker, state in self._states.items() if not state.ready}
        where = {
            worker: "has no node" if place is None else f"is on node {place.node[:8]}" for worker, place in late.items()
        }
        return "Still starting: " + ", ".join(f"worker {worker} {told}" for worker, told in where.items())

    @property
    def workers(self) -> list[int]:
        return list(self._states)

    @property
    def places(self) -> dict[int, Placed]:
        """Where the workers are that have been placed."""
        return {worker: state.place for worker, state in self._states.items() if state.place is not None}

    def _worth(self, worker: int) -> tuple[bool, bool, int, int]:
        """Who is the least loss comes first: on a lost node, not ready, with little to do; of equals the newest."""
        state = self._states[worker]
        return not self._on_lost_node(state), state.ready, state.playing, -worker

    def _on_lost_node(self, state: WorkerState) -> bool:
        """As far as the store knows, which counts nodes."""
        return state.place is not None and state.place.node not in self.store.agents

    def _staying(self) -> list[int]:
        return [worker for worker, state in self._states.items() if state.leave_by is None]

    def _draining(self) -> list[int]:
        return [worker for worker, state in self._states.items() if state.leave_by is not None]

    # ---- giving

    def feed(self, allowance: int) -> None:
        """Leases groups to ready workers, the least busy first, until `allowance` groups are outstanding."""
        while self.ledger.outstanding < allowance:
            free = [w for w, s in self._states.items() if s.takes_work and s.playing < self.settings.groups_per_worker]
            if not free:
                return
            worker = min(free, key=lambda w: self._states[w].playing)
            lease = self.ledger.lease(worker)
            self._leases[lease.id] = lease
            self._play(worker, lease.id, self.prompts.group(lease.group, lease.attempt), self.sampling)

    def evaluate(self, prompts: Sequence[Prompt], sampling: Sampling, chunk: int = 16) -> None:
        """Plays prompts under the current policy; results appear in `evaluated`, what nobody could play in
        `lost_evaluations`."""
        ready = [worker for worker, state in self._states.items() if state.takes_work]
        if not ready:
            self.lost_evaluations += prompts
            return
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
        self._drain()
        self._look_around()
        self.ledger.expire()
        return groups

    def pids(self) -> dict[int, int]:
        """Process ids of the workers that have been placed, for whoever wants to look at (or end) one."""
        actors = {worker: self.manager.actors()[worker] for worker in self.places}
        return {worker: ray.get(actor.pid.remote()) for worker, actor in actors.items()}

    def close(self) -> None:
        """Asks every worker to end its engine, and ends what does not."""
        for worker in list(self._states):
            self._part(worker)
        self._departures.close()

    def _take(self, worker: int, tag: str, value: Any) -> list[PlayedGroup]:
        state = self._states[worker]
        state.answered = time.monotonic()
        if tag == "place":
            self._start(worker, value)
        elif tag == "start":
            self._load(worker)
        elif tag == "load":
            self._take_loaded(worker, value)
        elif tag == "occupation":
            self.occupations.append(value)
        elif tag == "sample":
            state.playing -= 1
            return self._take_played(value)
        return []

    def _take_loaded(self, worker: int, loaded: Loaded) -> None:
        state = self._states[worker]
        state.loads -= 1
        state.version = loaded.version
        if not state.ready and loaded.version >= 0:  # It has a policy of this run, perhaps not yet the newest.
            state.ready, self._failed_starts = True, 0
        if loaded.refused is not None and state.ready:
            self.notices.append(f"worker {worker} plays on with the old policy: {loaded.refused}")
        elif loaded.gap_mean is not None:
            self.loaded.append(loaded)
        if loaded.version < self.weights.version and not state.loads:
            if loaded.refused is None:  # Announced while it was not ready to hear of it.
                self._load(worker)
            else:
                state.missing = loaded.missing or not state.ready

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
        self._call(worker, "place")

    def _start(self, worker: int, place: Placed) -> None:
        """It has a place: from now on its engine starts. Its node may have joined a moment ago."""
        state = self._states[worker]
        state.place, state.since = place, time.monotonic()
        if place.node not in self.store.agents:
            self.store.add_nodes()
        self._call(worker, "start", store=self.store.handle(self.tensors))

    def _replace(self, worker: int, why: str) -> None:
        """Another one in its place, unless it was leaving anyway."""
        if worker not in self._states:
            return
        state = self._states[worker]
        self.ledger.release_worker(worker)
        ray.kill(self._forget(worker))
        if state.leave_by is not None:
            return
        self.store.add_nodes()
        lost_with_node = self._on_lost_node(state) or (state.place is None and NODE_DIED in why)
        if not state.ready and not lost_with_node:  # A node that left says nothing about the engine.
            self._failed_starts += 1
            self._give_up_after(why)
        self.restarts += 1
        self._add()

    def _forget(self, worker: int) -> Any:
        """Nothing of it is expected any more. Its leases are the caller's to return. Returns the actor."""
        del self._states[worker]
        self._leases = {call: lease for call, lease in self._leases.items() if lease.worker != worker}
        self.store.forget(f"worker-{worker}")
        for call, (owner, prompts) in list(self._evaluations.items()):
            if owner == worker:
                self.lost_evaluations += prompts
                del self._evaluations[call]
        return self.manager.remove_actor(worker)

    def _drain(self) -> None:
        """Leaving workers go when they are through, or when their time is up."""
        now = time.monotonic()
        for worker in self._draining():
            state = self._states[worker]
            if not state.ready or not state.playing or now > (state.leave_by or now):
                self._part(worker)
        self._departures.look()

    def _part(self, worker: int) -> None:
        """Takes leave of a worker: what it has not finished is handed back, and it ends in good order."""
        placed = self._states[worker].place is not None
        self.ledger.hand_back(worker)
        actor = self._forget(worker)
        if placed:
            self._departures.send_away(actor)
        else:
            ray.kill(actor)  # It would wait for its place first.

    def _look_around(self) -> None:
        """Nodes that joined get an agent; workers that miss the newest policy ask again; who is late is told of."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        self.store.add_nodes()
        for worker, state in list(self._states.items()):
            if state.missing and not state.loads:
                self._load(worker)
            if not state.ready and state.leave_by is None:
                self._hurry(worker, now - state.since)

    def _hurry(self, worker: int, waited_s: float) -> None:
        state, settings = self._states[worker], self.settings
        if state.place is None and waited_s > TOLD_AFTER_S and not state.told:
            state.told = True
            needs = f"{settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs"
            self.notices.append(f"worker {worker} still waits for a node with {needs} free; the others play on")
        elif state.place is not None and waited_s > settings.start_s:
            where = f"on node {state.place.node[:8]}"
            self._replace(worker, f"Worker {worker} {where} had no engine after {settings.start_s:g} s.")

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
        state = self._states[worker]
        state.loads += 1
        state.missing = False
        self._call(worker, "load", weights=self.weights, store=self.store.handle(self.tensors))

    def _call(self, worker: int, method: str, **kwargs: Any) -> None:
        # Always by id: the manager's own round robin breaks once an actor has been removed.
        self.manager.foreach_actor_async(method, tag=method, kwargs=kwargs, remote_actor_ids=[worker])
