"""The sampler that rolls out on vLLM: one `AsyncLLM`, token ids in and out, weights swapped in mid-answer.

Owns: the engine's start, its requests, its updates, its death, and the shared memory it leaves. Does not know
text, environments, where weights come from, or Ray.

vLLM's processes read their settings from the environment: `start` sets `VLLM_RPC_BASE_PATH`, and on the CPU
`OMP_NUM_THREADS` and `VLLM_CPU_OMP_THREADS_BIND`, while it starts them, and puts the caller's values back.
`VLLM_LOGGING_LEVEL` is read when vLLM is imported: it is `ERROR` unless the environment says otherwise.
"""

import asyncio
import gc
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, nullcontext
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, get_args

import numpy as np

from rollcast.sampler import Delta, Drawing, EngineDied, LoadReport
from rollcast_learners import adapters
from rollcast_learners.settings import LoraSettings
from rollcast_learners.types import Completion, FinishReason, Sampling, VersionSpan, Weights

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rollcast.chat import stop_token_ids
from rollcast.engine_traces import SOCKETS_PREFIX, Traces, sweep
from rollcast.vllm_transfer import BACKEND, update_info

GIB = 1 << 30
CPU_BLOCK = 32
"""Tokens of a KV block on a CPU, the smallest that its attention kernels take (measured on SmolLM2-135M, 8 samples of
each prompt, 16 tokens: 1.7 times less CPU than with 128 for prompts of 45 tokens, 1.85 times for 200)."""
FORGET_S = 1.0
Result = TypeVar("Result")


class VllmSampler:
    """A running engine. Made by `start`, ended by `close`; used from the event loop that started it."""

    def __init__(
        self,
        engine: AsyncLLM,
        version: int,
        cores: Sequence[BaseProcess],
        traces: Traces,
        *,
        context: int,
        stops: Sequence[int],
        seeded: bool,
        places: int | None,
        record: Path | None,
    ) -> None:
        self.version = version
        self._engine = engine
        self._sentinels = [core.sentinel for core in cores]
        self._traces = traces
        self._context = context
        self._stops = list(stops)
        self._seeded = seeded
        self._places: AbstractAsyncContextManager[object] = asyncio.Semaphore(places) if places else nullcontext()
        self._record = record
        self._described_adapter: str | None = None
        self._adapter: LoRARequest | None = None
        self._serial = count()
        self._update = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(
        cls,
        model_path: str,
        version: int,
        *,
        dtype: str = "bfloat16",
        max_model_len: int = 2048,
        concurrency: int = 64,
        reserved: int = 0,
        tensor_parallel: int = 1,
        threads: int | None = None,
        kv_cache_gib: float = 1.0,
        seeded: bool = False,
        structured: bool = False,
        adapter: LoraSettings | None = None,
        engine_args: Mapping[str, Any] | None = None,
        record: Path | None = None,
    ) -> "VllmSampler":
        """Starts an engine on the Hugging Face folder `model_path`, whose weights are policy `version`.

        `concurrency` sequences run at once; `reserved` more are for streams alone, which thus never queue behind
        samples. `threads` and `kv_cache_gib` are for the CPU backend. `seeded` draws each answer from a seed made of
        its request id. `structured` lets samplings restrict their answers to `choices`. `engine_args` replace any of
        vLLM's. `record` names the file that lists the engine's processes and shared memory for `sweep`; what an earlier
        engine recorded there is swept first.
        """
        arguments = _arguments(model_path, dtype, max_model_len, concurrency + reserved, tensor_parallel, kv_cache_gib)
        if adapter is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_for(adapter.rank)}
        if structured:  # Grammars are compiled against the engine's own tokenizer.
            arguments["skip_tokenizer_init"] = False
        arguments |= engine_args or {}
        if record is not None:
            sweep(record)
        sockets = tempfile.mkdtemp(prefix=SOCKETS_PREFIX)
        with _environment(threads or len(os.sched_getaffinity(0)), sockets):
            engine, cores, traces = await _start_engine(AsyncEngineArgs(**arguments), sockets, record)
        stops = stop_token_ids(model_path)
        sampler = cls(
            engine,
            version,
            cores,
            traces,
            context=max_model_len,
            stops=stops,
            seeded=seeded,
            places=concurrency if reserved else None,
            record=record,
        )
        if adapter is not None:
            sampler._described_adapter = adapters.describe(adapter)
        await sampler._introduce()
        return sampler

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        """Continues `token_ids`. The prompt's KV is shared with others of the same policy version."""
        self._check_room(token_ids)
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self._stops,
            logprobs=0,
            seed=_seed(request_id) if self._seeded else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(choice=list(sampling.choices)) if sampling.choices else None,
        )
        async with self._places:
            await self._open.wait()
            output = await self._ask(token_ids, params, request_id, salt=f"policy {self.version}")
        return _completion(output.outputs[0])

    async def stream(self, token_ids: Sequence[int], drawing: Drawing, request_id: str) -> AsyncIterator[Delta]:
        """Continues `token_ids`. A token is labelled by the version at which it arrives here; the spans of the last
        delta are vLLM's own."""
        self._check_room(token_ids)
        await self._open.wait()
        params = SamplingParams(
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            max_tokens=min(drawing.max_new_tokens, self._context - len(token_ids)),
            stop_token_ids=self._stops,
            logprobs=drawing.alternatives,
            seed=None if drawing.seed is None else drawing.seed % 2**63,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = TokensPrompt(prompt_token_ids=list(token_ids), cache_salt=f"policy {self.version}")
        outputs = self._engine.generate(prompt, params, request_id, lora_request=self._adapter)

        async def following() -> RequestOutput:
            return await anext(outputs)

        async with aclosing(outputs):
            finished = False
            while not finished:
                output = await self._while_alive(following())
                finished = output.finished
                yield _delta(output.outputs[0], self.version, drawing.alternatives)

    async def load(self, weights: Weights, folder: str) -> LoadReport:
        """Swaps the policy between two steps of the engine; a request that arrives meanwhile waits."""
        async with self._update:
            self._open.clear()
            try:
                report = await self._while_alive(self._swap(weights, folder))
            except BaseException as error:
                # Whatever ended it, a cancellation too: the model may be half of each policy.
                self._die(f"its update to version {weights.version} failed: {error!r}")
                if isinstance(error, Exception):
                    raise EngineDied(self._death.result()) from error
                raise
            finally:
                self._open.set()
            return report

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens 1..T-1 at temperature 1; T must be less than the context."""
        self._check_room(token_ids)
        # vLLM scores prompt tokens before any processor, temperature included, and without reading the cache.
        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"probe-{next(self._serial)}"
        async with self._update:
            output = await self._ask(token_ids, params, name, salt=name)
        scored = zip(token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
        return [float(entry[token].logprob) for token, entry in scored]

    async def alive(self) -> bool:
        if not self._death.done() and self._engine.errored:
            self._die("vLLM reports it as failed")
        return not self._death.done()

    async def close(self) -> None:
        """Ends the engine's processes and removes what they leave. Whoever was waiting gets `EngineDied`."""
        self._die("it was closed")
        if self._engine is None:
            return
        if self._engine.output_handler is not None:
            # Else vLLM takes its own shutdown for a crash and logs it.
            self._engine.output_handler.cancel()
        await asyncio.to_thread(self._engine.shutdown)
        # Collected at the interpreter's exit, its destructor prints a traceback.
        self._engine = None
        gc.collect()
        self._traces.remove()
        if self._record is not None:
            self._record.unlink(missing_ok=True)

    async def _introduce(self) -> None:
        """Watches the engine's child, and labels the first version before any request."""
        for descriptor in self._sentinels:
            asyncio.get_running_loop().add_reader(descriptor, self._die, "its process ended")
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self._engine.update_weight_version(str(self.version))

    async def _swap(self, weights: Weights, folder: str) -> LoadReport:
        engine = self._engine
        begin = perf_counter()
        # `pause_generation` does this and then sleeps for 20 ms, for an order of outputs that we do not need.
        await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        paused = perf_counter()
        if weights.kind == "adapter":
            await self._swap_adapter(weights, folder)
        else:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update_info(weights, folder)))
            await engine.finish_weight_update(weight_version=str(weights.version))
        self.version = weights.version
        loaded = perf_counter()
        await engine.resume_generation()
        return LoadReport(pause_s=paused - begin, load_s=loaded - paused)

    async def _swap_adapter(self, weights: Weights, folder: str) -> None:
        """vLLM reads an adapter from a folder of peft's form: the published segment, and its description beside it."""
        (segment,) = weights.segments
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=self._traces.sockets) as beside:
            (Path(beside) / "adapter_model.safetensors").symlink_to(Path(folder) / segment)
            (Path(beside) / "adapter_config.json").write_text(self._described_adapter or "", encoding="utf-8")
            request = LoRARequest("policy", 1, beside, load_inplace=True)
            if not await self._engine.add_lora(request):
                raise RuntimeError(f"vLLM did not take the adapter of version {weights.version}")
        # What is asked from now on names the adapter that is there; it is not to be read again.
        self._adapter = LoRARequest("policy", 1, folder)
        await self._engine.update_weight_version(str(weights.version))

    async def _ask(self, token_ids: Sequence[int], params: SamplingParams, request_id: str, salt: str) -> RequestOutput:
        prompt = TokensPrompt(prompt_token_ids=list(token_ids), cache_salt=salt)

        async def last() -> RequestOutput:
            async for output in self._engine.generate(prompt, params, request_id, lora_request=self._adapter):
                answer = output
            return answer

        return await self._while_alive(last())

    async def _while_alive(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, or `EngineDied` as soon as the engine is lost: vLLM itself takes seconds."""
        if self._death.done():
            work.close()
            raise EngineDied(self._death.result())
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._death}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                raise EngineDied(self._death.result())
            return await task
        except EngineDeadError as error:
            self._die("vLLM reports it as dead")
            raise EngineDied(self._death.result()) from error
        finally:
            if not task.done():
                task.cancel()
                # The engine forgets the request before anybody goes on; one that is lost may not answer.
                await asyncio.wait({task}, timeout=FORGET_S)

    def _die(self, reason: str) -> None:
        """The first reason stands, and everyone who waits for the engine hears it."""
        if self._death.done():
            return
        for descriptor in self._sentinels:
            asyncio.get_running_loop().remove_reader(descriptor)
        self._death.set_result(f"The engine is lost: {reason}. Start another and load the newest weights.")

    def _check_room(self, token_ids: Sequence[int]) -> None:
        if not 0 < len(token_ids) < self._context:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens, and the context of {self._context} must hold it "
                "and at least one more. Shorten the prompt or raise rollout.max_model_len."
            )


async def _start_engine(
    arguments: AsyncEngineArgs, sockets: str, record: Path | None
) -> tuple[AsyncLLM, list[BaseProcess], Traces]:
    """Starts off the event loop, and records as it goes: an owner killed meanwhile leaves traces too."""
    before = _engine_cores()
    starting = asyncio.ensure_future(asyncio.to_thread(AsyncLLM.from_engine_args, arguments))
    traces = Traces((), (), sockets)
    try:
        while not starting.done():
            await asyncio.wait({starting}, timeout=0.5)
            cores = [core for core in _engine_cores() if core not in before]
            traces = Traces.of(cores, sockets)
            if record is not None:
                traces.save(record)
        return await starting, cores, traces
    except BaseException:
        traces.remove()
        raise


def _engine_cores() -> list[BaseProcess]:
    """This process's children that vLLM started; its workers are their children."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]


def _arguments(
    model_path: str,
    dtype: str,
    max_model_len: int,
    concurrency: int,
    tensor_parallel: int,
    kv_cache_gib: float,
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model_path,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": concurrency,
        "tensor_parallel_size": tensor_parallel,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": "rollcast.vllm_transfer.WorkerExtension",
    }
    if current_platform.is_cpu():
        # A compiled graph keeps the packed weights that it was traced with, and an update frees them.
        # vLLM's blocks of 128 tokens would share no prompt shorter than that among the samples of a group.
        blocks = {"block_size": CPU_BLOCK, "kv_cache_memory_bytes": int(kv_cache_gib * GIB)}
        arguments |= {"enforce_eager": True, **blocks}
        if tensor_parallel == 1:
            # By its name vLLM would replace it by a worker process, on whose answers the engine spins half a core
            # away; what that is for, another number of OpenMP threads, is set in `_environment`.
            arguments["distributed_executor_backend"] = UniProcExecutor
    return arguments


@contextmanager
def _environment(threads: int, sockets: str) -> Iterator[None]:
    """What the engine's processes inherit; a binding that the user chose stays."""
    wanted = {"VLLM_RPC_BASE_PATH": sockets, "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    if current_platform.is_cpu():
        wanted["OMP_NUM_THREADS"] = str(threads)
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _rank_for(rank: int) -> int:
    """The smallest rank that vLLM makes room for and that holds `rank`."""
    return min(int(room) for room in get_args(MaxLoRARanks) if room >= rank)


def _seed(request_id: str) -> int:
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:4], "little")


def _completion(output: CompletionOutput) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, output.logprobs or [], strict=True)]
    return Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), _spans(output), _reason(output))


def _delta(output: CompletionOutput, version: int, alternatives: int) -> Delta:
    tokens = tuple(output.token_ids)
    places = [{number: entry.logprob for number, entry in place.items()} for place in output.logprobs or []]
    others = [sorted(place.items(), key=lambda item: -item[1])[:alternatives] for place in places]
    return Delta(
        tokens,
        tuple(place[token] for token, place in zip(tokens, places, strict=True)),
        (version,) * len(tokens),
        tuple(map(tuple, others)),
        None if output.finish_reason is None else _reason(output),
        None if output.finish_reason is None else _spans(output),
    )


def _spans(output: CompletionOutput) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions or [])


def _reason(output: CompletionOutput) -> FinishReason:
    return "stop" if output.finish_reason == "stop" else "length"
