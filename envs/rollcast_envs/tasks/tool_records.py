"""Questions of the user's for `rollcast/ToolQA-v0`, each with the table in which its facts are looked up.

Owns: what such a record holds, what the look-up says of it, and when an answer is right. Does not know how an episode
goes (`tool_qa.py`).

A record: `question`; `references`, the accepted answers; `table`, an object {entry: {field: value}}; `needed`, the
facts that the question needs, as [["entry", "field"], ...] in the order in which to look them up; and optionally
`expression`, what has to be calculated from them. CSV holds `table` and `needed` as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record, open_records
from rollcast_envs.rewards import exact_match, token_f1
from rollcast_envs.tasks.grading import NUMBER, last_number, near
from rollcast_envs.tools import CalculationError, calculate

WANTED = (
    Field("question", "text", "the question"),
    Field("references", "texts", "accepted answers, the preferred one first"),
    Field("table", "any", "what can be looked up, as {entry: {field: value}}"),
    Field("needed", "any", 'the facts that the question needs, as [["entry", "field"]]'),
    Field("expression", "text", "what has to be calculated", required=False),
)
TABLE = 'write {"Widget": {"price": 9.5}}: entries, and for each the values of its fields'
NEEDED = 'write [["Widget", "price"]], entries and fields of the table in the order in which to look them up'


class Asked(Protocol):
    """One question, built in or of the user's. Data -> episode."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def phrasings(self) -> list[str]:
        """The question in all its wordings, that of evaluation first."""

    @property
    def references(self) -> list[str]: ...
    @property
    def look_ups(self) -> list[tuple[str, str]]:
        """The facts that it needs, as entry and field."""

    @property
    def expression(self) -> str:
        """What has to be calculated; "" if nothing."""

    @property
    def fields(self) -> dict[str, Any]:
        """What reward functions get."""

    def look_up(self, name: str, field: str) -> tuple[str, bool]:
        """What the tool says, and whether the question needs that fact."""

    def calculates(self, result: float) -> bool: ...
    def graded(self, answer: str) -> float:
        """How right a final answer is, in [0, 1]."""


@dataclass(frozen=True)
class TableQuestion:
    """A question of the user's. Record -> episode."""

    fields: Record
    table: Mapping[str, tuple[str, Mapping[str, str]]]
    """Entries and fields in lower case; the entry as it is written, its values as text."""
    look_ups: list[tuple[str, str]]
    expression: str

    @property
    def id(self) -> str:
        return str(self.fields["id"])

    @property
    def kind(self) -> str:
        return str(self.fields.get("kind") or "")

    @property
    def phrasings(self) -> list[str]:
        return [self.fields["question"]]

    @property
    def references(self) -> list[str]:
        return list(self.fields["references"])

    def look_up(self, name: str, field: str) -> tuple[str, bool]:
        if _plain(name) not in self.table:
            return f"error: there is no entry {name!r}", False
        entry, values = self.table[_plain(name)]
        if _plain(field) not in values:
            return f"error: there is no field {field!r}; there are {', '.join(values)}", False
        needed = [(_plain(one), _plain(other)) for one, other in self.look_ups]
        return f"{field} of {entry}: {values[_plain(field)]}", (_plain(name), _plain(field)) in needed

    def calculates(self, result: float) -> bool:
        return bool(self.expression) and near(result, float(calculate(self.expression)), 0.0)

    def graded(self, answer: str) -> float:
        """Against a reference that is a number, the last number of the answer has to be that one, to the last decimal
        given or 0.5 %; else token F1."""
        wanted = self.references[0].strip()
        if not NUMBER.fullmatch(wanted):
            return exact_match(answer, self.references) or token_f1(answer, self.references)
        number, decimals = last_number(answer), len(wanted.partition(".")[2])
        right = last_number(wanted)
        assert right is not None
        return float(number is not None and near(number, right, 0.5 * 10**-decimals if decimals else 0.0))


class TableQuestions(Sequence[TableQuestion]):
    """The questions of one split of the user's data, read from the disk as they are asked for, each checked at first.

    Raises `DataError` for the first record that is not as above.
    """

    def __init__(self, data: str | Mapping[str, str], split: str, fields: Mapping[str, str] | None) -> None:
        self._records = open_records(data, WANTED, split=split, fields=fields)
        for record in self._records:
            _question(record)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return _question(self._records[place])


def _question(record: Record) -> TableQuestion:
    if not record["references"]:
        raise _bad(record, "references", "is empty", "write what is accepted as the answer")
    table, needed = _parsed(record, "table", TABLE), _parsed(record, "needed", NEEDED)
    expression = str(record.get("expression") or "")
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise _bad(record, "table", f"holds {_short(table)}", TABLE)
    entries = {
        _plain(entry): (entry, {_plain(field): str(value) for field, value in row.items()})
        for entry, row in table.items()
    }
    pairs = [tuple(pair) if isinstance(pair, list) else () for pair in needed] if isinstance(needed, list) else [()]
    for pair in pairs:
        known = len(pair) == 2 and all(isinstance(part, str) for part in pair) and _plain(pair[0]) in entries
        if not known or _plain(pair[1]) not in entries[_plain(pair[0])][1]:
            raise _bad(record, "needed", f"holds {_short(needed)}, which is not all in the table", NEEDED)
    try:
        calculate(expression or "0")
    except CalculationError as error:
        raise _bad(record, "expression", f"is {expression!r}: {error}", "write arithmetic, such as 2 * 9.5") from error
    return TableQuestion(record, entries, [(pair[0], pair[1]) for pair in pairs], expression)


def _parsed(record: Record, name: str, fix: str) -> Any:
    """A cell of a table of text holds JSON."""
    if not isinstance(record[name], str):
        return record[name]
    try:
        return json.loads(record[name])
    except (ValueError, RecursionError):
        raise _bad(record, name, f"holds {_short(record[name])}, which is no JSON", fix) from None


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def _bad(record: Record, field: str, why: str, fix: str) -> DataError:
    return DataError(f"record {record['id']!r}, field {field!r}", why, fix)
