"""The shipped scripted engine keeps the promises of the seam: spans, context, loads, and the same answer again."""

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollcast.sampler import Sampler, ScriptedSampler, spans_of
from rollcast_learners.types import Completion, Sampling, VersionSpan, Weights

EOS = 99
GREEDY = Sampling(0.0, 16)
PROMPT = [1, 2, 3]


def policy(version: int) -> Weights:
    return Weights("full", version, (), (), "", "")


def seven(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
    return [7] * 5


def sample(sampler: Sampler, sampling: Sampling = GREEDY, request_id: str = "0") -> Completion:
    return asyncio.run(sampler.sample(PROMPT, sampling, request_id))


def test_a_script_is_said_and_ended() -> None:
    answer = sample(ScriptedSampler(EOS, seven))
    assert answer.token_ids_T.tolist() == [7] * 5 + [EOS] and answer.finish_reason == "stop"
    assert answer.spans == (VersionSpan(-1, 0, 6),) and len(answer.logprobs_T) == 6


@pytest.mark.parametrize(("room", "context", "length"), [(3, 512, 3), (5, 512, 5), (6, 512, 6), (16, 7, 4), (16, 4, 1)])
def test_an_answer_fits_what_was_allowed_and_what_is_left(room: int, context: int, length: int) -> None:
    answer = sample(ScriptedSampler(EOS, seven, max_model_len=context), Sampling(1.0, room))
    assert len(answer.token_ids_T) == length
    assert answer.finish_reason == ("stop" if length == 6 else "length")


@pytest.mark.parametrize("context", [3, 2])
def test_a_prompt_that_leaves_no_room_is_refused(context: int) -> None:
    with pytest.raises(ValueError, match=f"3 tokens does not fit a context of {context}"):
        sample(ScriptedSampler(EOS, max_model_len=context))


def test_a_request_id_stands_for_one_answer() -> None:
    answers = {name: sample(ScriptedSampler(EOS), GREEDY, name).token_ids_T.tolist() for name in "abcdefgh"}
    again = {name: sample(ScriptedSampler(EOS), GREEDY, name).token_ids_T.tolist() for name in "abcdefgh"}
    assert answers == again and len(set(map(tuple, answers.values()))) > 1
    assert all(set(ids[:-1]) <= set(PROMPT) for ids in answers.values()), "babble stays in the vocabulary"


def test_a_load_pauses_every_answer_and_they_go_on() -> None:
    async def go() -> list[Completion]:
        began = asyncio.Event()

        def script(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
            began.set()
            return [7] * 50

        sampler = ScriptedSampler(EOS, script, seconds_per_token=0.004, seconds_to_load=0.02)
        await sampler.load(policy(3), "")
        answers = [asyncio.create_task(sampler.sample(PROMPT, Sampling(1.0, 64), str(number))) for number in range(3)]
        await began.wait()
        await asyncio.sleep(0.02)
        report = await sampler.load(policy(4), "")
        assert report.load_s == 0.02 and sampler.version == 4 and await sampler.alive()
        return await asyncio.gather(*answers)

    for answer in asyncio.run(go()):
        assert [span.version for span in answer.spans] == [3, 4]
        assert answer.spans[0].end == answer.spans[1].start and answer.spans[1].end == 51


def test_log_probabilities_are_of_all_but_the_first_token() -> None:
    assert asyncio.run(ScriptedSampler(EOS).logprobs(PROMPT)) == [-1.0, -1.0]


@given(st.lists(st.integers(0, 3)))
def test_spans_are_the_runs_of_equal_versions(versions: list[int]) -> None:
    spans = spans_of(versions)
    assert [span.version for span in spans for _ in range(span.start, span.end)] == versions
    assert all(a.end == b.start and a.version != b.version for a, b in pairwise(spans))
