"""A user's row as a task's record: which column holds what, and whether it holds what the task needs.

Owns: `Field`, the mapping of columns, the checks on one row and how a fault in it is told. Does not know files: whoever
reads the row adds file and line to a `Fault`.
"""

import difflib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rollcast_envs.errors import DataError
from rollcast_envs.text import MAX_LENGTH

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


COMMON = (
    Field("id", "any", "the record's own name, unique in its file", required=False),
    Field("group", "any", "what it shares with others: records of one group are in one split", required=False),
    Field("split", "any", "train, validation or test", required=False),
    Field("kind", "any", "what sort of task it is", required=False),
)
"""What every record may have, whatever its task, and what `fields` may therefore name."""

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
SHORT.maxlist = SHORT.maxdict = 3


class Fault(Exception):
    """What is wrong with one field of a row: `why`, and what to do about it (`fix`)."""

    def __init__(self, field: str, why: str, fix: str) -> None:
        super().__init__(field, why, fix)
        self.field, self.why, self.fix = field, why, fix

    def at(self, place: str) -> DataError:
        """As a mistake in the row at `place`, such as "facts.jsonl, line 7"."""
        return DataError(f"{place}, field {self.field!r}", self.why, self.fix)


@dataclass(frozen=True)
class Form:
    """What a task wants of a row and which column holds it. User's arguments -> index."""

    wanted: tuple[Field, ...]
    """The task's fields, then those of `COMMON` that the user mapped."""
    columns: tuple[str, ...]
    """For each of `wanted` its column, or its path, such as `answers.text`."""
    mapped: frozenset[str]
    """The names that the user mapped: their columns must exist."""
    asks: str | None
    """The first required text: what makes two records the same question. None if the task wants no text."""

    def record(self, row: Record, *, plain: bool) -> Record:
        """The row with the task's names added. `plain` says that all cells are strings, as in CSV. Raises `Fault`."""
        record = row.copy()
        for field, column in zip(self.wanted, self.columns, strict=True):
            value = row[column] if column in row else _nested(row, column)
            if plain and value == "" and not field.required:
                value = None
            if value is not None:
                record[field.name] = _typed(field, value, plain)
            elif field.required:
                raise _missing(field, column, row)
            else:
                record.pop(field.name, None)
        return record

    def column(self, name: str) -> str:
        """The column of the field `name`."""
        return next(column for field, column in zip(self.wanted, self.columns, strict=True) if field.name == name)

    def asked(self, record: Record) -> str | None:
        """What the record asks, apart from its case and the spaces around it."""
        return None if self.asks is None else record[self.asks].strip().casefold()


def form_of(wanted: Sequence[Field], fields: Mapping[str, str] | None) -> Form:
    """The form of a task with the user's mapping (task's name -> column). Raises `DataError` for an unknown name."""
    fields = fields or {}
    own = {field.name for field in wanted}
    every = (*wanted, *(field for field in COMMON if field.name not in own))
    _check_names(fields, every)
    used = tuple(field for field in every if field.name in own or field.name in fields)
    asks = next((field.name for field in wanted if field.required and field.holds == "text"), None)
    return Form(used, tuple(fields.get(field.name, field.name) for field in used), frozenset(fields), asks)


def label(record: Record, name: str) -> str | None:
    """The short text or number in `name` (an id, a group, a split) as text; None if there is none. Raises `Fault`."""
    value = record.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Fault(name, f"holds {described(value)}, where text or a number belongs", "put text or a number there")
    return str(value)


def check_texts(row: Record) -> None:
    """No text in the row, however deep, may be too long for a prompt, nor be what is no text. Raises `Fault`."""
    for name, value in row.items():
        for text in _texts_in(value):
            _check_text(name, text)


def no_column(name: str, column: str, row: Mapping[str, Any]) -> Fault:
    """That `row` has no `column`, which should hold the field `name`."""
    present = _paths(row)
    guess = nearest(column, present)
    whose = f"no column {column!r}" if name == column else f"no column {column!r}, which `fields` names for it"
    example = guess or "<one of your columns>"
    return Fault(
        name,
        f"there is {whose}; there are {listed(present)}",
        f'say which column holds it: fields = {{"{name}": "{example}"}}',
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like `name`, whatever its case; None if none is."""
    known = {other.casefold(): other for other in names}
    found = difflib.get_close_matches(name.casefold(), known, n=1)
    return known[found[0]] if found else None


def listed(names: Sequence[str]) -> str:
    """Names for a message; at most twenty."""
    shown = ", ".join(repr(name) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def described(value: Any) -> str:
    """A value for a message: what it is, and its beginning."""
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    kind = next((name for type_, name in kinds if isinstance(value, type_)), type(value).__name__)
    return "null" if value is None else f"{kind} ({SHORT.repr(value)})"


def _check_names(fields: Mapping[str, str], every: Sequence[Field]) -> None:
    names = [field.name for field in every]
    for name in fields:
        if name not in names:
            known = ", ".join(f"{field.name} ({field.meaning})" for field in every)
            guess = nearest(name, names)
            fix = (
                f"write {guess!r} for {name!r}" if guess else "name one of those on the left, your column on the right"
            )
            raise DataError(f"fields = {dict(fields)!r}", f"the task has no field {name!r}; it has {known}", fix)


def _missing(field: Field, column: str, row: Mapping[str, Any]) -> Fault:
    if column in row:
        return Fault(field.name, f"is null, but the task needs {field.meaning}", "fill it in or leave the row out")
    return no_column(field.name, column, row)


def _typed(field: Field, value: Any, plain: bool) -> Any:
    if field.holds == "text":
        return _text(field, value)
    return _texts(field, value, plain) if field.holds == "texts" else value


def _text(field: Field, value: Any) -> str:
    if not isinstance(value, str):
        fix = "give one string" if isinstance(value, list | dict) else f'quote it: "{json.dumps(value)}"'
        raise Fault(field.name, f"holds {described(value)}, where text belongs: {field.meaning}", fix)
    if field.required and not value.strip():
        raise Fault(field.name, f"is empty, but the task needs {field.meaning}", "fill it in or leave the row out")
    return value


def _texts(field: Field, value: Any, plain: bool) -> list[str]:
    texts = _parsed(field, value) if plain else value
    if isinstance(texts, str):
        texts = [texts] if texts.strip() or field.required else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        why = f"holds {described(texts)}, where a list of texts belongs: {field.meaning}"
        raise Fault(field.name, why, 'give a list of quoted texts, as ["Paris", "42"]')
    if field.required and not all(text.strip() for text in texts):
        fix = "fill it in or leave the row out; where there is nothing to give, write an empty list: []"
        raise Fault(field.name, f"has an empty text in {described(texts)}: {field.meaning}", fix)
    return texts


def _parsed(field: Field, cell: str) -> Any:
    """A cell that looks like a list as the list; Python's own way of writing one is refused, not taken as one text."""
    if not (cell.startswith("[") and cell.rstrip().endswith("]")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        why = f"looks like a list but is not JSON: {SHORT.repr(cell)}"
        raise Fault(field.name, why, 'write it with double quotes, as ["Paris", "Lutetia"]') from None


def _nested(row: Record, column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = _step(value, part)
    return value


def _step(value: Any, part: str) -> Any:
    if isinstance(value, list):
        return [_step(item, part) for item in value]
    return value.get(part) if isinstance(value, dict) else None


def _paths(row: Mapping[str, Any]) -> list[str]:
    """The columns, and after them what is in those that hold objects."""
    nested = [f"{name}.{part}" for name, value in row.items() if isinstance(value, dict) for part in value]
    return [*row, *nested]


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_LENGTH:
        why = f"holds {len(text):,} characters ({SHORT.repr(text[:1000])}); at most {MAX_LENGTH:,} can be read"
        raise Fault(name, why, "shorten it or leave the row out")
    if "\0" in text:
        raise Fault(name, f"holds a NUL character in {SHORT.repr(text)}", "take the NUL characters out")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            why = f"holds one half of a surrogate pair, which is no character: {SHORT.repr(text)}"
            raise Fault(name, why, "write the character itself, or both halves") from None
