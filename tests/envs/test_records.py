"""Records of any data set: formats, splits, mappings, one index a process, and the memory it takes."""

import copy
import json
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from record_files import FORMATS, WANTED, every, refusal, rows_of, says, squad, write
from rollcast_envs.columnar import HubDataset
from rollcast_envs.errors import DataError
from rollcast_envs.records import Records, open_records
from rollcast_envs.splits import SPLITS, position, split_of

# What is read.


def test_all_formats_give_the_same_records(tmp_path: Path) -> None:
    rows = rows_of(60, note='quoted "cell", over\ntwo lines; Zürich 東京 🙂')
    found = [every(write(tmp_path / f"facts.{ending}", rows)) for ending in FORMATS]
    assert all(other == found[0] for other in found)
    assert sorted((row for part in found[0].values() for row in part), key=lambda row: row["id"]) == sorted(
        rows, key=lambda row: row["id"]
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_splits_are_disjoint_stable_and_ordered_by_hash(tmp_path: Path, ending: str) -> None:
    rows = rows_of(80)
    before = every(write(tmp_path / f"few.{ending}", rows[:40]))
    after = every(write(tmp_path / f"more.{ending}", rows[::-1]))
    for split in SPLITS:
        ids = [record["id"] for record in after[split]]
        assert ids == sorted(ids, key=position)
        assert {record["id"] for record in before[split]} <= set(ids)
    assert sum(map(len, after.values())) == 80 == len({r["id"] for part in after.values() for r in part})


def test_the_group_decides_the_split(tmp_path: Path) -> None:
    rows = [row | {"group": f"g{n // 5}", "topic": f"t{n // 10}"} for n, row in enumerate(rows_of(400))]
    path = write(tmp_path / "grouped.jsonl", rows)
    for column, fields in (("group", None), ("topic", {"group": "topic"})):
        for split, records in every(path, fields).items():
            assert records and all(split_of(record[column]) == split for record in records)


def test_records_that_ask_the_same_are_in_one_split(tmp_path: Path) -> None:
    forms = ("Is it {n}?", "is it {n}? ", "IS IT {n}?")
    rows = [{"question": form.format(n=n), "references": [str(n)]} for form in forms for n in range(40)]
    splits = every(write(tmp_path / "asked.csv", rows))
    asked = [{record["question"].strip().lower() for record in records} for records in splits.values()]
    assert sum(map(len, asked)) == 40 and sum(map(len, splits.values())) == 120


@pytest.mark.parametrize("ending", FORMATS)
def test_a_column_decides_the_split(tmp_path: Path, ending: str) -> None:
    names = ("train", "dev", "test", "val", "validation", "Train")
    rows = [row | {"split": names[n % 6]} for n, row in enumerate(rows_of(12))]
    splits = every(write(tmp_path / f"named.{ending}", rows))
    assert {split: len(records) for split, records in splits.items()} == {"train": 4, "validation": 6, "test": 2}
    assert {record["split"] for record in splits["validation"]} == {"dev", "val", "validation"}


def test_a_file_for_each_split_is_used_whole(tmp_path: Path) -> None:
    data = {
        "train": write(tmp_path / "a.jsonl", rows_of(30, split="test")),
        "dev": write(tmp_path / "b.csv", rows_of(1)),
    }
    assert len(open_records(data, WANTED, split="train")) == 30
    assert [r["id"] for r in open_records(data, WANTED, split="validation")] == ["q0"]
    assert says(refusal(data, split="test"), "no split 'test'", "'train', 'validation'", '"test": ...')
    assert says(refusal({"trian": data["train"]}), "'trian'", "train, validation, test")


def test_rows_without_an_id_are_named_by_file_and_number(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "references": "x"} for n in range(3)]
    for ending in FORMATS:
        records = open_records({"train": write(tmp_path / f"bare.{ending}", rows)}, WANTED, split="train")
        assert {r["id"]: r["question"] for r in records} == {f"bare:{n + 1}": f"What is {n}?" for n in range(3)}
        assert all(record["references"] == ["x"] for record in records)


def test_columns_are_mapped_and_the_others_stay(tmp_path: Path) -> None:
    row = {"key": 7, "body": "Why?", "answers": {"text": ["a", "b"], "start": [1]}, "marks": [{"by": "x"}, {"by": "y"}]}
    fields = {"id": "key", "question": "body", "references": "answers.text"}
    for ending in ("jsonl", "json", "parquet"):
        data = {"train": write(tmp_path / f"nested.{ending}", [row])}
        (record,) = open_records(data, WANTED, split="train", fields=fields)
        assert record == row | {"id": "7", "question": "Why?", "references": ["a", "b"]}
        (record,) = open_records(data, WANTED, split="train", fields=fields | {"references": "marks.by"})
        assert record["references"] == ["x", "y"]


def test_a_column_name_with_a_dot_goes_before_a_path(tmp_path: Path) -> None:
    path = tmp_path / "dots.csv"
    path.write_text("question,answers.text\nWhy?,because\n")
    (record,) = open_records({"train": str(path)}, WANTED, split="train", fields={"references": "answers.text"})
    assert record["references"] == ["because"]


def test_cells_are_text_or_lists_of_text(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text('question,references,context,n\n42,"[""a"", ""b""]",,1\n[x],[],"",2\nc,[sic] yes,1.5,3\n')
    records = {r["question"]: r for r in open_records({"train": str(path)}, WANTED, split="train")}
    assert [records[q]["references"] for q in ("42", "[x]", "c")] == [["a", "b"], [], ["[sic] yes"]]
    assert [records[q].get("context") for q in ("42", "[x]", "c")] == [None, None, "1.5"]
    assert records["42"]["n"] == "1"


def test_optional_fields_are_absent_where_a_row_lacks_them(tmp_path: Path) -> None:
    rows = [row | {"context": None} for row in rows_of(2)]
    for ending in FORMATS:
        records = open_records({"train": write(tmp_path / f"optional.{ending}", rows)}, WANTED, split="train")
        assert len(records) == 2 and not any("context" in record for record in records)


def test_values_are_json_whatever_the_file_holds(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    row = rows_of(1)[0] | {"when": date(2026, 1, 2), "price": Decimal("1.50"), "score": float("nan")}
    path = write(tmp_path / "typed.parquet", [row | {"image": b"\x00\x01", "nested": {"raw": b"x"}}])
    with pytest.warns(UserWarning, match=r"typed\.parquet: the columns 'image', 'nested' hold bytes and were left out"):
        (record,) = open_records({"train": path}, WANTED, split="train")
    assert record == row | {"when": "2026-01-02", "price": "1.50", "score": None}
    lines = tmp_path / "typed.jsonl"
    lines.write_text('{"question": "q", "references": [], "score": NaN}\n')
    assert open_records({"train": str(lines)}, WANTED, split="train")[0]["score"] is None


def test_squad_1_1(tmp_path: Path) -> None:
    answers = [{"text": "Normandy", "answer_start": 31}, {"text": "Normandy", "answer_start": 31}]
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps(squad({"id": "56dd", "question": "Where?", "answers": answers})))
    (record,) = open_records({"train": str(path)}, WANTED, split="train")
    assert record == {
        "id": "56dd",
        "question": "Where?",
        "references": ["Normandy"],
        "context": "The Normans gave their name to Normandy.",
        "is_impossible": False,
        "answers": answers,
        "title": "Normans",
        "group": "Normans",
    }
    assert len(open_records(str(path), WANTED, split=split_of("Normans"))) == 1


def test_squad_2_0_has_questions_without_an_answer(tmp_path: Path) -> None:
    asked = {"id": "5ad", "question": "Who?", "answers": [], "is_impossible": True}
    asked["plausible_answers"] = [{"text": "Normans", "answer_start": 4}]
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(squad(asked)))
    (record,) = open_records({"train": str(path)}, WANTED, split="train")
    assert record["references"] == [] and record["is_impossible"] is True
    assert record["plausible_answers"] == asked["plausible_answers"]


def test_each_read_gives_objects_of_its_own(tmp_path: Path) -> None:
    for ending in FORMATS:
        records = open_records({"train": write(tmp_path / f"own.{ending}", rows_of(3))}, WANTED, split="train")
        records[0]["references"].append("spoilt")
        records[0]["more"] = 1
        assert "spoilt" not in records[0]["references"] and "more" not in records[0]


def test_records_are_a_sequence(tmp_path: Path) -> None:
    records = open_records({"train": write(tmp_path / "some.csv", rows_of(5))}, WANTED, split="train")
    assert records[-1] == records[4] and records[1:3] == [records[1], records[2]]
    assert list(reversed(records)) == records[::-1] and records[2] in records
    with pytest.raises(IndexError):
        records[5]
    assert Records([{"id": "a"}])[0] == {"id": "a"}


def test_a_link_and_other_cases_of_the_ending_are_fine(tmp_path: Path) -> None:
    write(tmp_path / "real.jsonl", rows_of(2))
    (tmp_path / "link.JSONL").symlink_to(tmp_path / "real.jsonl")
    assert len(open_records({"train": str(tmp_path / "link.JSONL")}, WANTED, split="train")) == 2


# One index a process.


def whole(records: Records) -> Any:
    return records._records.whole  # type: ignore[attr-defined]


def test_a_source_is_indexed_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "shared.jsonl", rows_of(40))
    first = open_records(path, WANTED, split="train")
    assert whole(first) is whole(open_records(path, list(WANTED), split="test"))
    assert whole(first) is not whole(open_records(path, WANTED[:2], split="train"))
    kept = list(first)
    replacement = write(tmp_path / "new.jsonl", rows_of(50))
    Path(replacement).replace(path)
    second = open_records(path, WANTED, split="train")
    assert len(second) > len(first) and list(first) == kept


def test_a_file_that_changes_under_a_reader_is_refused(tmp_path: Path) -> None:
    for ending in ("jsonl", "csv"):
        path = Path(write(tmp_path / f"edited.{ending}", rows_of(40)))
        records = open_records(str(path), WANTED, split="train")
        text = path.read_text()
        with path.open("r+") as file:
            file.write(text.replace("q0", "a longer id"))
        with pytest.raises(DataError, match=r"(?s)edited.*was changed while it was in use.*start again"):
            list(records)


def test_records_are_copied_and_pickled_by_opening_again(tmp_path: Path) -> None:
    records = open_records(write(tmp_path / "copied.jsonl", rows_of(40)), WANTED, split="test")
    assert list(pickle.loads(pickle.dumps(records))) == list(copy.deepcopy(records)) == list(records)


@pytest.mark.parametrize("ending", FORMATS)
def test_threads_share_one_index_and_read_at_once(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"threads.{ending}", rows_of(200))

    def play(seed: int) -> tuple[int, list[bool]]:
        records = open_records(path, WANTED, split="train")
        rng = random.Random(seed)
        chosen = [records[rng.randrange(len(records))] for _ in range(50)]
        return id(whole(records)), [record["question"] == f"What is {record['id'][1:]}?" for record in chosen]

    with ThreadPoolExecutor(16) as pool:
        played = list(pool.map(play, range(32)))
    assert len({index for index, _ in played}) == 1 and all(all(right) for _, right in played)


MEASURE = """
import random, resource, sys
from rollcast_envs.records import Field, open_records
wanted = [Field("question", "text", "the question"), Field("references", "texts", "answers")]
records = open_records(sys.argv[1], wanted, split="train")
found = [records[random.randrange(len(records))]["question"] for _ in range(2000)]
print(len(records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_large_file_stays_on_the_disk(tmp_path: Path) -> None:
    """100 MB of JSON lines may take 50 MB more than twenty rows; 6 were measured."""
    block = "".join(
        json.dumps({"question": f"Is {n}? {'word ' * 400}", "references": ["yes"]}) + "\n" for n in range(200)
    )
    (tmp_path / "small.jsonl").write_text(block)
    (tmp_path / "large.jsonl").write_text(block * (100_000_000 // len(block)))
    sizes, peaks = zip(*(measured(tmp_path / f"{name}.jsonl") for name in ("small", "large")), strict=True)
    assert sizes[0] < 200 and sizes[1] > 30_000
    assert peaks[1] - peaks[0] < 50


def measured(path: Path) -> tuple[int, int]:
    """How many records its train split has, and the peak memory of a process that reads some of them, in MiB."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=paths())
    assert not done.returncode, done.stderr
    count, peak = map(int, done.stdout.split())
    return count, peak


def paths() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[2] / "envs")}


def test_a_hugging_face_data_set_is_read_like_a_file() -> None:
    datasets = pytest.importorskip("datasets", reason="`datasets` is the user's to install")
    rows = rows_of(20, score=float("inf"))
    source = HubDataset("org/name", "train", datasets.Dataset.from_list([row | {"raw": b"x"} for row in rows]))
    expected = [row | {"score": None} for row in rows]
    assert list(source.scan()) == expected == [source.read(number) for number in range(20)]
    assert source.at(2) == "Hugging Face data set 'org/name', its split 'train', row 3"
    assert source.notes == {"bytes": "the columns 'raw' hold bytes and were left out"}
