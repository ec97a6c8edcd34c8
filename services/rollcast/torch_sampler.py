"""The sampler for machines without vLLM: Hugging Face's own forward pass, one token a request at a time.

Owns: decoding with a key-value cache and swapping weights between two tokens. Slow but exact; does not batch
requests. Does not know environments, Ray or the learner.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rollcast.chat import stop_token_ids
from rollcast.sampler import Delta, Drawing, LoadReport, room_for, room_in, spans_of
from rollcast_learners import adapters
from rollcast_learners.arena import open_tensors
from rollcast_learners.settings import LoraSettings
from rollcast_learners.types import Completion, FinishReason, Sampling, Weights


class TorchSampler:
    """All model work runs on one thread, token by token: a load falls between two tokens of every answer."""

    def __init__(
        self,
        path: str,
        dtype: str,
        max_model_len: int,
        trust_remote_code: bool = False,
        adapter: LoraSettings | None = None,
    ) -> None:
        self.version = -1
        self.max_model_len = max_model_len
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        ).eval()
        if adapter is not None:
            adapters.inject(self.model, adapter)
        self.stop_ids = set(stop_token_ids(path, trust_remote_code))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch-sampler")

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        room = room_for(token_ids, sampling, self.max_model_len)
        random = _generator(request_id)
        said: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        cache: Any = None
        new = list(token_ids)
        while len(said) < room and not (said and said[-1] in self.stop_ids):
            token, logprob, version, cache, _ = await self._on_thread(
                self._next_token, new, cache, sampling.temperature, random
            )
            said.append(token)
            logprobs.append(logprob)
            versions.append(version)
            new = [token]
        return Completion(
            np.array(said, np.int32),
            np.array(logprobs, np.float32),
            spans_of(versions),
            "stop" if said[-1] in self.stop_ids else "length",
        )

    async def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        room = room_in(self.max_model_len, token_ids, drawing.max_new_tokens)
        random = _generator(request_id if drawing.seed is None else f"seed {drawing.seed}")
        asked = (drawing.temperature, random, drawing.top_p, drawing.alternatives)
        cache: Any = None
        new = list(token_ids)
        reason: FinishReason | None = None
        for place in range(room):
            token, logprob, version, cache, others = await self._on_thread(self._next_token, new, cache, *asked)
            if token in self.stop_ids:
                reason = "stop"
            elif place == room - 1:
                reason = "length"
            yield Delta((token,), (logprob,), (version,), (others,), reason)
            if reason is not None:
                return
            new = [token]

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        asked = time.monotonic()
        started, done = await self._on_thread(self._load, weights, folder)
        return LoadReport(started - asked, done - started)

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        scored: list[float] = await self._on_thread(self._score, list(token_ids))
        return scored

    async def alive(self) -> bool:
        return True

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    @torch.no_grad()
    def _next_token(
        self,
        new: list[int],
        cache: Any,
        temperature: float,
        random: torch.Generator,
        top_p: float = 1.0,
        alternatives: int = 0,
    ) -> tuple[int, float, int, Any, tuple[tuple[int, float], ...]]:
        """The token, its log-probability, the version, the cache after it, and the likeliest tokens."""
        output = self.model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_V: Tensor = output.logits[0, -1].float()
        logprobs_V = torch.log_softmax(logits_V / temperature if temperature > 0 else logits_V, dim=-1)
        if top_p < 1:
            logprobs_V = _nucleus(logprobs_V, top_p)
        if temperature > 0:
            token = int(torch.multinomial(logprobs_V.exp(), 1, generator=random))
        else:
            token = int(logits_V.argmax())
        best = logprobs_V.topk(min(alternatives, len(logprobs_V)))
        others = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, float(logprobs_V[token]), self.version, output.past_key_values, others

    @torch.no_grad()
    def _load(self, weights: Weights, folder: str) -> tuple[float, float]:
        started = time.monotonic()
        parameters = dict(self.model.named_parameters())
        if weights.kind == "adapter":
            parameters = {adapters.published_name(name): parameter for name, parameter in parameters.items()}
        for name, tensor in open_tensors(weights, folder).items():
            parameters[name].copy_(tensor)
        self.version = weights.version
        return started, time.monotonic()

    @torch.no_grad()
    def _score(self, token_ids: list[int]) -> list[float]:
        ids_T = torch.tensor(token_ids)
        logits_TV = self.model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        scored: list[float] = torch.log_softmax(logits_TV, -1).gather(-1, ids_T[1:, None]).squeeze(-1).tolist()
        return scored


def _generator(name: str) -> torch.Generator:
    """The same chance for the same name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(seed)


def _nucleus(logprobs_V: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together have `top_p` of the probability, made a distribution again."""
    ordered_V, order_V = logprobs_V.exp().sort(descending=True)
    outside_V = ordered_V.cumsum(0) - ordered_V >= top_p
    kept_V = logprobs_V.index_fill(0, order_V[outside_V], -torch.inf)
    return torch.log_softmax(kept_V, dim=-1)
