"""The contract of text environments: the space of all strings, the order of turns, the choice of a task."""

import doctest
import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.spaces import Text
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv

import rollcast_envs.rewards
import rollcast_envs.splits
import rollcast_envs.text
from rollcast_envs import TextEnv, TextSpace


class Countdown(TextEnv):
    """Say the numbers down to zero; three wrong answers and the environment gives up."""

    system_prompt = "Count down."

    def __init__(self, size: int | None = 5, max_length: int = 100) -> None:
        super().__init__(max_length=max_length)
        self.size = size

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.start = self.expected = int(self.np_random.integers(1, 6)) if index is None else index + 1
        self.mistakes = 0
        return f"Count down from {self.start}.", self.info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = answer == str(self.expected)
        self.expected -= right
        self.mistakes += not right
        over, given_up = self.expected < 0, self.mistakes == 3
        info = self.info() | ({"metrics": {"mistakes": float(self.mistakes)}} if over or given_up else {})
        return "Next.", float(right), over, given_up, info

    def info(self) -> dict[str, Any]:
        return {"task_id": f"countdown:{self.start}", "kind": "countdown", "references": []}


@pytest.mark.parametrize("text", ["", "\n", "two\nlines\ttab", "🙂👩‍👩‍👧", "Zürich 東京 مرحبا", "\x00", "x" * 50])
def test_the_space_holds_any_text_up_to_its_length(text: str) -> None:
    assert text in TextSpace(50)


@pytest.mark.parametrize("other", ["x" * 51, b"bytes", 7, None, ["a"]])
def test_the_space_holds_nothing_else(other: object) -> None:
    assert other not in TextSpace(50)


def test_samples_are_seeded_in_the_space_and_varied() -> None:
    draws = [[space.sample() for _ in range(50)] for space in (TextSpace(30, seed=1), TextSpace(30, seed=1))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 20 and all(text in TextSpace(30) for text in draws[0])
    assert TextSpace(0).sample() == ""
    with pytest.raises(ValueError, match="pass neither"):
        TextSpace(30).sample(mask=(3, None))


def test_spaces_compare_print_copy_and_pickle() -> None:
    assert TextSpace(5) == TextSpace(5) != TextSpace(6)
    assert TextSpace(5) != Text(5, min_length=0)
    assert repr(TextSpace(5)) == "TextSpace(5)"
    assert deepcopy(TextSpace(5)) == pickle.loads(pickle.dumps(TextSpace(5))) == TextSpace(5)


def test_asynchronous_vectors_say_that_shared_memory_does_not_fit() -> None:
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([Countdown], context="spawn")


@pytest.mark.filterwarnings("ignore:.*does not have a spec:UserWarning", "ignore:.*not having a spec:UserWarning")
def test_a_subclass_with_two_methods_passes_gymnasiums_checker() -> None:
    check_env(Countdown())


def test_an_episode_of_several_turns_terminates() -> None:
    env = Countdown()
    assert env.reset(options={"index": 1})[0] == "Count down from 2."
    ends = [env.step(answer)[2:4] for answer in ("2", "1", "0")]
    assert ends == [(False, False), (False, False), (True, False)]


def test_an_episode_that_is_cut_short_is_truncated_and_has_metrics() -> None:
    env = Countdown()
    env.reset(seed=0)
    assert "metrics" not in env.step("wrong")[4]
    env.step("wrong")
    *_, terminated, truncated, info = env.step("wrong")
    assert (terminated, truncated, info["metrics"]) == (False, True, {"mistakes": 3.0})


def test_steps_out_of_turn_are_refused() -> None:
    env = Countdown()
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step("3")
    env.reset(options={"index": 0})
    env.step("1")
    env.step("0")
    with pytest.raises(ResetNeeded, match="after each end"):
        env.step("0")
    env.reset()
    env.step("0")


@pytest.mark.parametrize(("answer", "got"), [(None, "NoneType"), (3, "int"), ("x" * 101, "101 characters")])
def test_answers_outside_the_space_are_refused(answer: Any, got: str) -> None:
    env = Countdown()
    env.reset()
    with pytest.raises(InvalidAction, match=got):
        env.step(answer)


@pytest.mark.parametrize("index", [-1, 5, 1.0, "2", True, np.float64(1)])
def test_a_bad_index_is_refused_with_what_was_expected(index: object) -> None:
    with pytest.raises(ValueError, match="expected an integer from 0 to 4"):
        Countdown().reset(options={"index": index})


def test_indices_may_be_numpys_and_none_means_draw() -> None:
    assert Countdown().reset(options={"index": np.int64(3)})[0] == "Count down from 4."
    assert Countdown().reset(seed=4, options={"index": None}) == Countdown().reset(seed=4)


def test_unknown_options_and_indices_of_endless_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['indx'\]"):
        Countdown().reset(options={"indx": 1})
    with pytest.raises(ValueError, match=r"endless.*seed"):
        Countdown(size=None).reset(options={"index": 1})


@pytest.mark.parametrize("module", [rollcast_envs.text, rollcast_envs.rewards, rollcast_envs.splits])
def test_the_examples_in_the_documentation_are_true(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
