"""The seam to the engine, and the fake that ships with rollcast.

Owns: what an engine must be able to do. Does not know any engine, any environment, or Ray.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollcast_learners.types import Completion, FinishReason, Sampling, VersionSpan, Weights


@dataclass(frozen=True)
class LoadReport:
    """Seconds that a weight update took: waiting for the step in flight, and loading."""

    pause_s: float
    load_s: float


@dataclass(frozen=True)
class Drawing:
    """How a served answer is drawn. Temperature 0 is greedy. Training has `Sampling`, which bends no distribution."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    seed: int | None = None
    """The same seed, prompt and policy give the same answer; None draws anew."""
    alternatives: int = 0
    """How many of the likeliest tokens to tell at each place, with their log-probabilities."""


@dataclass(frozen=True)
class Delta:
    """What an answer grew by: one entry a token. Sampler -> live policy."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the distribution sampled from."""
    versions: tuple[int, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    """The likeliest tokens at each place, if asked for."""
    finish_reason: FinishReason | None = None
    """On the last delta alone."""
    spans: tuple[VersionSpan, ...] | None = None
    """Of the whole answer, on the last delta, where the engine itself tells them."""


class EngineDied(RuntimeError):
    """The engine is lost and will not come back: whoever holds it must exit and be replaced."""


class Sampler(Protocol):
    """One engine holding one policy version. All coroutines may run concurrently on one event loop."""

    version: int

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        """Continues `token_ids`. Raises `EngineDied` when the engine is lost, `ValueError` when the prompt
        does not fit the context, or when the engine cannot restrict answers to `sampling.choices`."""

    def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        """Continues `token_ids`, told as it grows. Closing the iterator ends the answer in the engine too.

        Raises as `sample` does, at the first step.
        """

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        """Swaps to `weights`, whose segment files lie in `folder` on this node and were validated by the
        caller: pause (answers in flight are kept), load, label, resume. Any failure after the pause raises
        `EngineDied`."""

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities at temperature 1 of tokens 1..T-1 given those before, with fresh KV."""

    async def alive(self) -> bool:
        """Whether the engine still answers; cheap enough to ask every second."""

    async def close(self) -> None:
        """Ends the engine and everything it started."""


Script = Callable[[Sequence[int], int, random.Random], list[int]]
"""(prompt token ids, policy version, seeded random) -> the answer's token ids, without the final one."""


def babble(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
    """The default script: one to eight tokens of the prompt itself, so that any vocabulary will do."""
    return [draw.choice(token_ids) for _ in range(draw.randint(1, 8))]


class ScriptedSampler:
    """An engine without a model, for machines and tests that have none: says a script, token by token.

    It behaves as an engine does: answers take time, a load pauses them all and they go on under the new
    version, and spans say which token came from which. The same request id always gets the same answer.
    """

    def __init__(
        self,
        eos_token_id: int,
        script: Script = babble,
        seconds_per_token: float = 0.0,
        seconds_to_load: float = 0.0,
        max_model_len: int = 512,
    ) -> None:
        self.version = -1
        self.eos_token_id = eos_token_id
        self.script = script
        self.seconds_per_token = seconds_per_token
        self.seconds_to_load = seconds_to_load
        self.max_model_len = max_model_len
        self._running = asyncio.Event()
        self._running.set()

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        room = room_for(token_ids, sampling, self.max_model_len)
        said = [*self.script(token_ids, self.version, random.Random(request_id)), self.eos_token_id][:room]
        versions = []
        for _ in said:
            await asyncio.sleep(self.seconds_per_token)
            await self._running.wait()
            versions.append(self.version)
        return Completion(
            np.array(said, np.int32),
            np.full(len(said), -1.0, np.float32),
            spans_of(versions),
            "stop" if said[-1] == self.eos_token_id else "length",
        )

    async def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        room = room_in(self.max_model_len, token_ids, drawing.max_new_tokens)
        draw = random.Random(request_id if drawing.seed is None else f"seed {drawing.seed}")
        said = [*self.script(token_ids, self.version, draw), self.eos_token_id][:room]
        for place, token in enumerate(said):
            await asyncio.sleep(self.seconds_per_token)
            await self._running.wait()
            reason: FinishReason = "stop" if token == self.eos_token_id else "length"
            others = ((token, -1.0),) if drawing.alternatives else ()
            last = place == len(said) - 1
            yield Delta((token,), (-1.0,), (self.version,), (others,), reason if last else None)

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        self._running.clear()
        await asyncio.sleep(self.seconds_to_load)
        self.version = weights.version
        self._running.set()
        return LoadReport(0.0, self.seconds_to_load)

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return [-1.0] * (len(token_ids) - 1)

    async def alive(self) -> bool:
        return True

    async def close(self) -> None:
        """Nothing was started."""


def room_for(token_ids: Sequence[int], sampling: Sampling, max_model_len: int) -> int:
    """How many tokens an engine without structured output may answer. Raises `ValueError` as `Sampler.sample` does."""
    if sampling.choices is not None:
        raise ValueError("this engine has no structured output: set eval.restrict_answers to false")
    return room_in(max_model_len, token_ids, sampling.max_new_tokens)


def room_in(max_model_len: int, token_ids: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens an answer may have. Raises `ValueError` when there is room for none."""
    room = min(max_new_tokens, max_model_len - len(token_ids))
    if room < 1:
        raise ValueError(f"a prompt of {len(token_ids)} tokens does not fit a context of {max_model_len}")
    return room


def spans_of(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions, as spans over the tokens."""
    spans: list[VersionSpan] = []
    for position, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, position + 1)
        else:
            spans.append(VersionSpan(version, position, position + 1))
    return tuple(spans)
