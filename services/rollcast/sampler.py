"""The seam to the engine, and the fake that ships with rollcast.

Owns: what an engine must be able to do. Does not know any engine, any environment, or Ray.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollcast_learners.types import Completion, Sampling, VersionSpan, Weights


@dataclass(frozen=True)
class LoadReport:
    """Seconds that a weight update took: waiting for the step in flight, and loading."""

    pause_s: float
    load_s: float


class EngineDied(RuntimeError):
    """The engine is lost and will not come back: whoever holds it must exit and be replaced."""


class Sampler(Protocol):
    """One engine holding one policy version. All coroutines may run concurrently on one event loop."""

    version: int

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        """Continues `token_ids`. Raises `EngineDied` when the engine is lost, `ValueError` when the prompt does not
        fit the context."""

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        """Swaps to `weights`, whose segment files lie in `folder` on this node and were validated by the caller:
        pause (answers in flight are kept), load, label, resume. Any failure after the pause raises `EngineDied`."""

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities at temperature 1 of tokens 1..T-1 given those before, with fresh KV (no prefix cache)."""

    async def alive(self) -> bool:
        """Whether the engine still answers; cheap enough to ask every second."""

    async def close(self) -> None:
        """Ends the engine and everything it started."""
