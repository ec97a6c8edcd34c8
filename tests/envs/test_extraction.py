"""`rollcast/Extraction-v0`: how an answer is read, what it earns, and entities of the user's own."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rollcast_envs.errors import DataError
from rollcast_envs.splits import SPLITS, Split
from rollcast_envs.tasks.extraction import ExtractionEnv, parsed, rendered
from rollcast_envs.text import Answered

HOSTILE = ["", ":", "::::", "LOC:", ": Rome", "LOC: \n" * 1000, "a: b\n" * 5000, "x" * 100_000, "🙂: 🙂", "\x00: \x00",
           "[{'type': 'LOC'}]", "-" * 5000, ";;;;", "LOC" * 9999 + ": Rome"]  # fmt: skip
RECORD = {"id": "1", "text": "...", "entities": [{"type": "LOC", "text": "New York"}, {"type": "PER", "text": "Ada"}]}


def make(**kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("rollcast/Extraction-v0", **kwargs)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("split", SPLITS)
def test_gymnasiums_checker_passes_and_references_earn_everything(split: Split) -> None:
    check_env(make(split=split).unwrapped)
    env = ExtractionEnv(split)
    for index in range(env.size or 0):
        text, info = env.reset(options={"index": index})
        assert all(line.partition(": ")[2] in text for line in info["references"][0].split("\n"))
        _, reward, terminated, truncated, after = env.step(info["references"][0])
        assert (reward, terminated, truncated) == (1.0, True, False) and after["rewards"] == {"f1": 1.0}
        assert after["metrics"] == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "exact": 1.0}


def test_two_hundred_random_episodes_and_equal_seeds() -> None:
    env, again = make(), make()
    env.action_space.seed(5)
    for seed in range(200):
        assert env.reset(seed=seed) == again.reset(seed=seed)
        assert 0 <= env.step(env.action_space.sample())[1] <= 1


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_earn_something_between_0_and_1(answer: str) -> None:
    env = make()
    env.reset(seed=1)
    assert 0 <= env.step(answer)[1] <= 1


@pytest.mark.parametrize(
    ("answer", "precision", "recall", "f1"),
    [
        ("LOC: New York\nPER: Ada", 1, 1, 1),
        ("PER: ada.\nLOC: the new york", 1, 1, 1),
        ("Here are the entities in it:\n1. **LOC**: New York\n2. Person - Ada", 1, 1, 1),
        ("place: New York; PER: Ada; PER: Ada", 1, 1, 1),
        ("LOC: New York", 1, 1 / 2, 2 / 3),
        ("LOC: New York\nLOC: Ada", 1 / 2, 1 / 2, 1 / 2),
        ("LOC: York\nPER: Ada\nORG: UN", 1 / 3, 1 / 2, 2 / 5),
        ("New York, Ada", 0, 0, 0),
        ("none", 0, 0, 0),
    ],
)
def test_what_an_answer_earns(answer: str, precision: float, recall: float, f1: float) -> None:
    verdict = ExtractionEnv("test").judge(RECORD, answer)
    assert verdict.rewards == {"f1": pytest.approx(f1)}
    told = {"precision": precision, "recall": recall, "f1": f1, "exact": float(f1 == 1)}
    assert verdict.metrics == {name: pytest.approx(value) for name, value in told.items()}


@pytest.mark.parametrize(("answer", "f1"), [("none", 1.0), ("", 1.0), ("There are none.", 1.0), ("LOC: Rome", 0.0)])
def test_a_text_that_names_nothing(answer: str, f1: float) -> None:
    env = ExtractionEnv("test")
    record = RECORD | {"entities": []}
    assert env.references(record) == ["none"] and env.judge(record, answer).rewards == {"f1": f1}


def test_what_is_rendered_is_read_back() -> None:
    entities = [("LOC", "Saint-Denis"), ("PER", "E. B.  White"), ("a:b", "Q: Who? (a play)"), ("ORG", "Smith;\nSons")]
    assert rendered(entities) == "LOC: Saint-Denis\nPER: E. B. White\na b: Q: Who? (a play)\nORG: Smith, Sons"
    assert parsed(rendered(entities)) == {("loc", "saint denis"), ("per", "e b white"), ("a b", "q who a play"),
                                          ("org", "smith sons")}  # fmt: skip


def test_the_corpus_figure_pools_all_entities() -> None:
    answered = [
        Answered("LOC: Rome", ("LOC: Rome\nPER: Ada",)),
        Answered("PER: Bob\nPER: Eve", ("PER: Bob",)),
        Answered("none", ("none",)),
    ]
    # Two of three said, two of three wanted.
    assert ExtractionEnv.corpus_metrics(answered)["entity_f1"].value == pytest.approx(2 / 3)


def test_the_system_turn_tells_form_and_types(tmp_path: Path) -> None:
    told = ExtractionEnv().system_prompt
    assert told is not None and "LOC (place), ORG (organisation), PER (person)" in told and "answer: none" in told
    assert ExtractionEnv(system_prompt="").system_prompt is None
    assert "The types are LOC (place), gene." in str(ExtractionEnv(types=["LOC", "gene"]).system_prompt)
    examples = ExtractionEnv(few_shot=2).few_shot
    assert len(examples) == 2 and all(":" in answer or answer == "none" for _, answer in examples)


def test_entities_of_ones_own(tmp_path: Path) -> None:
    listed = {"text": "BRCA1 and aspirin", "entities": ["gene: BRCA1", "drug: aspirin"]}
    objects = {"text": "TP53", "entities": [{"type": "gene", "text": "TP53", "start": 0}]}
    rows = [row | {"split": split} for split in SPLITS for row in (listed, objects, {"text": "Hm.", "entities": []})]
    env = ExtractionEnv("test", written(tmp_path / "own.jsonl", rows))
    found = {text: info["references"] for text, info in (env.reset(options={"index": i}) for i in range(3))}
    assert found == {
        "BRCA1 and aspirin": ["gene: BRCA1\ndrug: aspirin"],
        "TP53": ["gene: TP53"],
        "Hm.": ["none"],
    }
    assert "The types are drug, gene." in str(env.system_prompt)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    cells = ["Ada in Rome,PER: Ada; LOC: Rome", 'Oslo,"[""LOC: Oslo""]"', "Hm,none"]
    table.write_text("text,tags,split\n" + "".join(f"{c},{s}\n" for s in SPLITS for c in cells), encoding="utf-8")
    env = ExtractionEnv("validation", str(table), fields={"entities": "tags"})
    found = {text: info["references"][0] for text, info in (env.reset(options={"index": i}) for i in range(3))}
    assert found == {"Ada in Rome": "PER: Ada\nLOC: Rome", "Oslo": "LOC: Oslo", "Hm": "none"}


@pytest.mark.parametrize(
    "entities", [7, [7], ["Rome"], [{"type": "LOC"}], [{"type": 1, "text": "x"}], [[]], "[broken", ["LOC: ..."]]
)
def test_entities_of_another_form_are_refused_before_the_first_episode(tmp_path: Path, entities: Any) -> None:
    rows = [{"text": "Rome", "entities": entities, "split": "train"}]
    with pytest.raises(DataError, match=r"field 'entities'.*\"LOC: New York\""):
        ExtractionEnv("train", written(tmp_path / "own.jsonl", rows))


@pytest.mark.parametrize("types", ["LOC", []])
def test_types_are_a_list(types: Any) -> None:
    with pytest.raises(ValueError, match="expected a list"):
        ExtractionEnv(types=types)
