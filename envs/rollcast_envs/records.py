"""Records of a data set by index, read from the disk when they are asked for.

Owns: file formats, field mapping, splits and the checks on a user's file. Does not know tasks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollcast_envs.splits import Split, position, split_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One thing that a task needs of a record. Task -> loader."""

    name: str
    holds: Literal["text", "texts", "any"]
    """`text`: one string; `texts`: a list of strings (one string is taken as a list of one); `any`: left as it is."""
    meaning: str
    """For messages and documentation: "the question", "accepted answers, the preferred one first"."""
    required: bool = True


class Records(Sequence[Record]):
    """The records of one split, in a fixed shuffled order: every prefix is a fair sample."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return dict(self._records[index])


def open_records(
    data: str | Mapping[str, str], wanted: Sequence[Field], *, split: Split, fields: Mapping[str, str] | None = None
) -> Records:
    """The records of `split`. Raises `DataError`."""
    lines = Path(str(data)).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [row for row in rows if split_of(row["group"]) == split]
    return Records(sorted(kept, key=lambda row: position(row["id"])))
