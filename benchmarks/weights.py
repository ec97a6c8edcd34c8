"""What a policy update costs: publish, digest and scan, engine ready, pause. Prints one JSON object.

    python benchmarks/weights.py [--gb 0.27] [--rounds 7] [--no-engine]

Publish is told as a ratio to plain copies on one thread, all in each round, as the median of the rounds' ratios:
machines are shared, and a ratio of neighbours stands where seconds drift. `memcpy` is one block as large as the
policy, which the C library writes past the cache; `tensor_copies` are the policy's own tensors one by one.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measuring import finish

from rollcast_learners.arena import Arena, one_thread_each, open_tensors, policy_specs
from rollcast_learners.segments import examine, validate
from rollcast_learners.types import Sampling, Weights

ANSWERS = 64
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LAYER_BYTES = 2 * (576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3 + 576 * 2)
EMBEDDING_BYTES = 2 * 49152 * 576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.27, help="policy size; 0.27 is SmolLM2-135M in bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-engine", action="store_true", help="skip what needs vLLM")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/weights-DATE.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollcast-bench-") as folder:
        figures = measure(Path(folder), options.gb, options.rounds, not options.no_engine)
    told = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}
    finish("weights", told | figures, options.write)


def measure(folder: Path, gigabytes: float, rounds: int, with_engine: bool) -> dict[str, Any]:
    tensors = write_policy(folder, gigabytes)
    arena = Arena(Path(f"/dev/shm/rollcast-bench-{os.getpid()}"), policy_specs(tensors))
    before = os.getloadavg()[0]
    try:
        figures = measure_publish(arena, tensors, rounds)
        if with_engine:
            figures |= asyncio.run(measure_engine(folder, arena, tensors, rounds))
    finally:
        arena.close()
    load = {"load_average_before": round(before, 2), "load_average_after": round(os.getloadavg()[0], 2)}
    return {"gb": round(arena.nbytes / 1e9, 3), "cores": os.cpu_count(), **load, **figures}


def write_policy(folder: Path, gigabytes: float) -> dict[str, torch.Tensor]:
    """A random model of SmolLM2's shape, with as many layers as the size asks for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round((gigabytes * 1e9 - EMBEDDING_BYTES) / LAYER_BYTES))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SMOLLM2)).bfloat16()
    model.save_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def measure_publish(arena: Arena, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    source, target = np.ones(arena.nbytes, np.uint8), np.ones(arena.nbytes, np.uint8)
    buffers = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    copies, tensor_copies, publishes, checks = [], [], [], []
    for version in range(rounds + 1):
        begin = perf_counter()
        np.copyto(target, source)
        copied = perf_counter()
        copy_each(buffers, tensors)
        copied_each = perf_counter()
        weights = publish_and_open(arena, version, tensors)
        published = perf_counter()
        check(arena, weights)
        checks.append(perf_counter() - published)
        publishes.append(published - copied_each)
        tensor_copies.append(copied_each - copied)
        copies.append(copied - begin)
        arena.retire(version)
    checked = publish(arena, rounds + 1, tensors, digest=True)
    begin = perf_counter()
    validate(checked, arena.folder, arena.specs)
    validated = perf_counter() - begin
    arena.retire(rounds + 1)
    # The first round is left out: its pages are new, and every later one reuses them.
    to_block = [new / old for new, old in zip(publishes[1:], copies[1:], strict=True)]
    to_tensors = [new / old for new, old in zip(publishes[1:], tensor_copies[1:], strict=True)]
    gigabytes = arena.nbytes / 1e9
    return {
        "memcpy_s_per_gb": per_gb(copies[1:], gigabytes),
        "publish_s_per_gb": per_gb(publishes[1:], gigabytes),
        "publish_first_s_per_gb": round(publishes[0] / gigabytes, 4),
        "publish_over_memcpy": round(median(to_block), 3),
        "publish_over_memcpy_rounds": [round(ratio, 2) for ratio in to_block],
        "publish_over_tensor_copies": round(median(to_tensors), 3),
        "digest_and_finiteness_s_per_gb": per_gb(checks[1:], gigabytes),
        "validate_s_per_gb": round(validated / gigabytes, 4),
    }


def publish(arena: Arena, version: int, tensors: dict[str, torch.Tensor], digest: bool) -> Weights:
    segments, manifest = arena.write(version, tensors, digest=digest, scan=digest)
    return Weights("full", version, manifest, segments, home="here", folder=str(arena.folder))


def copy_each(targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> None:
    with one_thread_each():
        for name, target in targets.items():
            target.copy_(sources[name])


def publish_and_open(arena: Arena, version: int, tensors: dict[str, torch.Tensor]) -> Weights:
    weights = publish(arena, version, tensors, digest=False)
    open_tensors(weights, arena.folder)
    return weights


def check(arena: Arena, weights: Weights) -> None:
    opened = open_tensors(weights, arena.folder)
    parts = [(spec, opened[spec.name].view(-1).view(torch.uint8).numpy()) for spec in arena.specs]
    assert all(finite for _, finite in examine(parts, digest=True, scan=True))


async def measure_engine(folder: Path, arena: Arena, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    from rollcast.vllm_sampler import VllmSampler

    begin = perf_counter()
    sampler = await VllmSampler.start(str(folder), 0, max_model_len=512, concurrency=ANSWERS)
    started = perf_counter() - begin
    try:
        await answer_all(sampler, 8)
        at_start, _ = await answer_all(sampler, 32)
        idle = [(await load_next(sampler, arena, tensors, 100 + n)).load_s for n in range(rounds + 1)]
        await answer_all(sampler, 8)
        updated, _ = await answer_all(sampler, 32)
        pauses = await measure_pauses(sampler, arena, tensors, rounds)
    finally:
        await sampler.close()
    return {
        "engine_start_s": round(started, 1),
        "engine_ready_first_s_per_gb": per_gb(idle[:1], arena.nbytes / 1e9),
        "engine_ready_s_per_gb": per_gb(idle[1:], arena.nbytes / 1e9),
        "tokens_per_s_at_start": round(at_start),
        "tokens_per_s_after_updates": round(updated),
        **pauses,
    }


async def load_next(sampler: Any, arena: Arena, tensors: dict[str, torch.Tensor], version: int) -> Any:
    weights = publish(arena, version, tensors, digest=False)
    report = await sampler.load(weights, weights.folder)
    arena.retire(version)
    return report


async def answer_all(sampler: Any, new_tokens: int) -> tuple[float, float]:
    """Tokens a second and seconds a step with all answers in flight."""
    begin = perf_counter()
    sampling = Sampling(temperature=1.0, max_new_tokens=new_tokens)
    prompts = [[1 + n, *range(100, 130)] for n in range(ANSWERS)]
    answers = await asyncio.gather(
        *[sampler.sample(prompt, sampling, f"{begin}-{n}") for n, prompt in enumerate(prompts)]
    )
    took = perf_counter() - begin
    return sum(len(answer.token_ids_T) for answer in answers) / took, took / new_tokens


async def measure_pauses(sampler: Any, arena: Arena, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Updates at odd moments of long answers. The step in flight ends at a random point of the wait."""
    reports, step_s = [], []
    for n in range(rounds):
        answering = asyncio.ensure_future(answer_all(sampler, 24))
        await asyncio.sleep(1.0 + 0.037 * n)
        reports.append(await load_next(sampler, arena, tensors, 200 + n))
        step_s.append((await answering)[1])
    waits = [report.pause_s for report in reports]
    step = median(step_s)
    return {
        "pause_ms": [round(1000 * wait, 1) for wait in waits],
        "step_ms": round(1000 * step, 1),
        "pause_beyond_a_step_ms": round(1000 * max(0.0, max(waits) - step), 1),
        "load_in_flight_s_per_gb": per_gb([report.load_s for report in reports], arena.nbytes / 1e9),
    }


def per_gb(times: list[float], gigabytes: float) -> float:
    return round(median(times) / gigabytes, 4)


if __name__ == "__main__":
    main()
