"""`rollcast/Feedback-v0` and its reward: what people said of answers, asked again."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import rollcast_envs  # noqa: F401  (registers the environment)
from rollcast_envs.errors import DataError
from rollcast_envs.rewards import chrf, exact_match, judged

CAPITAL = {
    "question": "Capital of Peru?",
    "references": ["Lima"],
    "judged": [{"answer": "Lima", "value": 1.0}, {"answer": "I believe that it is Cusco.", "value": -0.5}],
}
TALK = {
    "question": "And of Chile?",
    "system": "Answer with the name only.",
    "history": [["Capital of Peru?", "Lima"]],
    "references": ["Santiago"],
    "judged": [{"answer": "Santiago", "value": 0.5}],
}


def make(folder: Path, *rows: dict[str, Any], **kwargs: Any) -> Any:
    path = folder / "feedback.jsonl"
    path.write_text("".join(json.dumps({"split": "train"} | row) + "\n" for row in rows), encoding="utf-8")
    return gymnasium.make("rollcast/Feedback-v0", data=str(path), **kwargs)


@pytest.mark.parametrize(
    ("answer", "value"),
    [("Lima", 1.0), ("lima.", 1.0), ("I believe that it is Cusco.", -0.5), ("", 0.0), ("Bogotá", 0.0)],
)
def test_a_verdict_is_given_again_to_the_same_answer(answer: str, value: float) -> None:
    assert judged(answer, [("Lima", 1.0), ("I believe that it is Cusco.", -0.5)], exact_match) == value


def test_near_answers_are_worth_nearly_as_much() -> None:
    verdicts = [("The capital is Lima.", 1.0), ("The capital is Cusco.", -1.0)]
    values = [judged(text, verdicts) for text in ("The capital is Lima.", "It is Lima.", "It is Cusco.")]
    assert values == sorted(values, reverse=True) and values[0] > 0 > values[-1]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30), st.lists(st.tuples(st.text(max_size=20), st.floats(-1, 1)), max_size=4))
def test_the_reward_is_bounded(answer: str, verdicts: list[tuple[str, float]]) -> None:
    assert -1 <= judged(answer, verdicts, chrf) <= 1


def test_a_conversation_is_asked_again(tmp_path: Path) -> None:
    env = make(tmp_path, TALK, CAPITAL, system_prompt="Be brief.")
    seen = {}
    for index in range(2):
        observation, info = env.reset(options={"index": index})
        seen[observation] = (env.unwrapped.system_prompt, tuple(env.unwrapped.few_shot), info["references"])
    assert seen == {
        "And of Chile?": ("Answer with the name only.", (("Capital of Peru?", "Lima"),), ["Santiago"]),
        "Capital of Peru?": ("Be brief.", (), ["Lima"]),
    }
    check_env(env.unwrapped, skip_render_check=True)


def test_an_answer_earns_its_verdict(tmp_path: Path) -> None:
    env = make(tmp_path, CAPITAL, length_cost=0.01, measure="exact_match")
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step("Lima")
    assert reward == pytest.approx(1 - 0.04) and (terminated, truncated) == (True, False)
    assert info["rewards"] == {"feedback": 1.0, "length": -0.04} and info["metrics"] == {"feedback": 1.0, "liked": 1.0}


@pytest.mark.parametrize(
    "row",
    [
        CAPITAL | {"judged": []},
        CAPITAL | {"judged": [{"answer": "Lima", "value": 2}]},
        CAPITAL | {"judged": [{"answer": "Lima", "value": True}]},
        CAPITAL | {"judged": "Lima"},
        TALK | {"history": [["only one"]]},
    ],
)
def test_a_row_that_is_no_verdict_is_told(row: dict[str, Any], tmp_path: Path) -> None:
    env = make(tmp_path, row)
    with pytest.raises(DataError, match="it holds"):
        env.reset(seed=0)
        env.step("Lima")


def test_it_has_no_data_of_its_own() -> None:
    with pytest.raises(DataError, match="no data"):
        gymnasium.make("rollcast/Feedback-v0")
    with pytest.raises(ValueError, match="expected one of chrf"):
        gymnasium.make("rollcast/Feedback-v0", data="x.jsonl", measure="love")
