"""Parts of train for k-fold validation: disjoint in groups, together all of train, and the same for ever."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from built_in import IDS, make, other_data
from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, open_records
from rollcast_envs.splits import SPLITS, fold_mark, fold_names, in_split, portion_named, split_of
from rollcast_envs.tasks.single_turn import SingleTurnTask

WANTED = (Field("question", "text", "the question"),)


def tasks_of(env: Any) -> dict[str, str]:
    """Name of every task -> what it asks, apart from case and blanks."""
    asked = (env.reset(options={"index": index}) for index in range(env.unwrapped.size))
    return {info["task_id"]: " ".join(question.casefold().split()) for question, info in asked}


def test_the_part_of_a_group_never_moves() -> None:
    pinned = {"country:FR": 4, "country:AD": 4, "country:US": 5, "東京": 5}
    assert {group: fold_mark(group) % 5 + 1 for group in pinned} == pinned
    assert all(in_split(group, f"fold-{part}/5") == (split_of(group) == "train") for group, part in pinned.items())


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_share_train_evenly_and_touch_no_other_split(parts: int) -> None:
    groups = [f"group {number}" for number in range(5_000)]
    counts: Counter[int] = Counter()
    for group in groups:
        inside = [part for part in range(1, parts + 1) if in_split(group, f"fold-{part}/{parts}")]
        outside = [part for part in range(1, parts + 1) if in_split(group, f"train-{part}/{parts}")]
        if split_of(group) != "train":
            assert not inside and not outside
            continue
        assert len(inside) == 1 and sorted(inside + outside) == list(range(1, parts + 1))
        counts.update(inside)
    assert all(abs(count / sum(counts.values()) - 1 / parts) < 0.03 for count in counts.values())


@pytest.mark.parametrize(
    "name", ["dev", "fold-0/5", "fold-6/5", "train-1/1", "fold-1/5 ", "fold-1", "fold--1/5", "test-1/5", "fold-٣/٥", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="split is"):
        portion_named(name)


def test_examples_come_from_what_is_trained_on() -> None:
    names = ("train", "validation", "test", "train-2/5", "fold-2/5")
    assert [portion_named(name).training for name in names] == ["train", "train", "train", "train-2/5", "train-2/5"]


@pytest.mark.parametrize("env_id", IDS)
def test_every_built_in_task_has_them(env_id: str) -> None:
    assert make(env_id).unwrapped.folds  # type: ignore[attr-defined]


@pytest.mark.parametrize(("env_id", "kwargs"), other_data(), ids=str)
def test_parts_of_every_task_are_disjoint_and_cover_train(env_id: str, kwargs: dict[str, Any]) -> None:
    """By the name of a task, by its group and by what it asks; of three parts, and of what is outside each."""
    train, splits = tasks_of(make(env_id, **kwargs)), [fold_names(part, 3) for part in (1, 2, 3)]
    pairs = env_id == "rollcast/ToolQA-v0"  # A question is on two countries: it is in no part if they are of two.
    covered: Counter[str] = Counter()
    for rest_name, fold_name in splits:
        rest, fold = (
            tasks_of(make(env_id, split=rest_name, **kwargs)),
            tasks_of(make(env_id, split=fold_name, **kwargs)),
        )
        assert fold and rest and not fold.keys() & rest.keys()
        assert pairs or fold.keys() | rest.keys() == train.keys()
        assert not groups_of(env_id, fold_name, kwargs) & groups_of(env_id, rest_name, kwargs)
        # The data give a few translations two groups: two programs translate other English words the same way.
        assert len(set(fold.values()) & set(rest.values())) <= 0.003 * len(train) * (
            env_id == "rollcast/Translation-v0"
        )
        covered.update(list(fold))
    assert set(covered.values()) == {1} and (pairs or covered.keys() == train.keys())
    parts = [groups_of(env_id, fold_name, kwargs) for _, fold_name in splits]
    assert set().union(*parts) == groups_of(env_id, "train", kwargs)


def groups_of(env_id: str, split: str, kwargs: dict[str, Any]) -> set[str]:
    """The groups that a split's tasks are of."""
    env: Any = make(env_id, split=split, **kwargs).unwrapped
    if isinstance(env, SingleTurnTask):
        return {str(record["group"]) for record in env.records}
    if env_id == "rollcast/Dialogue-v0":
        return {goal.group for goal in env.goals}
    return {country.group for question in env.questions for country in question.countries}


def rows_file(folder: Path, **more: Any) -> str:
    path = folder / "rows.jsonl"
    rows = ({"question": f"What is {n}?", "references": [str(n)], "topic": f"t{n // 4}"} | more for n in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("whole", [False, True], ids=["one file", "a file for each split"])
def test_data_of_the_user_have_them_too(tmp_path: Path, whole: bool) -> None:
    path = rows_file(tmp_path)
    data: Any = {"train": path, "validation": path} if whole else path
    fields = {"group": "topic"}
    train = open_records(data, WANTED, split="train", fields=fields)
    parts = [open_records(data, WANTED, split=f"fold-{part}/4", fields=fields) for part in (1, 2, 3, 4)]
    assert sum(map(len, parts)) == len(train) and {r["id"] for p in parts for r in p} == {r["id"] for r in train}
    topics = [{record["topic"] for record in part} for part in parts]
    assert sum(map(len, topics)) == len(set().union(*topics)), "records of one group are in one part"
    for number, part in enumerate(parts, start=1):
        rest = open_records(data, WANTED, split=f"train-{number}/4", fields=fields)
        ids = [record["id"] for record in rest]
        held_out = {record["id"] for record in part}
        assert ids == [record["id"] for record in train if record["id"] not in held_out], "in the order of train"


def test_a_column_decides_the_split_and_the_question_the_part(tmp_path: Path) -> None:
    path = rows_file(tmp_path, split="train")
    parts = [open_records(path, WANTED, split=f"fold-{part}/2") for part in (1, 2)]
    assert sum(map(len, parts)) == 200 and all(70 < len(part) < 130 for part in parts)
    assert all(fold_mark(record["question"].lower()) % 2 == 0 for record in parts[0])


def test_a_part_without_records_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"question": "one"}\n{"question": "two"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"2 rows of 2 groups in train, and part \d of 7 is empty. Do this: .*fewer"):
        for part in range(1, 8):
            open_records({"train": str(path)}, WANTED, split=f"fold-{part}/7")
    path.write_text('{"question": "one", "group": "a"}\n{"question": "two", "group": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="is all of it"):
        for part in (1, 2):
            open_records({"train": str(path)}, WANTED, split=f"train-{part}/2")
    for env_id in ("rollcast/ToolQA-v0", "rollcast/Dialogue-v0"):
        with pytest.raises(DataError, match="cut train into fewer parts"):
            for part in range(1, 1001):
                make(env_id, split=f"fold-{part}/1000")


def test_few_shot_examples_are_never_of_the_part_that_is_judged() -> None:
    rest, fold = (gymnasium.make("rollcast/QA-v0", split=name, few_shot=3).unwrapped for name in fold_names(2, 3))
    assert rest.few_shot == fold.few_shot and len(rest.few_shot) == 3  # type: ignore[attr-defined]
    shown = {question for question, _ in rest.few_shot}  # type: ignore[attr-defined]
    asked = {env.reset(options={"index": index})[0] for env in (rest, fold) for index in range(env.size)}  # type: ignore
    assert not shown & asked


def test_splits_are_what_they_were_without_parts() -> None:
    for split in SPLITS:
        assert portion_named(split).split == split and portion_named(split).parts == 1
