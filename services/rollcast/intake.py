"""How an engine takes in a published policy while it answers: the one order that keeps answers right.

Owns: the lock around an update, whether the policy in the engine is trusted, and the probe. Does not know where
policies come from, who asks for answers, or Ray. Rollout workers and the live policy share it.

Weights: pull, validate, then pause, load, resume, probe. A policy that fails validation never touches the engine and
the old one goes on. From the pause on there is no way back: any failure, or a probe that differs from the learner's
log-probabilities, raises `EngineDied`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from rollcast.sampler import Delta, Drawing, EngineDied, Sampler
from rollcast_learners.types import Probe, Weights

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


class Intake:
    """One engine, and the policies it takes in one after the other."""

    def __init__(self, sampler: Sampler, probe_max_gap: float) -> None:
        self.sampler = sampler
        self.probe_max_gap = probe_max_gap
        self.trusted = asyncio.Event()
        """Set while the engine's policy has passed its probe: what was sampled meanwhile may leave."""
        self._updating = asyncio.Lock()
        self._newer = asyncio.Condition()
        self._refused = -1

    @property
    def version(self) -> int:
        return self.sampler.version

    async def reached(self, version: int) -> None:
        """Waits until the engine holds `version` or a newer one, or that one was refused."""
        async with self._newer:
            await self._newer.wait_for(lambda: max(self.version, self._refused) >= version)

    async def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        """A served answer as it grows, under a policy that is trusted: see `Sampler.stream`."""
        await self.trusted.wait()
        async with aclosing(self.sampler.stream(token_ids, drawing, request_id)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                await self.trusted.wait()
                yield delta

    async def load(self, weights: Weights, pull: Pull, backwards: bool = False) -> Loaded:
        """Takes in a published policy while answers are in flight; an older one only if asked to go `backwards`."""
        async with self._updating:
            known = weights.version == self.version if backwards else weights.version <= self.version
            if known and self.trusted.is_set():
                return Loaded(self.version)
            started = time.monotonic()
            try:
                folder = await pull(weights)
            except WeightsRefused as refusal:
                self._refused = weights.version
                await self._tell()
                return Loaded(self.version, str(refusal), isinstance(refusal, WeightsMissing))
            pull_s = time.monotonic() - started
            self.trusted.clear()
            try:
                report = await self.sampler.load(weights, folder)
                gap_mean, gap_max = await self._probe(weights.probe)
            except EngineDied:
                raise
            except Exception as error:  # Half an update may be in the engine: whatever it was, it is lost.
                raise EngineDied(
                    f"loading version {weights.version} failed with {type(error).__name__}: {error}"
                ) from error
            self.trusted.set()
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
