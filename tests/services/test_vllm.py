"""The vLLM sampler on a real engine: what it samples, how it takes over new weights, and how it dies.

One engine serves the module; a second one, started from the weights that the first was updated to, is the
reference for the update and then the victim of the kill.
"""

import asyncio
import os
import signal
import sys
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from rollcast.sampler import Drawing, EngineDied
from rollcast_learners.arena import Arena, policy_specs
from rollcast_learners.types import Completion, Sampling, Weights
from tiny_model import write_tiny_model

if TYPE_CHECKING:
    from rollcast.vllm_sampler import VllmSampler

pytestmark = pytest.mark.vllm

CONTEXT = 512
EOS = 258
PROBE = [int(token) for token in np.random.default_rng(7).integers(0, 256, 300)]
SHORT = PROBE[:12]
Result = TypeVar("Result")
Run = Callable[[Coroutine[Any, Any, Result]], Result]

SEAM = '''
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from rollcast.vllm_transfer import WorkerExtension


class Extension(WorkerExtension):
    """Reaches into the worker process of the engine under test."""

    def correct_heads(self, on: bool) -> None:
        transfer = self.weight_transfer_engine
        transfer.__dict__.pop("stale_layers", None)
        if not on:
            right = transfer.stale_layers
            transfer.stale_layers = lambda: [x for x in right() if not isinstance(x, ParallelLMHead)]

    def load_in_place(self, on: bool) -> bool:
        before = self.weight_transfer_engine.in_place
        self.weight_transfer_engine.in_place = on
        return before
'''


@dataclass
class Policies:
    """Tiny policies by seed: folders, published weights, and Hugging Face models to hold the engine to."""

    root: Path
    shared: Path
    versions: Iterator[int] = field(default_factory=lambda: count(1))

    def folder(self, seed: int) -> Path:
        folder = self.root / f"policy-{seed}"
        return folder if folder.exists() else write_tiny_model(folder, tied=True, seed=seed)

    def publish(self, seed: int, without: str = "") -> Weights:
        tensors = load_file(self.folder(seed) / "model.safetensors")
        tensors.pop(without, None)
        version = next(self.versions)
        arena = Arena(self.shared / str(version), policy_specs(tensors), segment_bytes=128 << 10)
        segments, manifest = arena.write(version, tensors)
        return Weights("full", version, manifest, segments, home="here", folder=str(arena.folder))

    def logits(self, seed: int, token_ids: Sequence[int]) -> torch.Tensor:
        """At position t the logits of token t + 1."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder(seed), dtype=torch.bfloat16)
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0, :-1].float()
        return logits

    def logprobs(self, seed: int, token_ids: Sequence[int], temperature: float = 1.0) -> np.ndarray[Any, Any]:
        scores = torch.log_softmax(self.logits(seed, token_ids) / temperature, -1)
        targets = torch.tensor(list(token_ids[1:]))
        return scores.gather(-1, targets[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policies]:
    shared = Path(f"/dev/shm/rollcast-test-vllm-{os.getpid()}")
    yield Policies(tmp_path_factory.mktemp("policies"), shared)
    for path in sorted(shared.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if shared.exists():
        shared.rmdir()


def start(policies: Policies, seed: int, **settings: Any) -> Coroutine[Any, Any, "VllmSampler"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, at import
        from rollcast.vllm_sampler import VllmSampler
    return VllmSampler.start(
        str(policies.folder(seed)), 0, max_model_len=CONTEXT, concurrency=16, reserved=4, threads=1, **settings
    )


@pytest.fixture(scope="module")
def engine(policies: Policies, run: Run[Any]) -> Iterator["VllmSampler"]:
    (policies.root / "rollcast_test_seam.py").write_text(SEAM)
    sys.path.insert(0, str(policies.root))
    extension = {"worker_extension_cls": "rollcast_test_seam.Extension"}
    sampler = run(start(policies, seed=0, engine_args=extension, structured=True))
    sys.path.remove(str(policies.root))
    yield sampler
    run(sampler.close())
    assert not [segment for segment in sampler._traces.segments if Path(segment).exists()]
    assert not [process for process in sampler._traces.processes if process.is_running()]
    assert len(sampler._traces.processes) == 1, "the model runs in the engine's own process"
    assert not Path(sampler._traces.sockets).exists()


@pytest.fixture(scope="module")
def record(policies: Policies) -> Path:
    return policies.root / "engine.json"


@pytest.fixture(scope="module")
def fresh(policies: Policies, run: Run[Any], record: Path) -> Iterator["VllmSampler"]:
    """With a worker process, as an engine over several devices has: only those share memory that can be left behind."""
    sampler = run(start(policies, seed=1, record=record, engine_args={"distributed_executor_backend": "mp"}))
    yield sampler
    run(sampler.close())


def update(run: Run[Any], engine: "VllmSampler", policies: Policies, seed: int) -> Weights:
    weights = policies.publish(seed)
    report = run(engine.load(weights, weights.folder))
    assert engine.version == weights.version
    assert report.pause_s > 0 and report.load_s > 0
    return weights


def gap(left: Sequence[float], right: Sequence[float]) -> float:
    return float(np.abs(np.asarray(left) - np.asarray(right)).max())


def answer(run: Run[Any], engine: "VllmSampler", prompt: Sequence[int], sampling: Sampling) -> Completion:
    completion: Completion = run(engine.sample(prompt, sampling, f"answer-{next(SERIAL)}"))
    return completion


SERIAL = count()


def scored(
    policies: Policies, seed: int, prompt: Sequence[int], answer: Completion, temperature: float = 1.0
) -> np.ndarray[Any, Any]:
    """The Hugging Face model's log-probabilities of an answer."""
    return policies.logprobs(seed, [*prompt, *answer.token_ids_T.tolist()], temperature)[len(prompt) - 1 :]


def test_probe_equals_the_hugging_face_model(engine: "VllmSampler", policies: Policies, run: Run[Any]) -> None:
    assert gap(run(engine.logprobs(PROBE)), policies.logprobs(0, PROBE)) < 0.08
    assert run(engine.logprobs([5])) == []


def test_greedy_takes_the_most_likely_token(engine: "VllmSampler", policies: Policies, run: Run[Any]) -> None:
    update(run, engine, policies, seed=0)
    greedy = answer(run, engine, SHORT, Sampling(temperature=0, max_new_tokens=32))
    logits = policies.logits(0, [*SHORT, *greedy.token_ids_T.tolist()])[len(SHORT) - 1 :]
    best = torch.log_softmax(logits, -1).max(-1).values.numpy()
    assert gap(scored(policies, 0, SHORT, greedy).tolist(), best.tolist()) < 0.05
    assert gap(greedy.logprobs_T.tolist(), best.tolist()) < 0.05


def test_logprobs_are_of_the_distribution_sampled_from(
    engine: "VllmSampler", policies: Policies, run: Run[Any]
) -> None:
    update(run, engine, policies, seed=0)
    sampled = answer(run, engine, SHORT, Sampling(temperature=0.5, max_new_tokens=64))
    assert gap(sampled.logprobs_T.tolist(), scored(policies, 0, SHORT, sampled, 0.5).tolist()) < 0.15
    assert gap(sampled.logprobs_T.tolist(), scored(policies, 0, SHORT, sampled, 1.0).tolist()) > 0.5


def test_answers_end_with_the_end_token_or_by_length(engine: "VllmSampler", run: Run[Any]) -> None:
    async def many() -> list[Completion]:
        sampling = Sampling(temperature=1.0, max_new_tokens=400)
        return await asyncio.gather(*[engine.sample(SHORT, sampling, f"end-{i}") for i in range(16)])

    answers = run(many())
    assert {completion.finish_reason for completion in answers} == {"stop", "length"}
    for completion in answers:
        ends = np.flatnonzero(completion.token_ids_T == EOS).tolist()
        last = len(completion.token_ids_T) - 1
        assert ends == ([last] if completion.finish_reason == "stop" else [])
        assert last == 399 or completion.finish_reason == "stop"


def test_a_served_answer_does_not_queue_behind_samples(engine: "VllmSampler", run: Run[Any]) -> None:
    async def served() -> int:
        """How many of the samples asked before it were through when its first token came."""
        sampling = Sampling(temperature=1.0, max_new_tokens=100)
        rollouts = [asyncio.ensure_future(engine.sample(SHORT, sampling, f"rollout-{i}")) for i in range(48)]
        await asyncio.sleep(0)
        first = None
        async for _ in engine.stream(SHORT, Drawing(1.0, 100), "served"):
            first = sum(rollout.done() for rollout in rollouts) if first is None else first
        assert not all(rollout.done() for rollout in rollouts)
        await asyncio.gather(*rollouts)
        assert first is not None
        return first

    assert run(served()) < 16, "in their queue it would have come after 29"


def test_answers_can_be_restricted_to_choices(engine: "VllmSampler", policies: Policies, run: Run[Any]) -> None:
    """vLLM's structured output, on request: a random model answers a label, and ends its answer after it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policies.folder(0))

    def text(answer: Completion) -> str:
        return str(tokenizer.decode(answer.token_ids_T.tolist(), skip_special_tokens=True))

    labels = ("positive", "negative", "neutral")
    restricted = Sampling(1.0, 32, choices=labels)
    answers = [run(engine.sample(SHORT, restricted, f"choice-{number}")) for number in range(6)]
    said = [text(answer) for answer in answers]
    assert set(said) <= set(labels) and len(set(said)) > 1
    assert all(answer.finish_reason == "stop" and answer.token_ids_T[-1] == EOS for answer in answers)
    free = run(engine.sample(SHORT, Sampling(1.0, 32), "free"))
    assert text(free) not in labels


def test_a_prompt_must_fit_the_context(engine: "VllmSampler", run: Run[Any]) -> None:
    prompt = [1] * CONTEXT
    with pytest.raises(ValueError, match="512 tokens"):
        answer(run, engine, prompt, Sampling(1.0, 8))
    with pytest.raises(ValueError, match="512 tokens"):
        run(engine.logprobs(prompt))
    with pytest.raises(ValueError, match="0 tokens"):
        run(engine.logprobs([]))
    longest = answer(run, engine, prompt[:-3], Sampling(1.0, 8))
    assert (len(longest.token_ids_T) == 3 and longest.finish_reason == "length") or EOS in longest.token_ids_T


def test_an_update_in_mid_answer_labels_every_token(engine: "VllmSampler", policies: Policies, run: Run[Any]) -> None:
    first = update(run, engine, policies, seed=0).version
    second = policies.publish(1)

    async def answer_and_load() -> list[Completion]:
        sampling = Sampling(temperature=1.0, max_new_tokens=480)
        answers = [asyncio.ensure_future(engine.sample(SHORT, sampling, f"flight-{i}")) for i in range(12)]
        await asyncio.sleep(0.4)
        await engine.load(second, second.folder)
        return list(await asyncio.gather(*answers))

    completions = run(answer_and_load())
    for completion in completions:
        edges = [0, *(span.end for span in completion.spans)]
        assert [span.start for span in completion.spans] == edges[:-1]
        assert edges[-1] == len(completion.token_ids_T) == len(completion.logprobs_T)
        assert all(before < after for before, after in pairwise(edges))
    versions = [[span.version for span in completion.spans] for completion in completions]
    assert [first, second.version] in versions, "no answer spans the update"


def test_an_updated_engine_equals_a_fresh_one(
    engine: "VllmSampler", fresh: "VllmSampler", policies: Policies, run: Run[Any]
) -> None:
    update(run, engine, policies, seed=2)
    update(run, engine, policies, seed=1)
    updated = run(engine.logprobs(PROBE))
    assert gap(updated, run(fresh.logprobs(PROBE))) < 1e-3
    assert gap(updated, policies.logprobs(1, PROBE)) < 0.08
    assert gap(updated, policies.logprobs(2, PROBE)) > 1


def test_without_its_correction_a_tied_head_keeps_the_old_policy(
    engine: "VllmSampler", fresh: "VllmSampler", policies: Policies, run: Run[Any]
) -> None:
    right = run(fresh.logprobs(PROBE))
    assert run(engine._engine.collective_rpc("load_in_place", args=(True,))) == [True]
    for in_place in (True, False):
        run(engine._engine.collective_rpc("load_in_place", args=(in_place,)))
        update(run, engine, policies, seed=2)
        run(engine._engine.collective_rpc("correct_heads", args=(False,)))
        update(run, engine, policies, seed=1)
        stale = gap(run(engine.logprobs(PROBE)), right)
        run(engine._engine.collective_rpc("correct_heads", args=(True,)))
        update(run, engine, policies, seed=1)
        # A packed copy is kept only by processors that multiply bfloat16 themselves; others read the weight as it is.
        assert stale > 0.5 or not torch.cpu._is_avx512_bf16_supported()
        assert gap(run(engine.logprobs(PROBE)), right) < 1e-3


def test_cached_prompts_are_of_one_version(
    engine: "VllmSampler", policies: Policies, run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=4)
    old = update(run, engine, policies, seed=0).version
    before = answer(run, engine, PROBE, greedy)
    assert gap(before.logprobs_T.tolist(), scored(policies, 0, PROBE, before).tolist()) < 0.08
    update(run, engine, policies, seed=1)
    after = answer(run, engine, PROBE, greedy)
    assert gap(after.logprobs_T.tolist(), scored(policies, 1, PROBE, after).tolist()) < 0.08
    monkeypatch.setattr(engine, "version", old)
    stale = answer(run, engine, PROBE, greedy)
    assert gap(stale.logprobs_T.tolist(), scored(policies, 1, PROBE, stale).tolist()) > 0.2


def test_a_killed_engine_is_noticed_and_swept(fresh: "VllmSampler", record: Path, run: Run[Any]) -> None:
    from rollcast.engine_traces import sweep

    core = next(process for process in fresh._traces.processes if "EngineCore" in process.name())

    async def kill_in_mid_answer() -> None:
        answering = asyncio.ensure_future(fresh.sample(SHORT, Sampling(1.0, 480), "victim"))
        await asyncio.sleep(0.2)
        os.kill(core.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(EngineDied, match="process ended"):
                await answering

    run(kill_in_mid_answer())
    assert not run(fresh.alive())
    with pytest.raises(EngineDied):
        answer(run, fresh, SHORT, Sampling(1.0, 4))
    with pytest.raises(EngineDied):
        run(fresh.logprobs(PROBE))
    segments = sweep(record)
    assert segments and not [segment for segment in segments if Path(segment).exists()]
    _, left = psutil.wait_procs(fresh._traces.processes, timeout=10)
    assert not left and not record.exists()
    assert sweep(record) == []


def test_a_failed_update_ends_the_engine(engine: "VllmSampler", policies: Policies, run: Run[Any]) -> None:
    run(engine._engine.collective_rpc("load_in_place", args=(True,)))
    assert run(engine.alive())
    weights = policies.publish(2, without="model.layers.1.mlp.down_proj.weight")

    async def fail_in_mid_answer() -> None:
        # Several, since any of them may happen to have ended before the update begins.
        answering = [
            asyncio.ensure_future(engine.sample(SHORT, Sampling(1.0, 480), f"bystander-{i}")) for i in range(12)
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(EngineDied, match=r"layers\.1\.mlp\.down_proj\.weight without weights"):
            await engine.load(weights, weights.folder)
        ends = await asyncio.gather(*answering, return_exceptions=True)
        died = [end for end in ends if isinstance(end, EngineDied)]
        assert died and all(f"version {weights.version} failed" in str(end) for end in died)
        assert len(died) + sum(isinstance(end, Completion) for end in ends) == len(ends)

    run(fail_in_mid_answer())
    assert not run(engine.alive())
