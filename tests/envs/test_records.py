"""Records of any data set: formats, splits, mappings, what is refused and in which words, and the memory it takes."""

import copy
import csv
import json
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rollcast_envs.columnar import HubDataset
from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Records, open_records
from rollcast_envs.splits import SPLITS, Split, position, split_of

Rows = list[dict[str, Any]]

WANTED = (
    Field("question", "text", "the question"),
    Field("references", "texts", "accepted answers, the preferred one first"),
    Field("context", "text", "what to read", required=False),
)
TEXT_FORMATS = ("jsonl", "json", "csv", "tsv")
FORMATS = (*TEXT_FORMATS, "ndjson", "parquet")


def rows_of(count: int, **more: Any) -> Rows:
    return [{"id": f"q{n}", "question": f"What is {n}?", "references": [f"{n}", f"n {n}"]} | more for n in range(count)]


def write(path: Path, rows: Rows) -> str:
    """The rows in the format of the path's ending; lists in cells as JSON."""
    match path.suffix:
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        case _:
            write_cells(path, rows)
    return str(path)


def write_cells(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows)


def every(data: str | Mapping[str, str], fields: Mapping[str, str] | None = None) -> dict[Split, Rows]:
    return {split: list(open_records(data, WANTED, split=split, fields=fields)) for split in SPLITS}


def refusal(data: Any, fields: Mapping[str, str] | None = None, split: Split = "train") -> DataError:
    with pytest.raises(DataError) as caught:
        open_records(data, WANTED, split=split, fields=fields)
    return caught.value


def says(error: DataError, *parts: str) -> bool:
    text = str(error)
    assert all(part in text for part in parts), text
    return bool(error.what and error.why and error.fix)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


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


def squad(*asked: dict[str, Any]) -> dict[str, Any]:
    paragraph = {"context": "The Normans gave their name to Normandy.", "qas": list(asked)}
    return {"version": "any", "data": [{"title": "Normans", "paragraphs": [paragraph]}]}


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


# What is odd and can be read.


@pytest.mark.parametrize("ending", TEXT_FORMATS)
def test_a_byte_order_mark_is_skipped_and_told(tmp_path: Path, ending: str) -> None:
    path = Path(write(tmp_path / f"marked.{ending}", rows_of(30)))
    clean = every(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.warns(
        UserWarning, match=rf"marked\.{ending}: line 1 begins with a byte-order mark, which was skipped$"
    ):
        assert every(str(path)) == clean


@pytest.mark.parametrize("ending", TEXT_FORMATS)
def test_cr_lf_is_read_as_lf(tmp_path: Path, ending: str) -> None:
    path = Path(write(tmp_path / f"ends.{ending}", rows_of(30)))
    clean = every(str(path))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    if ending in ("csv", "tsv"):  # Their own line end: nothing to warn of.
        assert every(str(path)) == clean
        return
    with pytest.warns(UserWarning, match=rf"ends\.{ending}: line 1 ends in CR LF, which was read as LF$"):
        assert every(str(path)) == clean


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_blank_lines_are_skipped(tmp_path: Path, ending: str) -> None:
    path = Path(write(tmp_path / f"blank.{ending}", rows_of(30)))
    clean = every(str(path))
    first, second, rest = path.read_text().split("\n", 2)
    path.write_text(f"{first}\n{second}\n\n  \n{rest}\n")
    with pytest.warns(UserWarning, match=rf"blank\.{ending}: line 3 is blank; blank lines were skipped$"):
        assert every(str(path)) == clean


@pytest.mark.parametrize(
    ("ending", "place"),
    [("jsonl", "line 4"), ("csv", "line 5"), ("parquet", "row 4"), ("json", r"line \d+ \(item 4\)")],
)
def test_ids_that_are_there_twice_become_ids_of_their_own(tmp_path: Path, ending: str, place: str) -> None:
    rows = [row | {"id": "same" if n in (1, 3, 4) else row["id"]} for n, row in enumerate(rows_of(6))]
    data = {"train": write(tmp_path / f"twice.{ending}", rows)}
    message = rf"twice\.{ending}: {place} has the id of an earlier row; such rows got ids of their own, as 'same#4'$"
    with pytest.warns(UserWarning, match=message):
        records = open_records(data, WANTED, split="train")
    ids = [record["id"] for record in records]
    assert sorted(ids) == ["q0", "q2", "q5", "same", "same#4", "same#5"]
    assert ids == sorted(ids, key=position)


def test_a_file_is_warned_of_once(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [json.dumps(row | {"id": "x"}) for row in rows_of(40)]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    with pytest.warns(UserWarning) as told:
        splits = every(str(path))
    assert len(told) == 1 and str(told[0].message).count("; ") == 5
    assert sum(map(len, splits.values())) == 40


# What is refused.


@pytest.mark.parametrize("ending", FORMATS)
def test_an_empty_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"nothing.{ending}"
    path.touch()
    assert says(refusal(str(path)), str(path), "is empty", "at least one row")


def test_a_file_without_rows_is_refused(tmp_path: Path, quiet: None) -> None:
    contents = {"a.jsonl": "\n \n", "b.jsonl": "\ufeff", "c.json": "[]", "d.json": '{"data": []}', "e.csv": "\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert says(refusal(str(tmp_path / name)), name, "has no rows", "at least one row")
    (tmp_path / "f.tsv").write_text("question\treferences\n")
    assert says(refusal(str(tmp_path / "f.tsv")), "f.tsv", "a header but no rows", "below the header")
    pyarrow.parquet.write_table(pyarrow.table({"question": pyarrow.array([], "string")}), tmp_path / "g.parquet")
    assert says(refusal(str(tmp_path / "g.parquet")), "g.parquet", "has no rows")


@pytest.mark.parametrize("ending", FORMATS)
def test_one_row_is_a_file_with_empty_splits(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"one.{ending}", rows_of(1))
    own = split_of("what is 0?")
    assert [record["id"] for record in open_records(path, WANTED, split=own)] == ["q0"]
    for split in set(SPLITS) - {own}:
        error = refusal(path, split=split)
        assert says(
            error, path, f"no records for {split!r}", "its 1 rows", f"{own} 1", f"{split} 0", "a column `split`"
        )


MISSING: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "a.jsonl",
        '{"question": "q", "references": "r"}\n\n{"question": "q"}\n',
        ("line 3", "'references'", "'question'"),
    ),
    ("b.jsonl", '{"question": null, "references": "r"}\n', ("line 1", "'question'", "is null", "fill it in")),
    ("c.json", '[\n {"question": "q", "references": "r"},\n {"references": "r"}\n]', ("line 3 (item 2)", "'question'")),
    ("d.csv", "question,references\nq,r\nq\n", ("line 3", "has 1 cell", "has 2", "'question', 'references'")),
    ("e.tsv", "question\treferences\nq\tr\nq\tr\tx\n", ("line 3", "has 3 cells", "quote cells")),
    ("f.csv", "question,answer\nq,r\n", ("line 2", "'references'", "'question', 'answer'", "fields = {")),
    ("g.csv", "Question,references\nq,r\n", ("line 2", "'question'", 'fields = {"question": "Question"}')),
]


@pytest.mark.parametrize(("name", "text", "parts"), MISSING, ids=[name for name, *_ in MISSING])
def test_a_missing_field_is_refused(tmp_path: Path, quiet: None, name: str, text: str, parts: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text)
    assert says(refusal(str(tmp_path / name)), name, *parts)


def test_a_missing_field_of_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gaps.parquet", [*rows_of(12), {"id": "x", "question": None, "references": []}])
    assert says(refusal(path), "gaps.parquet, row 13", "'question'", "is null", "leave the row out")


WRONG: list[tuple[str, Any, str, str, str]] = [
    ("question", 42, "a number (42)", 'quote it: "42"', "jsonl json parquet"),
    ("question", True, "true or false (True)", 'quote it: "true"', "jsonl json parquet"),
    ("question", ["q"], "a list (['q'])", "one string", "jsonl json parquet"),
    ("question", "  ", "is empty", "fill it in", "jsonl json parquet csv tsv"),
    ("references", 42, "a number (42)", '["Paris", "42"]', "jsonl json parquet"),
    ("references", [1, 2], "a list ([1, 2])", "quoted texts", "jsonl json parquet csv tsv"),
    ("references", "", "an empty text", "an empty list: []", "jsonl json parquet csv tsv"),
    ("references", "['a', 'b']", "not JSON: \"['a', 'b']\"", "double quotes", "csv tsv"),
    ("context", 3.5, "a number (3.5)", 'quote it: "3.5"', "jsonl json parquet"),
    ("id", {"a": 1}, "an object ({'a': 1})", "text or a number", "jsonl json parquet"),
    ("split", "eval", "is 'eval'", "dev and val are validation", "jsonl json parquet csv tsv"),
]


@pytest.mark.parametrize(
    ("name", "value", "why", "fix", "ending"),
    [(*case, ending) for *case, endings in WRONG for ending in endings.split()],
)
def test_a_wrong_value_is_refused(tmp_path: Path, name: str, value: Any, why: str, fix: str, ending: str) -> None:
    path = write(tmp_path / f"wrong.{ending}", [{"context": "c"} | rows_of(1)[0] | {name: value}])
    place = {"jsonl": "line 1", "json": "line 2 (item 1)", "parquet": "row 1"}.get(ending, "line 2")
    error = refusal(path)
    assert error.what == f"{path}, {place}, field {name!r}"
    assert why in error.why and fix in error.fix


@pytest.mark.parametrize("ending", FORMATS)
def test_a_cell_of_ten_megabytes_is_refused(tmp_path: Path, ending: str) -> None:
    rows = rows_of(3, note="small")
    rows[1]["note"] = "x" * 10 * 2**20
    path = write(tmp_path / f"huge.{ending}", rows)
    place = {"json": "line 11 (item 2)", "parquet": "row 2", "csv": "line 3", "tsv": "line 3"}.get(ending, "line 2")
    error = refusal(path)
    assert error.what == f"{path}, {place}, field 'note'"
    assert says(error, "10,485,760 characters", "at most 1,000,000", "shorten it") and len(str(error)) < 500


def test_the_longest_cell_that_fits_is_read(tmp_path: Path) -> None:
    rows = rows_of(2, note="é" * 1_000_000)
    for ending in FORMATS:
        records = open_records({"train": write(tmp_path / f"long.{ending}", rows)}, WANTED, split="train")
        assert [len(record["note"]) for record in records] == [1_000_000] * 2


BROKEN: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("a.jsonl", b'{"question": "q", "references": "r"}\n{"question": "q",\n', ("line 2", "broken JSON", "the end")),
    ("b.jsonl", b'{"question": "q" "references": "r"}\n', ("line 1", "column 18", "',' delimiter", "mend the line")),
    ("c.jsonl", b"\n[1, 2]\n", ("line 2", "a list ([1, 2])", "an object belongs", ".json")),
    ("d.jsonl", b"[" * 200_000, ("line 1", "JSON that cannot be read")),
    ("e.jsonl", b'{"question": "q", "references": "r", "n": ' + b"9" * 5000 + b"}", ("line 1", "cannot be read")),
    ("f.json", b'[\n{"question": "q"},\n{"question" "q"}]', ("line 3", "broken JSON")),
    ("g.json", b'{"question": "q"}\n{"question": "r"}\n', ("line 2", "broken JSON", "named .jsonl")),
    ("h.json", b'{"question": "q"}', ("h.json", "neither in SQuAD's format nor a list", "named .jsonl")),
    ("i.json", b'[\n"q"]', ("line 2 (item 1)", "text ('q')", "an object belongs")),
    ("j.csv", b'question,references\nq,r\n"q,r\nq,r\n', ("line 3", "unexpected end of data", "close every quote")),
    ("k.csv", b'question,references\nq,r\n"q"x,r\n', ("line 3", "row that begins here is broken", "close every quote")),
    ("l.csv", b"question,question\nq,r\n", ("line 1", "'question' twice", "rename")),
    ("m.jsonl", b'{"question": "q", "references": "r"}\n{"question": "caf\xe9"}\n', ("line 2", "not UTF-8", "\\xe9")),
    ("n.csv", b"question,references\n\xff,r\n", ("line 2", "not UTF-8", "save the file as UTF-8")),
    ("o.json", b'[\n{"question": "\xff"}]', ("line 2", "not UTF-8")),
    ("p.jsonl", '{"question": "q"}\n'.encode("utf-16"), ("line 1", "UTF-16", "save the file as UTF-8")),
    ("q.csv", b"question,references\nq,r\nq\0,r\n", ("line 3", "NUL byte", "without NUL")),
    ("r.json", b'[\n\n{"question": "\0"}]', ("line 3", "NUL byte")),
    ("s.jsonl", b'{"question": "a\\u0000b", "references": "r"}\n', ("line 1", "'question'", "NUL character")),
    ("t.jsonl", b'{"question": "q", "references": ["\\ud83d"]}\n', ("line 1", "'references'", "surrogate")),
    (
        "u.parquet",
        b"PAR1 but no more than that PAR1",
        ("u.parquet", "cannot be read as Parquet", "write the file again"),
    ),
]


@pytest.mark.parametrize(("name", "raw", "parts"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_a_broken_file_is_refused(tmp_path: Path, quiet: None, name: str, raw: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(raw)
    assert says(refusal(str(tmp_path / name)), name, *parts)


def test_parquet_that_breaks_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "torn.parquet", rows_of(50)))
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + bytes(200) + raw[204:])
    assert says(refusal(str(path)), "torn.parquet", "cannot be read as Parquet")


SQUAD: list[tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = [
    (lambda asked: asked.pop("answers"), ("data[0].paragraphs[0].qas[1]", "'answers'", "no such field")),
    (lambda asked: asked.update(answers=[]), ("qas[1]", "'answers'", "is empty", '"is_impossible": true')),
    (lambda asked: asked.update(answers="x"), ("qas[1], field 'answers'", "text ('x')", "a list belongs")),
    (lambda asked: asked.update(answers=[{}]), ("qas[1].answers[0]", "'text'", "no such field")),
    (lambda asked: asked.update(question=7), ("qas[1], field 'question'", "a number (7)", "quote it")),
]


@pytest.mark.parametrize(("spoil", "parts"), SQUAD, ids=[parts[0] + parts[-1] for _, parts in SQUAD])
def test_broken_squad_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], parts: tuple[str, ...]
) -> None:
    asked = [
        {"id": str(n), "question": f"Who is {n}?", "answers": [{"text": "a", "answer_start": 0}]} for n in range(3)
    ]
    spoil(asked[1])
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad(*asked)))
    assert says(refusal(str(path)), "squad.json", *parts)


def test_a_split_is_on_every_row_or_on_none(tmp_path: Path) -> None:
    rows = rows_of(3)
    with_gap = write(
        tmp_path / "gap.jsonl", [row | ({"split": "train"} if n < 2 else {}) for n, row in enumerate(rows)]
    )
    late = write(tmp_path / "late.jsonl", [row | ({"split": "train"} if n == 1 else {}) for n, row in enumerate(rows)])
    assert says(refusal(with_gap), "line 3, field 'split'", "in some rows but not here", "on every row")
    assert says(refusal(late), "line 2, field 'split'", "not in the rows before", "on none")


def test_mappings_name_fields_and_columns_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "mapped.jsonl", [{"body": "q", "answers": {"text": ["a"]}}])
    error = refusal(path, {"querstion": "body"})
    assert says(error, "no field 'querstion'", "question (the question)", "write 'question'")
    error = refusal(path, {"question": "bdy", "references": "answers.text"})
    assert says(error, "line 1, field 'question'", "no column 'bdy'", "'body', 'answers'", '{"question": "body"}')
    error = refusal(path, {"question": "body", "references": "answers.txt"})
    assert says(error, "'references'", "no column 'answers.txt'", '{"references": "answers.text"}')
    mapping = {"question": "body", "references": "answers.text"}
    for optional in ("context", "group"):
        error = refusal(path, mapping | {optional: "passage"})
        assert says(error, f"mapped.jsonl, field {optional!r}", "no column 'passage'", "'body'", "fields = {")


def test_what_is_no_data_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "facts.jsonl", rows_of(1))
    (tmp_path / "facts.txt").write_text("text")
    assert says(refusal(str(tmp_path)), "is a folder", "one file in it", "'facts.jsonl'")
    assert says(refusal(str(tmp_path / "facts.txt")), "facts.txt", "ends in '.txt'", ".jsonl", ".parquet")
    assert says(refusal(str(tmp_path / "fact.jsonl")), "no such file", "did you mean 'facts.jsonl'")
    assert says(refusal(str(tmp_path / "xyz.csv")), "no such file", "check the path", "'facts.jsonl'")
    assert says(refusal(str(tmp_path / "no" / "a.csv")), "no such file", f"{str(tmp_path / 'no')!r} does not exist")
    assert says(refusal("/dev/null"), "no regular file")
    assert says(refusal("x" * 5000 + ".csv"), "no such file")


def test_libraries_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "some.parquet", rows_of(1))
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("squad", "org/name", "org/name:config"):
        error = refusal(name)
        assert says(error, f"data = {name!r}", "is no file", "not installed", "check the name, or pip install datasets")
    assert says(refusal(path), "some.parquet", "needs the library pyarrow", "pip install pyarrow")


def test_a_hugging_face_data_set_is_read_like_a_file() -> None:
    datasets = pytest.importorskip("datasets", reason="`datasets` is the user's to install")
    rows = rows_of(20, score=float("inf"))
    source = HubDataset("org/name", "train", datasets.Dataset.from_list([row | {"raw": b"x"} for row in rows]))
    expected = [row | {"score": None} for row in rows]
    assert list(source.scan()) == expected == [source.read(number) for number in range(20)]
    assert source.at(2) == "Hugging Face data set 'org/name', its split 'train', row 3"
    assert source.notes == {"bytes": "the columns 'raw' hold bytes and were left out"}
