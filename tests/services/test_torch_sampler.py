"""The plain torch engine against Hugging Face itself: tokens, log-probabilities, and weights swapped in mid-answer."""

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rollcast.torch_sampler import TorchSampler
from rollcast_learners.arena import Arena, policy_specs
from rollcast_learners.types import Completion, Sampling, Weights
from tiny_model import write_tiny_model

EOS = 258
PROMPT = [257, 45, 12, 200, 7, 99]
GREEDY = Sampling(0.0, 48)
CONTEXT = 512


class Policies(NamedTuple):
    """Two models of one shape, and the second one as published weights."""

    first: Path
    second: Path
    published: Weights


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def policies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policies]:
    folder = tmp_path_factory.mktemp("policies")
    first, second = (
        write_tiny_model(folder / str(seed), tied=request.param, seed=seed, dtype="float32") for seed in (1, 2)
    )
    tensors = model(second).state_dict()
    arena = Arena(folder / "arena", policy_specs(tensors))
    segments, manifest = arena.write(1, tensors)
    yield Policies(first, second, Weights("full", 1, manifest, segments, "here", str(arena.folder)))
    arena.close()


@pytest.fixture
def sampler(policies: Policies) -> Iterator[TorchSampler]:
    sampler = TorchSampler(str(policies.first), "float32", CONTEXT)
    yield sampler
    asyncio.run(sampler.close())


def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def sample(sampler: TorchSampler, sampling: Sampling, request_id: str = "0") -> Completion:
    return run(sampler.sample(PROMPT, sampling, request_id))


@torch.no_grad()
def scores(folder: Path, token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of every token after the first, by one forward pass."""
    ids_T = torch.tensor(token_ids)
    logits_TV = model(folder)(ids_T[None]).logits[0, :-1] / temperature
    return torch.log_softmax(logits_TV, -1).gather(-1, ids_T[1:, None]).squeeze(-1)


def test_greedy_is_what_hugging_face_generates(sampler: TorchSampler, policies: Policies) -> None:
    answer = sample(sampler, GREEDY)
    generated = model(policies.first).generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 6), do_sample=False, max_new_tokens=48
    )
    assert answer.token_ids_T.tolist() == generated[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_of_the_tempered_distribution(
    sampler: TorchSampler, policies: Policies, temperature: float
) -> None:
    answer = sample(sampler, Sampling(temperature, 32))
    whole = scores(policies.first, [*PROMPT, *answer.token_ids_T.tolist()], temperature)
    np.testing.assert_allclose(answer.logprobs_T, whole[len(PROMPT) - 1 :], atol=1e-4)


def test_samples_follow_the_distribution(sampler: TorchSampler, policies: Policies) -> None:
    one = Sampling(0.7, 1)

    async def draw() -> list[Completion]:
        return await asyncio.gather(*[sampler.sample(PROMPT, one, str(i)) for i in range(600)])

    drawn = [answer.token_ids_T.item() for answer in run(draw())]
    with torch.no_grad():
        logits_V = model(policies.first)(torch.tensor([PROMPT])).logits[0, -1]
    expected_V = torch.softmax(logits_V / 0.7, -1)
    top = int(expected_V.argmax())
    sigma = float((expected_V[top] * (1 - expected_V[top]) / 600) ** 0.5)
    assert drawn.count(top) / 600 == pytest.approx(float(expected_V[top]), abs=4 * sigma + 0.002)


def test_a_request_id_stands_for_one_answer(sampler: TorchSampler) -> None:
    async def together() -> list[list[int]]:
        answers = [sampler.sample(PROMPT, Sampling(1.0, 16), name) for name in ("a", "b", "a")]
        return [answer.token_ids_T.tolist() for answer in await asyncio.gather(*answers)]

    first, other, again = run(together())
    assert first == again != other
    assert sample(sampler, Sampling(1.0, 16), "a").token_ids_T.tolist() == first


def test_log_probabilities_equal_the_model_s(sampler: TorchSampler, policies: Policies) -> None:
    ids = [*PROMPT, 31, 32, EOS, 1]
    scored = run(sampler.logprobs(ids))
    assert len(scored) == len(ids) - 1
    np.testing.assert_allclose(scored, scores(policies.first, ids), atol=1e-5)


def test_an_answer_ends_where_the_model_ends_it(sampler: TorchSampler) -> None:
    async def many() -> list[Completion]:
        return await asyncio.gather(*[sampler.sample(PROMPT, Sampling(30.0, 60), str(i)) for i in range(24)])

    answers = run(many())
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert ended, "almost uniform: one in 260 tokens ends the answer"
    for answer in answers:
        ids = answer.token_ids_T.tolist()
        assert EOS not in ids[:-1] and (ids[-1] == EOS) is (answer.finish_reason == "stop")
        assert len(ids) == 60 or answer.finish_reason == "stop"


def test_loaded_weights_equal_a_fresh_start_from_them(sampler: TorchSampler, policies: Policies) -> None:
    before = run(sampler.logprobs(PROMPT))
    report = run(sampler.load(policies.published, policies.published.folder))
    assert sampler.version == 1 and report.pause_s >= 0 and report.load_s > 0
    after = run(sampler.logprobs(PROMPT))
    np.testing.assert_allclose(after, scores(policies.second, PROMPT), atol=1e-5)
    assert not np.allclose(before, after, atol=0.1)


def test_a_load_in_mid_answer_leaves_two_spans(sampler: TorchSampler, policies: Policies) -> None:
    async def go() -> Completion:
        answer = asyncio.create_task(sampler.sample(PROMPT, Sampling(1.0, 400), "7"))
        before = asyncio.create_task(sampler.sample(PROMPT, Sampling(0.0, 1), "8"))
        await before
        await sampler.load(policies.published, policies.published.folder)
        return await answer

    answer = run(go())
    old, new = answer.spans
    assert (old.version, new.version) == (-1, 1)
    assert 0 == old.start < old.end == new.start < new.end == len(answer.token_ids_T)
    # Up to the load, and no further, the tokens are the first policy's.
    said = [*PROMPT, *answer.token_ids_T.tolist()]
    first = scores(policies.first, said)[len(PROMPT) - 1 :].numpy()
    np.testing.assert_allclose(answer.logprobs_T[: old.end], first[: old.end], atol=1e-4)
    assert abs(answer.logprobs_T[new.start :] - first[new.start :]).mean() > 0.1


def test_a_prompt_that_leaves_no_room_is_refused(sampler: TorchSampler) -> None:
    with pytest.raises(ValueError, match="512 tokens does not fit a context of 512"):
        run(sampler.sample([1] * CONTEXT, GREEDY, "0"))
    full = run(sampler.sample([1] * (CONTEXT - 1), GREEDY, "0"))
    assert len(full.token_ids_T) == 1 and run(sampler.alive())
