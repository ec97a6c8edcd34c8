"""A rollout worker: one engine, its environments, and one coroutine an episode. A plain class; `runner.py`
remotes it.

Owns: playing prompts, and what may leave the worker when. Does not know Ray, the ledger or the learner.

What was sampled while an update is unproved (`intake.py`) leaves only once its probe has passed; when the probe fails
it dies with the worker.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rollcast.chat import ChatCodec
from rollcast.environments import EnvironmentPool
from rollcast.episode import EpisodeLimits, play
from rollcast.intake import Intake, Loaded, Pull
from rollcast.sampler import Sampler
from rollcast_learners.types import Prompt, Sampling, Trajectory, Weights


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
        self.intake = Intake(sampler, probe_max_gap)
        self.codec = codec
        self.limits = limits
        self.pool = EnvironmentPool(env_timeout_s, limits.max_turns)
        self._playing = 0
        self._since = time.monotonic()
        self._occupation = Occupation()

    @property
    def sampler(self) -> Sampler:
        return self.intake.sampler

    @property
    def version(self) -> int:
        return self.intake.version

    async def play(self, prompts: Sequence[Prompt], sampling: Sampling, version: int = 0) -> list[Trajectory]:
        """Plays the prompts side by side under `version` or newer; they leave together.

        A version that was refused is not waited for: the old policy goes on.
        """
        await self.intake.reached(version)
        self._account(+len(prompts))
        try:
            trajectories = await asyncio.gather(*[self._play_one(prompt, sampling) for prompt in prompts])
        finally:
            self._account(-len(prompts))
        # What was sampled while a probe was pending leaves only once the probe has passed.
        await self.intake.trusted.wait()
        self._occupation.tokens += sum(trajectory.sampled_tokens for trajectory in trajectories)
        return list(trajectories)

    async def _play_one(self, prompt: Prompt, sampling: Sampling) -> Trajectory:
        await self.intake.trusted.wait()
        return await play(prompt, self.pool, self.sampler, self.codec, sampling, self.limits)

    async def load(self, weights: Weights, pull: Pull) -> Loaded:
        """Takes in a published policy while answers are in flight; an older one is left alone."""
        return await self.intake.load(weights, pull)

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
