"""A rollout worker: one engine, its environments, and one coroutine an episode. A plain class; `runner.py`
remotes it.

Owns: playing prompts, and the order in which new weights are taken in. Does not know Ray, the ledger or the
learner.

Weights: pull, validate, then pause, load, resume, probe. A policy that fails validation never touches the
engine and the old one goes on. From the pause on there is no way back: any failure, or a probe that differs
from the learner's log-probabilities, raises `EngineDied`, and what was sampled since the update dies with the
worker.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rollcast.chat import ChatCodec
from rollcast.environments import EnvironmentPool
from rollcast.episode import EpisodeLimits, play
from rollcast.sampler import EngineDied, Sampler
from rollcast_learners.types import Probe, Prompt, Sampling, Trajectory, Weights

Pull = Callable[[Weights], Awaitable[str]]
"""Brings the segment files of a policy to this node, validates them, and returns their folder."""


class WeightsRefused(ValueError):
    """A published policy failed validation; the engine was not touched."""


class WeightsMissing(WeightsRefused):
    """A published policy did not arrive; it may on another try."""


@dataclass(frozen=True)
class Loaded:
    """What became of an announcement. Worker -> fleet."""

    version: int
    refused: str | None = None
    missing: bool = False
    """Refused only because it did not arrive."""
    pull_s: float = 0.0
    pause_s: float = 0.0
    load_s: float = 0.0
    gap_mean: float | None = None
    gap_max: float | None = None


@dataclass
class Occupation:
    """Seconds a worker spent with at least one episode in flight, and without, since it was last asked."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    tokens: int = 0


class RolloutWorker:
    """Plays groups of prompts concurrently, and swaps policies underneath them."""

    def __init__(
        self,
        sampler: Sampler,
        codec: ChatCodec,
        limits: EpisodeLimits,
        env_timeout_s: float,
        probe_max_gap: float,
    ) -> None:
        self.sampler = sampler
        self.codec = codec
        self.limits = limits
        self.pool = EnvironmentPool(env_timeout_s, limits.max_turns)
        self.probe_max_gap = probe_max_gap
        self._updating = asyncio.Lock()
        self._trusted = asyncio.Event()
        self._newer = asyncio.Condition()
        self._refused = -1
        self._playing = 0
        self._since = time.monotonic()
        self._occupation = Occupation()

    @property
    def version(self) -> int:
        return self.sampler.version

    async def play(self, prompts: Sequence[Prompt], sampling: Sampling, version: int = 0) -> list[Trajectory]:
        """Plays the prompts side by side under `version` or newer; they leave together.

        A version that was refused is not waited for: the old policy goes on.
        """
        async with self._newer:
            await self._newer.wait_for(lambda: max(self.version, self._refused) >= version)
        self._account(+len(prompts))
        try:
            trajectories = await asyncio.gather(*[self._play_one(prompt, sampling) for prompt in prompts])
        finally:
            self._account(-len(prompts))
        # What was sampled while a probe was pending leaves only once the probe has passed.
        await self._trusted.wait()
        self._occupation.tokens += sum(trajectory.sampled_tokens for trajectory in trajectories)
        return list(trajectories)

    async def _play_one(self, prompt: Prompt, sampling: Sampling) -> Trajectory:
        await self._trusted.wait()
        return await play(prompt, self.pool, self.sampler, self.codec, sampling, self.limits)

    async def load(self, weights: Weights, pull: Pull) -> Loaded:
        """Takes in a published policy while answers are in flight; an older one is left alone."""
        async with self._updating:
            if weights.version <= self.version and self._trusted.is_set():
                return Loaded(self.version)
            started = time.monotonic()
            try:
                folder = await pull(weights)
            except WeightsRefused as refusal:
                self._refused = weights.version
                await self._tell()
                return Loaded(self.version, str(refusal), isinstance(refusal, WeightsMissing))
            pull_s = time.monotonic() - started
            self._trusted.clear()
            try:
                report = await self.sampler.load(weights, folder)
                gap_mean, gap_max = await self._probe(weights.probe)
            except EngineDied:
                raise
            except Exception as error:  # Half an update may be in the engine: whatever it was, it is lost.
                raise EngineDied(
                    f"loading version {weights.version} failed with {type(error).__name__}: {error}"
                ) from error
            self._trusted.set()
            await self._tell()
        return Loaded(weights.version, None, False, pull_s, report.pause_s, report.load_s, gap_mean, gap_max)

    async def _tell(self) -> None:
        """Whoever waits for a version looks again."""
        async with self._newer:
            self._newer.notify_all()

    async def _probe(self, probe: Probe | None) -> tuple[float | None, float | None]:
        if probe is None:
            return None, None
        rows = await asyncio.gather(*[self.sampler.logprobs(row) for row in probe.token_ids_RL.tolist()])
        gap = np.abs(np.asarray(rows, np.float32) - probe.logprobs_RL)
        mean, largest = float(gap.mean()), float(gap.max())
        if not mean <= self.probe_max_gap:
            raise EngineDied(
                f"after loading version {self.version} the engine's log-probabilities differ from the "
                f"learner's by {mean:.3f} nat on average (limit {self.probe_max_gap:g})"
            )
        return mean, largest

    async def alive(self) -> bool:
        return await self.sampler.alive()

    def occupation(self) -> Occupation:
        """Busy and idle seconds and sampled tokens since the last call."""
        self._account(0)
        done, self._occupation = self._occupation, Occupation()
        return done

    async def close(self) -> None:
        self.pool.close()
        await self.sampler.close()

    def _account(self, change: int) -> None:
        now = time.monotonic()
        if self._playing:
            self._occupation.busy_s += now - self._since
        else:
            self._occupation.idle_s += now - self._since
        self._since = now
        self._playing += change
