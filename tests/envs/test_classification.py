"""`rollcast/Classification-v0`: when an answer is a label, what it earns, and texts and labels of the user's own."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.errors import DataError
from rollcast_envs.splits import SPLITS, Split
from rollcast_envs.tasks.classification import ClassificationEnv
from rollcast_envs.text import Answered

HOSTILE = [
    "",
    " ",
    "\n\n",
    "🙂",
    "\x00",
    "positive" * 1000,
    "é" * 3000,
    "(((",
    "[a-",
    "negative positive",
    "-" * 10_000,
]


def make(**kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("rollcast/Classification-v0", **kwargs)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judged(env: ClassificationEnv, answer: str, index: int = 0) -> dict[str, Any]:
    env.reset(options={"index": index})
    _, reward, terminated, truncated, info = env.step(answer)
    assert (terminated, truncated) == (True, False) and reward == pytest.approx(sum(info["rewards"].values()))
    return info


@pytest.mark.parametrize("data", ["sentiment", "topics"])
@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes_and_labels_earn_everything(data: str, split: Split) -> None:
    check_env(make(split=split, data=data).unwrapped)
    env = ClassificationEnv(split, data)
    kinds = Counter[str]()
    for index in range(env.size or 0):
        info = judged(env, env.reset(options={"index": index})[1]["references"][0], index)
        assert info["rewards"] == {"accuracy": 1.0, "format": 0.1}
        assert info["metrics"] == {"accuracy": 1.0, "valid": 1.0}
        kinds[info["kind"]] += 1
    assert set(kinds) == set(env.choices or ()) and len(set(kinds.values())) == 1


@pytest.mark.parametrize("data", ["sentiment", "topics"])
def test_two_hundred_random_episodes_and_equal_seeds(data: str) -> None:
    env, again = make(data=data), make(data=data)
    env.action_space.seed(5)
    for seed in range(200):
        question, info = env.reset(seed=seed)
        assert (question, info) == again.reset(seed=seed)
        assert info["references"][0] in question and info["fields"]["text"] in question
        reward = env.step(env.action_space.sample())[1]
        assert reward in (0, 0.1, 1.1)
    for answer in HOSTILE:
        env.reset(seed=1)
        assert 0 <= env.step(answer)[1] <= 1.1


@pytest.mark.parametrize(
    ("answer", "accuracy", "format_", "valid"),
    [
        ("negative", 1.0, 0.1, 1.0),
        (" **Negative**.\n", 1.0, 0.1, 1.0),
        ("positive", 0.0, 0.1, 1.0),
        ("It is negative.", 0.0, 0.1, 0.0),
        ("negative, negative", 0.0, 0.1, 0.0),
        ("positive or negative", 0.0, 0.0, 0.0),
        ("negatively", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_what_an_answer_earns(answer: str, accuracy: float, format_: float, valid: float) -> None:
    env = ClassificationEnv("test", "sentiment")
    index = next(i for i in range(50) if env.reset(options={"index": i})[1]["references"] == ["negative"])
    info = judged(env, answer, index)
    assert info["rewards"] == {"accuracy": accuracy, "format": format_}
    assert info["metrics"] == {"accuracy": accuracy, "valid": valid}
    assert ClassificationEnv("test", partial_credit=0).judge(env.record, answer).rewards == {"accuracy": accuracy}


def test_a_label_within_a_longer_one_is_not_named_by_it(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": label, "split": split} for split in SPLITS for n, label in
            enumerate(["good", "very good", "bad"])]  # fmt: skip
    env = ClassificationEnv("test", written(tmp_path / "own.jsonl", rows))
    assert env.choices == ("bad", "good", "very good")
    (index,) = [i for i in range(3) if env.reset(options={"index": i})[1]["references"] == ["very good"]]
    assert judged(env, "I call it very good", index)["rewards"] == {"accuracy": 0.0, "format": 0.1}
    assert judged(env, "very good, or just good", index)["rewards"] == {"accuracy": 0.0, "format": 0.0}
    assert judged(env, "Very_Good!", index)["rewards"]["accuracy"] == 1.0
    question = env.reset(options={"index": index})[0]
    assert question == "text 1\n\nWhich label fits this text? Answer with one of: bad, good, very good."


def test_macro_f1_counts_an_answer_that_is_no_label_as_wrong() -> None:
    answered = [
        Answered("Positive.", ("positive",)),
        Answered("positive", ("negative",)),
        Answered("no idea", ("negative",)),
        Answered("negative", ("negative",)),
    ]
    # positive: precision 1/2, recall 1; negative: precision 1, recall 1/3.
    found = ClassificationEnv.corpus_metrics(answered)
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert ClassificationEnv.corpus_metrics([]) == {}


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    table = tmp_path / "mail.csv"
    rows = [f"{split},the {n} mail,{'Spam' if n % 2 else 'ham'}" for split in SPLITS for n in range(6)]
    table.write_text("split,body,class\n" + "\n".join(rows) + "\n", encoding="utf-8")
    env = ClassificationEnv("validation", str(table), fields={"text": "body", "label": "class"}, few_shot=1)
    assert env.size == 6 and env.choices == ("Spam", "ham") and len(env.few_shot) == 1
    assert judged(env, env.reset(options={"index": 2})[1]["references"][0].upper(), 2)["rewards"]["accuracy"] == 1.0
    with pytest.raises(DataError, match=r"label 'Spam' .* none of ham, eggs.*labels = "):
        ClassificationEnv("train", str(table), ["ham", "eggs"], fields={"text": "body", "label": "class"})


def test_whole_numbers_stand_for_the_labels_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 2, "split": split} for split in SPLITS for n in range(4)]
    data = written(tmp_path / "coded.jsonl", rows)
    named = ClassificationEnv("test", data, ["no", "yes"])
    assert {named.reset(options={"index": i})[1]["references"][0] for i in range(4)} == {"no", "yes"}
    assert ClassificationEnv("test", data).choices == ("0", "1")


@pytest.mark.parametrize(
    ("label", "message"),
    [("C", "cannot be told from"), ("+", "no label"), (None, "needs its label"), (True, "no label"), ([], "no label")],
)
def test_labels_that_answers_could_not_tell_apart_are_refused(tmp_path: Path, label: Any, message: str) -> None:
    rows = [{"text": "one", "label": "C++", "split": "train"}, {"text": "two", "label": label, "split": "train"}]
    with pytest.raises(DataError, match=message):
        ClassificationEnv("train", written(tmp_path / "own.jsonl", rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "positive"}, "expected a list"),
        ({"labels": []}, "expected a list"),
        ({"labels": ["a", "A!"]}, "cannot be told from"),
        ({"partial_credit": -0.1}, "not negative"),
        ({"partial_credit": float("inf")}, "finite"),
        ({"split": "dev"}, "expected one of train"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationEnv(**arguments)
