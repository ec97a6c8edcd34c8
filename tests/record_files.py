"""Data files for the tests of records: small ones in every format, what they hold, and how they are refused.

Owns: rows, and writing them. Does not know which test wants what.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, open_records
from rollcast_envs.splits import SPLITS, Split

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


def squad(*asked: dict[str, Any]) -> dict[str, Any]:
    paragraph = {"context": "The Normans gave their name to Normandy.", "qas": list(asked)}
    return {"version": "any", "data": [{"title": "Normans", "paragraphs": [paragraph]}]}
