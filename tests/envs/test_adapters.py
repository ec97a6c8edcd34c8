"""Environments of other packages: splits, seeds, judges that evaluate answers, and packages that are missing.

The two packages are not in the locks; where they are not installed, what needs them is skipped. For the rest of it:
pip install --target FOLDER reasoning-gym==0.1.25 textarena==0.7.4, and FOLDER in PYTHONPATH.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import skyrl_shape
from rollcast_envs.adapters.harmless import is_expression, is_literal
from rollcast_envs.adapters.outside import OwnRandomness, required
from rollcast_envs.errors import DataError
from rollcast_envs.text import TextEnv

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HOSTILE = (
    "",
    "lorem ipsum " * 900,
    "🙂",
    "東京",
    "\0",
    "<|im_end|>",
    "1e999",
    "{}",
    "[[1]]",
    "null",
    f"[{'9' * 5000}]",
)
PLANTED = "adapters_planted"


def made(name: str, **kwargs: Any) -> TextEnv:
    env = gymnasium.make(f"rollcast/{name}-v0", **kwargs).unwrapped
    assert isinstance(env, TextEnv)
    return env


def episode(env: TextEnv, seed: int, answers: list[str]) -> list[Any]:
    """Everything that is seen until the end, or until there are no more answers."""
    seen: list[Any] = [env.reset(seed=seed)]
    for answer in answers:
        seen.append(env.step(answer))
        if seen[-1][2]:
            break
    return seen


# ---- what may be evaluated


@pytest.mark.parametrize("answer", ["[1, 2]", "[['a', 'b'], ['c', 'd']]", "'word'", "(1, -2.5)", "42"])
def test_literals_are_let_through(answer: str) -> None:
    assert is_literal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').getcwd()",
        "[x for x in (1, 2)]",
        "[1] * 10**9",
        "open('f')",
        "a b",
        "",
        "(" * 9999,
        "[1, 2",
        "x",
    ],
)
def test_code_is_no_literal(answer: str) -> None:
    assert not is_literal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "-34*x**8/15 - 5*x/4 + C",
        "-4*(-2*x - 8)**(3/2)/3 + C",
        "12*x*cos(x) - exp(-x)",
        " (8 - 5)*10 - 6\n",
        "2.5*x**-2",
    ],
)
def test_arithmetic_is_let_through(answer: str) -> None:
    assert is_expression(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').getcwd()",
        "().__class__",
        "exit()",
        "exp('__import__(\"os\").getcwd()')",
        "exp(x=1)",
        "9**9**9",
        "((9**9)**9)**9",
        "x**99",
        "2**x",
        "9" * 40,
        "x if x else y",
        "lambda: x",
        "[x for x in y]",
        "x << 9",
        "f'{x}'",
        "xy",
        "x[0]",
        "True",
        "1j",
        "+" * 299 + "x" * 2,
        "x + " * 200 + "x",
        "(" * 250,
        "",
        "x\0",
    ],
)
def test_all_else_is_no_arithmetic(answer: str) -> None:
    assert not is_expression(answer)


# ---- what is shared with the process


def test_own_randomness_leaves_the_process_s_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).random()
    own = OwnRandomness(2)
    drawn = []
    for _ in range(2):
        with own.entered():
            drawn.append((random.random(), np.random.random()))
    assert (random.random(), np.random.random()) == expected
    reference, numpy_reference = random.Random(2), np.random.RandomState(2)
    assert drawn == [(reference.random(), numpy_reference.random()) for _ in range(2)]


def test_a_missing_package_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        required("no_such_module_at_all", "no-such-package==1.0")
    assert caught.value.fix == "pip install 'no-such-package==1.0'"
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(DataError, match=r"reasoning_gym cannot be imported.*pip install 'reasoning-gym==0\.1\.25'"):
        made("ReasoningGym", seed=12345)
    with pytest.raises(DataError, match=r"textarena cannot be imported.*pip install 'textarena==0\.7\.4'"):
        made("TextArena")


# ---- reasoning-gym


@pytest.fixture
def reasoning_gym() -> Any:
    return pytest.importorskip("reasoning_gym")


def questions(split: str, **kwargs: Any) -> list[str]:
    env = made("ReasoningGym", split=split, **kwargs)
    assert env.size is not None
    return [env.reset(options={"index": index})[0] for index in range(env.size)]


def test_no_question_is_in_two_splits(reasoning_gym: Any) -> None:
    """There are 200 sums and differences of two digits, so that every one is drawn in many seeds."""
    train, validation, test = (
        set(questions(split, size=150, options=SUMS)) for split in ("train", "validation", "test")
    )
    assert not train & validation and not train & test and not validation & test
    assert min(map(len, (train, validation, test))) > 20
    assert len(train) > max(len(validation), len(test))


def test_large_spaces_hardly_repeat(reasoning_gym: Any) -> None:
    assert len(set(questions("test", size=100))) > 90


def test_a_stored_answer_is_right_and_another_is_not(reasoning_gym: Any) -> None:
    env = made("ReasoningGym", options=SUMS, size=50)
    question, info = env.reset(seed=3)
    assert info["kind"] == "chain_sum" and info["task_id"].startswith("chain_sum:")
    assert info["fields"] == {"question": question, "answer": info["references"][0]}
    observation, reward, terminated, truncated, info = env.step(f" {info['references'][0]}\n")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert info["metrics"] == {"score": 1.0, "solved": 1.0} and info["rewards"] == {"score": 1.0}
    env.reset(seed=3)
    assert env.step("12345")[4]["metrics"]["solved"] == 0.0


@pytest.mark.parametrize("task", ["chain_sum", "pool_matrix", "list_functions", "maze", "coin_flip", "n_queens"])
def test_equal_seeds_give_equal_questions(task: str, reasoning_gym: Any) -> None:
    first, second = made("ReasoningGym", task=task, size=20), made("ReasoningGym", task=task, size=20)
    seen = [first.reset(seed=seed) for seed in range(4)]
    random.seed(99)
    np.random.seed(99)
    assert [second.reset(seed=seed) for seed in (3, 2, 1, 0)] == seen[::-1]
    assert len({question for question, _ in seen}) > 1


@pytest.mark.parametrize(
    "task", ["prime_factorization", "coin_flip", "boxnet", "game_of_life", "countdown", "n_queens"]
)
def test_an_answer_that_no_judge_can_read_scores_little(task: str, reasoning_gym: Any) -> None:
    env = made("ReasoningGym", task=task, size=20)
    for answer in HOSTILE:
        env.reset(seed=1)
        assert 0.0 <= env.step(answer)[1] < 0.5


@pytest.mark.parametrize(
    "task",
    [
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "polynomial_multiplication", "puzzle24", "simple_integration"),
    ],
)
def test_the_code_in_an_answer_is_never_run(task: str, reasoning_gym: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    env = made("ReasoningGym", task=task, size=20)
    for answer in (f"setattr(__import__('sys'), '{PLANTED}', True)", f"exp(setattr(__import__('sys'),'{PLANTED}',1))"):
        env.reset(seed=2)
        assert env.step(answer)[1] == 0.0
        assert not hasattr(sys, PLANTED)
    _, info = env.reset(seed=2)
    assert env.step(info["references"][0])[1] == 1.0, "an honest answer is judged all the same"


def test_tasks_that_differ_between_processes_are_warned_of(reasoning_gym: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.warns(UserWarning, match="PYTHONHASHSEED=0"):
        made("ReasoningGym", task="ransom_note", size=20)


def test_bad_arguments_are_told(reasoning_gym: Any) -> None:
    with pytest.raises(DataError, match=r"reasoning-gym has no such task.*chain_sum"):
        made("ReasoningGym", task="chain_sums")
    with pytest.raises(DataError, match="it is a mixture"):
        made("ReasoningGym", task="composite")
    with pytest.raises(DataError, match=r"options of chain_sum are refused.*its options are .*max_digits"):
        made("ReasoningGym", options={"max_digitz": 3})
    with pytest.raises(DataError, match="must be >= min_terms"):
        made("ReasoningGym", options={"min_terms": 3, "max_terms": 2})
    with pytest.raises(ValueError, match="size is 0"):
        made("ReasoningGym", size=0)


def test_a_space_that_is_too_small_is_told(reasoning_gym: Any) -> None:
    """Two questions can be asked, so that one of the three splits has none, or two have."""
    options = {"min_trials": 1, "max_trials": 1, "allow_at_least": False}
    refused = []
    for split in ("train", "validation", "test"):
        try:
            made("ReasoningGym", task="coin_flip", split=split, size=5, options=options)
        except DataError as error:
            refused.append(error.what)
    assert refused in (["coin_flip with these options has too few questions"] * count for count in (1, 2))


def test_another_version_is_refused(reasoning_gym: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollcast_envs.adapters.reasoning_gym.version", lambda name: "0.2.0")
    with pytest.raises(DataError, match=r"0\.2\.0 is installed instead of 0\.1\.25"):
        made("ReasoningGym", seed=54321)


# ---- textarena


@pytest.fixture
def textarena() -> Any:
    return pytest.importorskip("textarena")


def test_a_game_is_played_to_its_end(textarena: Any) -> None:
    env = made("TextArena")
    opening, info = env.reset(seed=4)
    assert "Guess The Number" in opening and info["references"] == []
    low, high, turns = 1, 20, 0
    while True:
        turns += 1
        guess = (low + high) // 2
        observation, reward, terminated, truncated, info = env.step(f"[{guess}]")
        if terminated:
            break
        assert observation in ("The target number is higher.", "The target number is lower."), "only what is new"
        assert (reward, truncated) == (0.0, False) and "metrics" not in info
        low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
    assert reward == 1.0 and "guessed the correct number" in observation
    assert info["metrics"] == {"score": 1.0, "solved": 1.0, "invalid_move": 0.0, "moves": float(turns)}


def test_illegal_moves_end_a_game(textarena: Any) -> None:
    env = made("TextArena")
    env.reset(seed=4)
    assert "invalid move" in env.step("hello")[0]
    _, reward, terminated, _, info = env.step("hello")
    assert (reward, terminated, info["metrics"]["invalid_move"]) == (0.0, True, 1.0)
    env.reset(seed=4)
    _, reward, terminated, _, info = env.step(f"[{'9' * 5000}]")
    assert (reward, terminated, info["metrics"]["invalid_move"]) == (0.0, True, 1.0)


@pytest.mark.parametrize("game", ["Countdown-v0", "Cryptarithm-v0", "Slitherlink-v0"])
def test_a_reason_in_the_place_of_a_reward_is_no_reward(game: str, textarena: Any) -> None:
    env = made("TextArena", game=game)
    env.reset(seed=1)
    env.step("hello")
    reason, reward, terminated, _, _ = env.step("hello")
    assert (reward, terminated) == (0.0, True) and "format" in reason.lower()


@pytest.mark.parametrize("game", ["2048-v0", "Bandit-v0", "Blackjack-v0", "FrozenLake-v0-random", "Mastermind-v0"])
def test_equal_seeds_give_equal_games(game: str, textarena: Any) -> None:
    answers = ["[up]", "[Hit]", "[red]", "[1 2 3 4]", "[left]", "[Stand]"]
    first, second = made("TextArena", game=game), made("TextArena", game=game)
    seen = [episode(first, seed, answers) for seed in range(4)]
    random.seed(99)
    assert [episode(second, seed, answers) for seed in (3, 2, 1, 0)] == seen[::-1]


def test_games_side_by_side_do_not_disturb_each_other(textarena: Any) -> None:
    answers = ["[up]", "[left]", "[right]", "[down]"] * 3
    env, other = made("TextArena", game="2048-v0"), made("TextArena", game="2048-v0")
    alone = episode(env, 5, answers)
    other.reset(seed=6)
    env.reset(seed=5)
    mixed = []
    for answer in answers[: len(alone) - 1]:
        other.step(answer) if other._episode_open else other.reset(seed=7)
        mixed.append(env.step(answer))
    assert mixed == alone[1:]


def test_what_games_print_goes_nowhere(textarena: Any, capsys: pytest.CaptureFixture[str]) -> None:
    env = made("TextArena", game="LogicPuzzle-v0")
    env.reset(seed=1)
    opening, _ = env.reset(seed=1)
    assert "puzzle" in opening.lower()
    env.step("[people Alice house X]")
    assert capsys.readouterr().out == ""
    print("but this does not")
    assert capsys.readouterr().out == "but this does not\n"


def test_splits_start_from_different_seeds(textarena: Any) -> None:
    tasks = {
        split: {made("TextArena", split=split).reset(seed=seed)[1]["task_id"] for seed in range(20)}
        for split in ("train", "test")
    }
    assert len(tasks["train"]) == 20 and not tasks["train"] & tasks["test"]


def test_games_that_cannot_be_played_here_are_told(textarena: Any) -> None:
    with pytest.raises(DataError, match=r"can be played without a network.*GuessTheNumber-v0"):
        made("TextArena", game="Wordle-v0")
    with pytest.raises(DataError, match=r"no game of this id.*Sudoku-v0"):
        made("TextArena", game="Sudoku-v0-unheard-of")
    with pytest.raises(DataError, match="options of Mastermind-v0 are refused"):
        made("TextArena", game="Mastermind-v0", options={"colour": "red"})


# ---- SkyRL-Gym's shape

SYSTEM = {"role": "system", "content": "Answer with a number."}


def rows(path: Path, systems: tuple[str, ...] = ()) -> str:
    lines = []
    for number in range(6):
        system = {**SYSTEM, "content": systems[number % len(systems)]} if systems else SYSTEM
        prompt = [system, {"role": "user", "content": f"What is {number} + 1?"}]
        spec = {"method": "rule", "ground_truth": str(number + 1)}
        lines.append(json.dumps({"prompt": prompt, "reward_spec": spec, "split": "train"}))
    path.write_text("\n".join(lines))
    return str(path)


def test_rows_reach_the_class_as_extras(tmp_path: Path) -> None:
    data = rows(tmp_path / "sums.jsonl")
    env = made("SkyRLGym", env="skyrl_shape:Sum", data=data, arguments={"env_config": {"reward": {"scale": 2.0}}})
    assert (env.size, env.system_prompt) == (6, SYSTEM["content"])
    for index in range(6):
        question, info = env.reset(options={"index": index})
        assert question == f"What is {int(info['references'][0]) - 1} + 1?", "the system turn is not part of it"
        observation, reward, terminated, _, info = env.step(info["references"][0])
        assert (observation, reward, terminated) == ("", 2.0, True)
        assert info["metrics"] == {"right": 1.0}


def test_another_system_turn_opens_the_first_turn(tmp_path: Path) -> None:
    env = made("SkyRLGym", env="skyrl_shape:Sum", data=rows(tmp_path / "sums.jsonl", ("Be brief.", "Be exact.")))
    openings = [env.reset(options={"index": index})[0] for index in range(6)]
    other = {"Be brief.": "Be exact.", "Be exact.": "Be brief."}[str(env.system_prompt)]
    assert sum(opening.startswith(f"{other}\n\nWhat is") for opening in openings) == 3
    assert sum(opening.startswith("What is") for opening in openings) == 3


def test_several_turns_tools_and_metrics() -> None:
    env = made("SkyRLGym", env="skyrl_shape:Guess", prompt="Guess.", arguments={"limit": 2})
    assert env.size is None
    closed = skyrl_shape.Guess.closed
    question, _ = env.reset(seed=1)
    assert question.startswith("Guess.\n\nIt is ")
    observation, reward, terminated, truncated, info = env.step("none")
    assert (observation, reward, terminated, truncated) == ("wrong\nagain", 0.0, False, False)
    assert info["role"] == "tool" and "metrics" not in info
    _, reward, terminated, _, info = env.step(question.rpartition(" ")[2].strip("."))
    assert (reward, terminated, info["metrics"]) == (1.0, True, {"turns": 2.0, "lucky": 0.0})
    assert "role" not in info
    assert env.reset(seed=1)[0] == question, "the class draws from the process's random numbers"
    assert env.reset(seed=2)[0] != question
    env.close()
    assert skyrl_shape.Guess.closed == closed + 3


def test_gymnasium_finds_nothing_wrong(tmp_path: Path) -> None:
    check_env(made("SkyRLGym", env="skyrl_shape:Guess", prompt="Guess."), skip_render_check=True)
    check_env(made("SkyRLGym", env="skyrl_shape:Sum", data=rows(tmp_path / "sums.jsonl")), skip_render_check=True)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it names no class"),
        ("skyrl_shape", "it names no class"),
        ("skyrl_shape:Nothing", "has no attribute 'Nothing'"),
        ("no_such_module_at_all:Env", "No module named"),
        ("collections:Counter", "no methods init and step"),
    ],
)
def test_a_class_that_cannot_be_used_is_told(name: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        made("SkyRLGym", env=name)


def test_prompts_that_cannot_open_an_episode_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a text nor a list of messages"):
        made("SkyRLGym", env="skyrl_shape:Guess", prompt=[{"role": "user"}])
    answered = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(DataError, match="turn of the assistant"):
        made("SkyRLGym", env="skyrl_shape:Guess", prompt=answered).reset(seed=1)
