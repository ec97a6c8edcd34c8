"""The rollout worker as a Ray actor: RLlib's `EnvRunner` around `RolloutWorker`.

Owns: building an engine from the run's settings, exiting when the engine dies, and the calls the fleet makes. Does not
know the ledger, the learner, or how episodes are played.

An exception that would leave the actor alive without an engine ends the process instead: a worker that cannot play is
replaced, never kept.
"""

import asyncio
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
import ray.actor
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_runner import EnvRunner

from rollcast.chat import ChatCodec
from rollcast.config import RunConfig
from rollcast.engine_traces import engine_record, sweep_dead
from rollcast.engines import start_engine
from rollcast.episode import EpisodeLimits
from rollcast.intake import Loaded
from rollcast.sampler import Delta, Drawing, EngineDied, Sampler
from rollcast.weights import StoreHandle
from rollcast.worker import Occupation, RolloutWorker
from rollcast_learners.types import Prompt, Sampling, Trajectory, Weights

WATCH_EVERY_S = 1.0


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker is built from, wherever it starts. Fleet -> worker."""

    config: RunConfig
    dtype: str


@dataclass(frozen=True)
class Placed:
    """Where Ray has put a worker. Worker -> fleet."""

    node: str
    gpu_ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Played:
    """One group, under the lease it was played for. Worker -> fleet."""

    lease: int
    trajectories: list[Trajectory]


class RolloutRunner(EnvRunner):
    """Async actor: many `sample` calls run at once on one event loop, beside `load` and `ping`."""

    def __init__(self, spec: WorkerSpec, worker_id: int) -> None:
        super().__init__(config=AlgorithmConfig(), worker_index=worker_id)
        self.spec = spec
        self.name = f"worker-{worker_id}"
        self.worker: RolloutWorker | None = None
        self.store: StoreHandle | None = None

    async def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The manager's way in. RLlib's own exits the process on any exception; here a bug is told to the caller."""
        result = func(self, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def place(self) -> Placed:
        """Answered as soon as the worker has a place on the cluster."""
        context = ray.get_runtime_context()
        return Placed(context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ())))

    async def start(self, store: StoreHandle) -> None:
        """Starts the engine, which has no policy of the run yet. Minutes on a large model."""
        self.store = store
        rollout = self.spec.config.rollout
        codec = ChatCodec.of(self.spec.config.model)
        self.worker = RolloutWorker(
            await self._engine(codec),
            codec,
            EpisodeLimits(rollout.max_turns, rollout.max_attempts),
            rollout.env_timeout_s,
            self.spec.config.weights.probe_max_gap,
        )
        self._watch = asyncio.ensure_future(self._exit_with_engine())

    async def sample(self, lease: int, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> Played:
        try:
            return Played(lease, await self._started.play(prompts, sampling, version))
        except EngineDied as error:
            self._exit(error)

    async def answer(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        """An answer of the live policy as it grows. No rollout: it is in no figure of the run."""
        deltas = self._started.intake.stream(token_ids, drawing, request_id)
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                yield delta

    async def load(self, weights: Weights, store: StoreHandle) -> Loaded:
        """Takes in an announced policy: see `RolloutWorker.load`. `store` knows the nodes that joined since."""
        self.store = store

        async def pull(weights: Weights) -> str:
            return await store.pull(weights, self.name)

        try:
            return await self._started.load(weights, pull)
        except EngineDied as error:
            self._exit(error)
        finally:
            await store.release(weights.version, self.name)

    async def occupation(self) -> Occupation:
        return self._started.occupation()

    async def ping(self) -> str:
        return "pong"

    async def pid(self) -> int:
        return os.getpid()

    async def stop(self) -> None:
        """Ends the engine, then this process, in good order."""
        if self.worker is not None:
            self._watch.cancel()
            await self.worker.close()
        ray.actor.exit_actor()

    def assert_healthy(self) -> None:
        if self.worker is None:
            raise RuntimeError(f"{self.name} has no engine yet")

    def make_env(self) -> None:
        """Environments are made by episodes: a prompt names its own."""

    def get_spaces(self) -> dict[str, Any]:
        return {}

    def get_metrics(self) -> dict[str, Any]:
        return {}

    @property
    def _started(self) -> RolloutWorker:
        assert self.worker is not None, "the fleet calls start() first and waits for it"
        return self.worker

    async def _engine(self, codec: ChatCodec) -> Sampler:
        assert self.store is not None, "an engine is started by start()"
        folder = await self.store.folder()
        if folder is None:
            self._exit("the weight store's agent on this node is gone")
        sweep_dead(folder)
        rollout, record = self.spec.config.rollout, folder / engine_record(self.name)
        size = {"concurrency": rollout.concurrency, "threads": rollout.cpus_per_worker}
        reserved = self.spec.config.serve.reserved
        return await start_engine(self.spec.config, self.spec.dtype, codec, record, reserved=reserved, **size)

    async def _exit_with_engine(self) -> None:
        while await self._started.alive():
            await asyncio.sleep(WATCH_EVERY_S)
        self._exit("the engine's process is gone")

    def _exit(self, reason: object) -> NoReturn:
        print(f"rollcast {self.name}: {reason}; exiting to be replaced", file=sys.stderr, flush=True)
        os._exit(1)
