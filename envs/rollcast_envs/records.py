"""Records of a data set by index, read from the disk when they are asked for.

Owns: which records a split has, in which order, and the index of a file, made once a process. Does not know tasks, nor
formats (`sources.py`), nor how a column is found and checked (`fields.py`).

Splits, the first that applies: the file given for the split, the column `split`, the hash of the column `group`, the
hash of the first required text. So all records that ask the same are in one split. For k-fold validation, train is cut
into parts by the hash of the column `group`, or of that text, whatever decided the split.
"""

import warnings
from array import array
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from rollcast_envs.errors import DataError
from rollcast_envs.fields import COMMON, Fault, Field, Form, Record, check_texts, form_of, label, no_column
from rollcast_envs.formats import Source
from rollcast_envs.sources import Located, locate, split_named
from rollcast_envs.splits import SPLITS, Portion, Split, fold_mark, portion_named, position, split_of

__all__ = ["COMMON", "Field", "Record", "Records", "open_records"]

ALL = len(SPLITS)
Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint64]


class Records(Sequence[Record]):
    """The records of one split, in a fixed shuffled order: every prefix is a fair sample.

    Each read gives objects of its own. Reads are safe from any thread. A copy or a pickle opens the data again.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [dict(self._records[place]) for place in range(*index.indices(len(self)))]
        return dict(self._records[index])


def open_records(
    data: str | Mapping[str, str], wanted: Sequence[Field], *, split: str, fields: Mapping[str, str] | None = None
) -> Records:
    """The records of `split`, each a dict of JSON values.

    A record has the wanted fields under the task's names, `id` (its own, or file and number of the row) and all columns
    of the user as they are. Optional fields that a row lacks are absent.

    Args:
        data: a file (.jsonl, .ndjson, .csv, .tsv, .parquet, or .json in SQuAD's format or as a list of objects), a
            Hugging Face data set ("org/name" or "org/name:config"), or one of these for each split by its name.
        wanted: what the task needs.
        split: which records: train, validation or test, or a part of train (`splits.portion_named`).
        fields: task's name -> column, or path to it as "answers.text"; also for `id`, `group`, `split` and `kind`.

    Raises:
        DataError: when the data cannot be read as wanted, or the split has no records.
        ValueError: for a name that is no split.

    Warns:
        UserWarning: once a file, when something is odd but could be read.
    """
    form = form_of(wanted, fields)
    portion = portion_named(split)
    index = _index(locate(data, portion.split), form)
    numbers = index.numbers(portion)
    if not len(numbers):
        raise index.empty(portion)
    return Records(_OnDisk(index, numbers, (data, tuple(wanted), split, fields)))


class _OnDisk(Sequence[Record]):
    """The records of an index in a given order."""

    def __init__(self, index: "Index", numbers: Numbers, opened: tuple[Any, ...]) -> None:
        self.whole = index
        self._numbers = numbers
        self._opened = opened

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        return self.whole.record(int(self._numbers[place]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, self._opened


def _open_again(data: Any, wanted: Sequence[Field], split: str, fields: Mapping[str, str] | None) -> Sequence[Record]:
    return open_records(data, wanted, split=split, fields=fields)._records


class Index:
    """Where the records of all splits are, found in one pass that checks every row. About 20 bytes a row stay.

    Raises `DataError` for the first row that is at fault.
    """

    def __init__(self, source: Source, form: Form, own: bool) -> None:
        self._source, self._form, self._own = source, form, own
        self._marks: Marks | None = None
        self._again: frozenset[int] = frozenset()
        """Rows whose id an earlier row has."""
        positions, splits = self._pass()
        order = self._ordered(np.frombuffer(positions, np.uint64))
        of_row = np.frombuffer(splits, np.uint8)[order]
        self._numbers: dict[int, Numbers] = {code: order[of_row == code] for code in range(ALL + 1)}
        if source.notes:
            warnings.warn(f"{source.name}: {'; '.join(source.notes.values())}", UserWarning, stacklevel=2)

    def numbers(self, portion: Portion) -> Numbers:
        """The numbers of the rows of `portion`, in its order."""
        whole = self._of_split(portion.split)
        return whole if portion.parts == 1 else whole[portion.takes(self._marks_of_train())]

    def record(self, number: int) -> Record:
        """The record of row `number`. Raises `DataError` if the file was changed meanwhile."""
        row = self._source.read(number)
        try:
            record = self._record(row, number)
        except Fault as fault:
            raise fault.at(self._source.at(number)) from None
        return record | {"id": f"{record['id']}#{number + 1}"} if number in self._again else record

    def empty(self, portion: Portion) -> DataError:
        """That `portion` has no records: how many there are, and where."""
        if portion.parts > 1 and len(train := self._of_split("train")):
            groups = len(np.unique(self._marks_of_train()))
            why = f"has {len(train)} rows of {groups} groups in train, and part {portion.part} of {portion.parts} is "
            why += "empty" if portion.inside else "all of it"
            return DataError(self._source.name, why, "cut train into fewer parts, or add rows")
        split = portion.split
        counts = [(len(self._numbers[code]), name) for code, name in enumerate(SPLITS)]
        total, spread = sum(count for count, _ in counts), ", ".join(f"{name} {count}" for count, name in counts)
        why = f"has no records for {split!r}: of its {total} rows, by split, {spread}"
        fix = 'give a file for each split, as {"train": ..., "validation": ...}, add a column `split`, or add rows'
        return DataError(self._source.name, why, fix)

    def _of_split(self, split: Split) -> Numbers:
        return self._numbers[ALL if self._own else SPLITS.index(split)]

    def _marks_of_train(self) -> Marks:
        """By place in train, the mark of the row's group. They cost a look at every row: only folds ask for them."""
        if self._marks is None:
            train = self._of_split("train")
            found = {number: fold_mark(self._group_of(number)) for number in sorted(train.tolist())}
            self._marks = np.array([found[number] for number in train.tolist()], np.uint64)
        return self._marks

    def _group_of(self, number: int) -> str:
        try:
            return self._group(self.record(number))
        except Fault as fault:
            raise fault.at(self._source.at(number)) from None

    def _group(self, record: Record) -> str:
        """What records that belong together have in common."""
        return label(record, "group") or self._form.asked(record) or str(record["id"])

    def _record(self, row: Record, number: int) -> Record:
        record = self._form.record(row, plain=self._source.plain)
        record["id"] = label(record, "id") or f"{self._source.stem}:{number + 1}"
        return record

    def _pass(self) -> "tuple[array[int], bytearray]":
        """The place in the order, and the split, of every row."""
        positions, splits = array("Q"), bytearray()
        row: Record = {}
        unseen, by_column = set(self._form.mapped), False
        for number, row in enumerate(self._source.scan()):
            try:
                if self._source.suspect:
                    check_texts(row)
                record = self._record(row, number)
                by_column = by_column or (not number and label(record, "split") is not None)
                splits.append(self._split(record, by_column))
            except Fault as fault:
                raise fault.at(self._source.at(number)) from None
            positions.append(position(record["id"]))
            unseen -= record.keys()
        if not splits:
            raise self._source.no_rows()
        for name in sorted(unseen):
            raise no_column(name, self._form.column(name), row).at(self._source.name)
        return positions, splits

    def _split(self, record: Record, by_column: bool) -> int:
        if self._own:
            return ALL
        name = label(record, "split")
        if name is None and not by_column:
            return SPLITS.index(split_of(self._group(record)))
        if name is None or not by_column:
            why = "is in some rows but not here" if by_column else "is here but not in the rows before"
            raise Fault("split", why, "fill it in on every row, or on none")
        if (found := split_named(name)) is None:
            raise Fault("split", f"is {name!r}", f"write one of {', '.join(SPLITS)} (dev and val are validation)")
        return SPLITS.index(found)

    def _ordered(self, positions: npt.NDArray[np.uint64]) -> Numbers:
        """Row numbers in order. Equal ids show by equal positions; all but the first get an id of their own."""
        order = np.argsort(positions, kind="stable")
        ranked = positions[order]
        again = order[1:][ranked[1:] == ranked[:-1]]
        if not len(again):
            return order
        self._again = frozenset(again.tolist())
        own = [self.record(number)["id"] for number in sorted(self._again)]
        positions = positions.copy()
        positions[sorted(self._again)] = [position(identifier) for identifier in own]
        where = self._source.at(min(self._again)).removeprefix(f"{self._source.name}, ")
        self._source.note("ids", f"{where} has the id of an earlier row; such rows got ids of their own, as {own[0]!r}")
        return np.argsort(positions, kind="stable")


_INDEXES: dict[tuple[str, bool, Form], tuple[tuple[int, ...], Index]] = {}
_LOCKS: dict[tuple[str, bool, Form], Lock] = {}


def _index(located: Located, form: Form) -> Index:
    """The one index of this source and form in this process; made again when the file has changed."""
    key = (located.key, located.own, form)
    with _LOCKS.setdefault(key, Lock()):
        stamp, index = _INDEXES.get(key, (None, None))
        if index is None or stamp != located.stamp:
            index = Index(located.open(), form, located.own)
            _INDEXES[key] = located.stamp, index
        return index
