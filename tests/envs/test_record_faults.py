"""Records that are odd are read with a warning, and what is wrong with data is refused: where, why, and what to do."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from record_files import FORMATS, TEXT_FORMATS, WANTED, every, refusal, rows_of, says, squad, write
from rollcast_envs.records import open_records
from rollcast_envs.splits import SPLITS, position, split_of


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


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
