"""`rollcast/ToolQA-v0` on questions of the user's: tables to look up in, rewards, and records that are refused."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.errors import DataError
from rollcast_envs.tasks.multi_turn import exchanges
from rollcast_envs.tasks.tool_qa import ToolQAEnv, written

PRICES = {"Widget": {"price": 9.5, "Colour": "blue"}, "Gadget XL": {"price": 6.5, "stock": 12}}
SUM: dict[str, Any] = {
    "id": "sum",
    "question": "What do two Widgets and a Gadget XL cost?",
    "references": ["25.50"],
    "table": PRICES,
    "needed": [["Widget", "price"], ["gadget xl", "price"]],
    "expression": "2 * 9.5 + 6.5",
    "split": "train",
}
COLOUR: dict[str, Any] = {
    "id": "colour",
    "question": "Which colour has the Widget?",
    "references": ["blue"],
    "table": PRICES,
    "needed": [["Widget", "colour"]],
    "kind": "word",
    "split": "train",
}


def data_of(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "prices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def opened(folder: Path, row: dict[str, Any], **kwargs: Any) -> ToolQAEnv:
    env = ToolQAEnv(data=data_of(folder, row), **kwargs)
    env.reset(options={"index": 0})
    return env


def look_up(entry: str, field: str) -> str:
    return written("lookup", entry=entry, field=field)


def test_it_keeps_gymnasiums_contract(tmp_path: Path) -> None:
    env = gymnasium.make("rollcast/ToolQA-v0", data=data_of(tmp_path, SUM, COLOUR)).unwrapped
    check_env(env)
    assert {env.reset(seed=seed)[1]["task_id"] for seed in range(20)} == {"sum", "colour"}


def test_the_demonstration_solves_it(tmp_path: Path) -> None:
    env = ToolQAEnv(data=data_of(tmp_path, SUM, COLOUR))
    for index in (0, 1):
        _, info = env.reset(options={"index": index})
        rewards = []
        for answer in env.demonstration():
            _, reward, terminated, _, last = env.step(answer)
            rewards.append(reward)
        assert terminated and last["metrics"]["correct"] == 1.0 and last["metrics"]["malformed"] == 0.0
        assert sum(rewards) == pytest.approx(1.1 + 0.1 * (info["task_id"] == "sum"))
        assert info["kind"] == ("word" if info["task_id"] == "colour" else "") and info["fields"]["question"]


def test_the_tools_are_told_by_their_arguments_and_answer_in_words(tmp_path: Path) -> None:
    env = opened(tmp_path, SUM)
    assert env.system_prompt is not None and "lookup(entry, field)" in env.system_prompt
    assert "countr" not in f"{env.system_prompt}{env.tools}"
    said, reward, *_ = env.step(look_up("WIDGET ", "Price"))
    assert (said, reward) == ("price of Widget: 9.5", pytest.approx(0.1))
    assert env.step(look_up("Gadget XL", "stock"))[:2] == ("stock of Gadget XL: 12", 0.0)
    assert env.step(look_up("Gizmo", "price"))[0] == "error: there is no entry 'Gizmo'"
    assert env.step(look_up("Widget", "weight"))[0] == "error: there is no field 'weight'; there are price, colour"
    said, reward, *_ = env.step(written("lookup", country="Widget", field="price"))
    assert said == "error: lookup takes entry and field" and reward == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("25.50", "They cost 25.5 in all.", 1.0),
        ("25.50", "25.6", 1.0),
        ("25.50", "26", 0.0),
        ("25.50", "nothing", 0.0),
        ("3", "3", 1.0),
        ("3", "2.9", 0.0),
        ("1,200", "1200", 1.0),
        ("dark blue", "blue", 2 / 3),
        ("dark blue", "The answer is 7", 0.0),
    ],
)
def test_numbers_are_compared_as_numbers_and_words_as_words(
    tmp_path: Path, reference: str, answer: str, score: float
) -> None:
    env = opened(tmp_path, SUM | {"references": [reference]})
    assert env.step(answer)[1] == pytest.approx(score)


def test_cells_of_a_table_hold_json(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    cells = [json.dumps(COLOUR[name]).replace('"', '""') for name in ("table", "needed")]
    path.write_text(f'question,references,table,needed\nWhich?,blue,"{cells[0]}","{cells[1]}"\n', encoding="utf-8")
    env = ToolQAEnv(data={"train": str(path)})
    assert [answer for _, answer in exchanges(env, 0)] == [look_up("Widget", "colour"), "blue"]


def test_examples_are_of_the_train_split(tmp_path: Path) -> None:
    env = ToolQAEnv("validation", data=data_of(tmp_path, SUM, COLOUR | {"split": "validation"}), few_shot=1)
    assert env.few_shot[0][0] == SUM["question"] and env.few_shot[-1][1] == "25.50"


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"references": []}, ("'references'", "is empty")),
        ({"table": [1]}, ("'table'", "[1]", '{"Widget": {"price": 9.5}}')),
        ({"table": {"Widget": 7}}, ("'table'", '{"Widget": {"price": 9.5}}')),
        ({"table": "{"}, ("'table'", "no JSON")),
        ({"needed": 7}, ("'needed'", "not all in the table")),
        ({"needed": [["Gizmo", "price"]]}, ("'needed'", "Gizmo", "order in which to look them up")),
        ({"needed": [["Widget", "weight"]]}, ("'needed'", "weight")),
        ({"needed": [["Widget"]]}, ("'needed'", "[['Widget']]")),
        ({"expression": "import os"}, ("'expression'", "import os", "write arithmetic")),
    ],
)
def test_a_record_that_cannot_be_asked_is_refused(
    tmp_path: Path, changed: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as caught:
        ToolQAEnv(data=data_of(tmp_path, COLOUR, SUM | changed))
    assert "record 'sum'" in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value


def test_kinds_are_of_the_built_in_questions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave it out with data"):
        ToolQAEnv(data=data_of(tmp_path, SUM), kinds=["sum"])
