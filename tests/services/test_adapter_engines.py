"""Published adapters in both engines: after each one sampler and learner agree, and every token tells its version."""

import asyncio
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollcast.sampler import Sampler
from rollcast.torch_sampler import TorchSampler
from rollcast_learners.arena import Arena, open_tensors, policy_specs
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.settings import LoraSettings
from rollcast_learners.types import Completion, Sampling, Weights

LORA = LoraSettings(rank=4, alpha=8)
CONTEXT = 384
PROBE = [int(token) for token in np.random.default_rng(7).integers(0, 256, 300)]
Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Learner:
    """A policy with an adapter, and what it publishes."""

    def __init__(self, folder: str, root: Path) -> None:
        self.policy = Policy(PolicySettings(folder, "float32", "none", adapter=LORA))
        self.root = root
        self.version = 0

    def publish(self, seed: int) -> Weights:
        """Adapter `seed`: its B drawn anew, and zero for seed 0, as at the start of a run."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if "lora_B" in name:
                    drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if seed else 0.0)
                    parameter.copy_(drawn)
        self.version += 1
        tensors = dict(self.policy.published())
        arena = Arena(self.root / str(self.version), policy_specs(tensors))
        segments, manifest = arena.write(self.version, tensors)
        return Weights("adapter", self.version, manifest, segments, "here", str(arena.folder))

    def logprobs(self, token_ids: list[int]) -> np.ndarray[Any, Any]:
        return self.policy.score_rows(torch.tensor([token_ids]))[0].numpy()


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def learner(tiny_fp32: str, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return Learner(tiny_fp32, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest, run: Run, tiny_fp32: str) -> Iterator[Sampler]:
    if request.param == "torch":
        made: Sampler = TorchSampler(tiny_fp32, "float32", CONTEXT, adapter=LORA)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own, at import
            from rollcast.vllm_sampler import VllmSampler
        options: dict[str, Any] = {"dtype": "float32", "max_model_len": CONTEXT, "concurrency": 16, "threads": 1}
        made = run(VllmSampler.start(tiny_fp32, -1, adapter=LORA, **options))
    yield made
    run(made.close())


def gap(engine: Sampler, learner: Learner, run: Run) -> float:
    return float(np.abs(np.array(run(engine.logprobs(PROBE))) - learner.logprobs(PROBE)).max())


def test_after_every_load_sampler_and_learner_agree(engine: Sampler, learner: Learner, run: Run) -> None:
    for seed in (0, 1, 2):
        weights = learner.publish(seed)
        before = None if engine.version < 0 else gap(engine, learner, run)
        report = run(engine.load(weights, weights.folder))
        assert engine.version == weights.version and report.load_s > 0
        assert gap(engine, learner, run) < 1e-3
        assert before is None or before > 0.05, "the adapter before was another policy"


def test_answers_in_flight_go_on_and_tell_their_versions(engine: Sampler, learner: Learner, run: Run) -> None:
    first = learner.publish(1)
    run(engine.load(first, first.folder))
    second = learner.publish(2)

    async def answer_and_load() -> list[Completion]:
        sampling = Sampling(temperature=1.0, max_new_tokens=300)
        answers = [asyncio.ensure_future(engine.sample(PROBE[:12], sampling, f"flight-{i}")) for i in range(8)]
        await asyncio.sleep(0.3)
        await engine.load(second, second.folder)
        return list(await asyncio.gather(*answers))

    completions = run(answer_and_load())
    seen = {span.version for completion in completions for span in completion.spans}
    assert seen <= {first.version, second.version} and second.version in seen
    assert any(len(completion.spans) == 2 for completion in completions)
    fresh = run(engine.sample(PROBE[:12], Sampling(1.0, 32), "fresh"))
    said = [*PROBE[:12], *fresh.token_ids_T.tolist()]
    theirs = learner.logprobs(said)[11:]
    np.testing.assert_allclose(fresh.logprobs_T, theirs, atol=1e-3)


def test_an_adapter_is_a_small_part_of_its_model(learner: Learner) -> None:
    """Counted on the shapes of SmolLM2-135M: less than 2 % of the bytes at rank 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rollcast_learners import adapters

    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shapes, **heads)).bfloat16()
    whole = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        adapters.inject(model, LoraSettings(rank=8))
    alone = sum(tensor.numel() for _, tensor in adapters.trained(model))
    assert 0 < alone / whole < 0.02
    weights = learner.publish(1)
    assert weights.nbytes == sum(t.numel() * t.element_size() for t in open_tensors(weights, weights.folder).values())
