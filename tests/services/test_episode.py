"""Episodes from prompt to trajectory: turns and rewards in place, version spans, retries, and every bad ending."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import faulty_envs
from rollcast.chat import ChatCodec
from rollcast.environments import EnvironmentPool
from rollcast.episode import EpisodeLimits, play
from rollcast.sampler import EngineDied, ScriptedSampler
from rollcast_envs.tasks.qa import QAEnv
from rollcast_learners.batch import NO_ROW, collate, usable
from rollcast_learners.types import Completion, Prompt, Sampling, Trajectory, VersionSpan, Weights
from tiny_model import CHAT_TEMPLATE, write_tiny_model

EOS = 258
SAMPLING = Sampling(1.0, 64)
LIMITS = EpisodeLimits(max_turns=8, max_attempts=3)
TURNS = Prompt("4.1.0", "4", "faulty/Turns-v0", 5)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    return ChatCodec.from_folder(str(write_tiny_model(tmp_path_factory.mktemp("episode"))))


def policy(version: int) -> Weights:
    return Weights("full", version, (), (), "here", "/nowhere")


def saying(codec: ChatCodec, answer: Callable[[str], str]) -> Callable[..., list[int]]:
    """A script that answers the text of the last user turn."""

    def script(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
        text = codec.tokenizer.decode(list(token_ids))
        question = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        ids: list[int] = codec.tokenizer.encode(answer(question), add_special_tokens=False)
        return ids

    return script


def playing(
    codec: ChatCodec,
    prompt: Prompt,
    sampler: ScriptedSampler | None = None,
    limits: EpisodeLimits = LIMITS,
    sampling: Sampling = SAMPLING,
    timeout_s: float = 5.0,
) -> Trajectory:
    async def go() -> Trajectory:
        pool = EnvironmentPool(timeout_s)
        engine = sampler or ScriptedSampler(EOS, saying(codec, lambda question: f"to {question}"))
        await engine.load(policy(0), "")
        try:
            return await play(prompt, pool, engine, codec, sampling, limits)
        finally:
            pool.close()

    return asyncio.run(go())


def test_three_turns_leave_one_stream_with_every_reward_in_its_place(codec: ChatCodec) -> None:
    trajectory = playing(codec, TURNS)
    assert trajectory.error is None and trajectory.terminated and not trajectory.truncated
    assert trajectory.prompt is TURNS and usable(trajectory)
    assert trajectory.kind == "turns" and trajectory.metrics == {"answers": 3}
    (stream,) = trajectory.streams
    assert [turn.reward for turn in trajectory.turns] == [0.25, -1.0, 2.0]
    assert trajectory.reward == 1.25
    questions = ["Question 0 of 5 None", "Question 1", "Question 2"]
    for turn, question in zip(trajectory.turns, questions, strict=True):
        assert turn.observation == question and turn.answer == f"to {question}"
        said = stream.token_ids_T[turn.start : turn.end].tolist()
        assert codec.answer(said) == turn.answer and said[-1] == EOS
        assert stream.trained_T[turn.start : turn.end].all()
        assert turn.finish_reason == "stop" and turn.stream == 0
    assert stream.trained_T.sum() == sum(turn.end - turn.start for turn in trajectory.turns)
    assert (stream.logprobs_T == np.where(stream.trained_T, -1.0, 0.0)).all()
    messages = [{"role": "system", "content": "Be brief."}]
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": f"to {question}"}]
    whole = codec.tokenizer.apply_chat_template(messages, return_dict=False)
    assert stream.token_ids_T.tolist() == whole[:-1], "all but the newline after the last answer"


def test_rewards_reach_the_last_token_of_their_turn_in_a_batch(codec: ChatCodec) -> None:
    trajectory = playing(codec, TURNS)
    batch = collate([trajectory])
    lengths = np.cumsum([turn.end - turn.start for turn in trajectory.turns])
    assert np.flatnonzero(batch.rewards_N).tolist() == (lengths - 1).tolist()
    assert batch.bootstrap_row_E.tolist() == [NO_ROW]


@pytest.mark.parametrize(
    ("kwargs", "max_turns", "terminated", "turns"),
    [
        ({"end": "terminated"}, 8, True, 3),
        ({"end": "truncated"}, 8, False, 3),
        ({"end": "never"}, 5, False, 5),
        ({"end": "terminated"}, 3, True, 3),
    ],
)
def test_terminated_truncated_and_out_of_turns(
    codec: ChatCodec, kwargs: dict[str, Any], max_turns: int, terminated: bool, turns: int
) -> None:
    prompt = Prompt("4.1.0", "4", "faulty/Turns-v0", 5, kwargs)
    trajectory = playing(codec, prompt, limits=EpisodeLimits(max_turns, 3))
    assert (trajectory.terminated, trajectory.truncated) == (terminated, not terminated)
    assert len(trajectory.turns) == turns and trajectory.error is None
    assert (collate([trajectory]).bootstrap_row_E.item() == NO_ROW) is terminated


def test_an_answer_cut_by_length_is_not_the_environment_s_truncation(codec: ChatCodec) -> None:
    trajectory = playing(codec, TURNS, sampling=Sampling(1.0, 4))
    assert [turn.finish_reason for turn in trajectory.turns] == ["length"] * 3
    assert [turn.end - turn.start for turn in trajectory.turns] == [4] * 3
    assert trajectory.terminated and not trajectory.truncated


def test_options_and_seed_reach_the_environment(codec: ChatCodec) -> None:
    prompt = Prompt("4.1.0", "4", "faulty/Turns-v0", 77, options={"index": 3})
    assert playing(codec, prompt).turns[0].observation == "Question 0 of 77 {'index': 3}"


def test_a_template_that_rewrites_history_gives_a_stream_a_turn(
    codec: ChatCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimming = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    monkeypatch.setattr(codec.tokenizer, "chat_template", trimming)
    trajectory = playing(codec, TURNS, ScriptedSampler(EOS, saying(codec, lambda question: " padded ")))
    assert [turn.stream for turn in trajectory.turns] == [0, 1, 2] and len(trajectory.streams) == 3
    for turn in trajectory.turns:
        stream = trajectory.streams[turn.stream]
        assert stream.trained_T.sum() == turn.end - turn.start and turn.end == len(stream.token_ids_T)
        assert stream.spans == (VersionSpan(0, turn.start, turn.end),)
    rewards = collate([trajectory]).rewards_N
    assert rewards[rewards != 0].tolist() == [0.25, -1.0, 2.0]


def test_a_load_in_mid_answer_is_in_the_spans(codec: ChatCodec) -> None:
    async def go() -> Trajectory:
        pool = EnvironmentPool(5.0)
        began = asyncio.Event()

        def script(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
            began.set()
            return [5] * 60

        engine = ScriptedSampler(EOS, script, seconds_per_token=0.005, seconds_to_load=0.01)
        await engine.load(policy(3), "")
        episode = asyncio.create_task(play(TURNS, pool, engine, codec, SAMPLING, EpisodeLimits(1, 1)))
        await began.wait()
        await asyncio.sleep(0.02)
        await engine.load(policy(4), "")
        trajectory = await episode
        pool.close()
        return trajectory

    trajectory = asyncio.run(go())
    (turn,) = trajectory.turns
    old, new = trajectory.streams[0].spans
    assert (old.version, new.version) == (3, 4) and trajectory.versions == (3, 4)
    assert turn.start == old.start < old.end == new.start < new.end == turn.end


def test_a_broken_environment_is_replaced(codec: ChatCodec) -> None:
    prompt = Prompt("4.1.0", "4", "faulty/Flaky-v0", 5, {"name": "replaced", "failures": 2})
    trajectory = playing(codec, prompt)
    assert trajectory.error is None and trajectory.metrics == {"number": 3}
    assert len(trajectory.turns) == 1 and len(trajectory.streams) == 1


def test_it_gives_up_after_the_last_attempt(codec: ChatCodec) -> None:
    prompt = Prompt("4.1.0", "4", "faulty/Flaky-v0", 5, {"name": "given up", "failures": 3})
    trajectory = playing(codec, prompt)
    assert faulty_envs.Flaky.made["given up"] == 3
    assert trajectory.error == ("faulty/Flaky-v0: step raised RuntimeError: environment 3 broke (attempt 3 of 3)")
    assert not trajectory.terminated and not trajectory.turns and not usable(trajectory)


@pytest.mark.parametrize(
    ("at", "how"),
    [("make", "error"), ("make", "hang"), ("reset", "info None"), ("reset", "lone surrogate")]
    + [("step", how) for how in ("hang", "exit", "None", "reward NaN", "observation bytes", "metric string")],
)
def test_every_misbehaviour_ends_as_data(codec: ChatCodec, at: str, how: str) -> None:
    prompt = Prompt("4.1.0", "4", "faulty/Broken-v0", 5, {"at": at, "how": how, "hang_s": 0.3})
    trajectory = playing(codec, prompt, timeout_s=0.2 if how == "hang" else 5.0)
    assert trajectory.error is not None and trajectory.error.startswith(f"faulty/Broken-v0: {at} ")
    assert trajectory.error.endswith("(attempt 3 of 3)") and not usable(trajectory)


def test_an_environment_that_failed_is_never_used_again(codec: ChatCodec) -> None:
    async def go() -> list[Trajectory]:
        pool = EnvironmentPool(5.0)
        engine = ScriptedSampler(EOS)
        await engine.load(policy(0), "")
        prompt = Prompt("4.1.0", "4", "faulty/Flaky-v0", 5, {"name": "shared", "failures": 1})
        played = [await play(prompt, pool, engine, codec, SAMPLING, LIMITS) for _ in range(3)]
        pool.close()
        return played

    assert [t.metrics for t in asyncio.run(go())] == [{"number": 2}] * 3
    assert faulty_envs.Flaky.made["shared"] == 2


def test_a_prompt_too_long_is_told_at_once(codec: ChatCodec) -> None:
    asked: list[str] = []

    def count(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
        asked.append("")
        return [5]

    trajectory = playing(codec, TURNS, ScriptedSampler(EOS, count, max_model_len=20))
    assert trajectory.error is not None and "tokens does not fit a context of 20" in trajectory.error
    assert "attempt" not in trajectory.error and not asked and not usable(trajectory)


def test_a_conversation_may_outgrow_the_context(codec: ChatCodec) -> None:
    engine = ScriptedSampler(EOS, saying(codec, lambda question: "x" * 40), max_model_len=170)
    trajectory = playing(codec, TURNS, engine)
    assert trajectory.error is not None and "does not fit" in trajectory.error
    assert len(trajectory.turns) == 2, "what was played until then is kept for whoever looks at it"


def test_a_dead_engine_is_not_the_environment_s_fault(codec: ChatCodec) -> None:
    class Dying(ScriptedSampler):
        async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
            raise EngineDied("gone")

    with pytest.raises(EngineDied):
        playing(codec, TURNS, Dying(EOS))


def test_right_answers_to_real_questions_score_1(codec: ChatCodec) -> None:
    env = QAEnv("validation")
    key = {}
    for index in range(20):
        question, info = env.reset(options={"index": index})
        key[question] = (info["references"][0], info["kind"])
    engine = ScriptedSampler(EOS, saying(codec, lambda question: key[question][0]))
    for index, (question, (answer, kind)) in enumerate(key.items()):
        prompt = Prompt(str(index), "0", "rollcast/QA-v0", 1, {"split": "validation"}, {"index": index})
        trajectory = playing(codec, prompt, engine)
        assert trajectory.metrics == {"f1": 1.0, "exact_match": 1.0} and trajectory.kind == kind
        assert trajectory.turns[0].observation == question and trajectory.turns[0].answer == answer
        assert trajectory.reward == pytest.approx(1.0 - 0.001 * len(answer)) and trajectory.terminated
        assert codec.tokenizer.decode(trajectory.streams[0].token_ids_T[:7].tolist()) == "<|im_start|>system"


def test_the_same_prompt_gives_the_same_trajectory(codec: ChatCodec) -> None:
    first, second = (playing(codec, TURNS, ScriptedSampler(EOS)) for _ in range(2))
    assert first.turns == second.turns
    assert first.streams[0].token_ids_T.tolist() == second.streams[0].token_ids_T.tolist()
