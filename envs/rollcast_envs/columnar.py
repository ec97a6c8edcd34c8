"""Columnar data as rows by number: Parquet files and Hugging Face data sets.

Owns: reading through pyarrow and `datasets`, each imported when first needed, and turning their values into JSON's.
Does not know what a task needs of a row. Data stay on the disk; of Parquet, the row groups read last are kept.
"""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from rollcast_envs.errors import DataError
from rollcast_envs.fields import Record, listed
from rollcast_envs.formats import Source

KEPT_BYTES = 256 * 2**20
"""Of decoded row groups. A file of one group is thus decoded once; of several, the one asked for last always stays."""
BATCH = 1024


class Parquet(Source):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.stem)
        self._arrow = _library("pyarrow", self.name)
        try:
            self._file = _library("pyarrow.parquet", self.name).ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._broken(error) from None
        metadata = self._file.metadata
        counts = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._ends = list(accumulate(counts))
        self._columns = _readable(self, self._arrow, self._file.schema_arrow)
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()

    def scan(self) -> Iterator[Record]:
        try:
            for batch in self._file.iter_batches(batch_size=BATCH, columns=self._columns):
                yield from _rows(batch)
        except (self._arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._broken(error) from None

    def read(self, number: int) -> Record:
        group = bisect_right(self._ends, number)
        start = self._ends[group - 1] if group else 0
        try:
            return next(_rows(self._group(group).slice(number - start, 1)))
        except (self._arrow.ArrowException, OSError) as error:
            raise self._broken(error) from None

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=self._columns)
                while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > KEPT_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _broken(self, error: Exception) -> DataError:
        return DataError(self.name, f"cannot be read as Parquet ({error})", "write the file again")


class HubDataset(Source):
    """One split of a Hugging Face data set, which `datasets` maps into memory from its own cache."""

    def __init__(self, name: str, split: str, dataset: Any) -> None:
        super().__init__(f"Hugging Face data set {name!r}, its split {split!r}", f"{name.rpartition('/')[2]}:{split}")
        columns = _readable(self, _library("pyarrow", self.name), dataset.features.arrow_schema)
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._lock = Lock()

    def scan(self) -> Iterator[Record]:
        for table in self._dataset.iter(batch_size=BATCH):
            yield from _rows(table)

    def read(self, number: int) -> Record:
        with self._lock:
            table = self._dataset[number : number + 1]
        return next(_rows(table))


@cache
def hub_dataset(name: str) -> Mapping[str, HubDataset]:
    """The splits of the data set `org/name` or `org/name:config`, under their own names. Raises `DataError`."""
    datasets = _library("datasets", f"data = {name!r}", "is no file; as a Hugging Face data set it needs")
    repository, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = f"is no file, and as a Hugging Face data set it cannot be loaded ({error})"
        raise DataError(
            f"data = {name!r}", why, "check the name; for one of its configurations add ':<name>'"
        ) from None
    return {split: HubDataset(name, split, dataset) for split, dataset in found.items()}


def _library(module: str, what: str, needs: str = "needs") -> Any:
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        why = f"{needs} the library {package}, which is not installed ({error})"
        raise DataError(what, why, f"check the name, or pip install {package}") from None


def _readable(source: Source, arrow: Any, schema: Any) -> list[str]:
    """The columns whose values JSON can say; the others are left out, with a note."""
    columns = [field.name for field in schema if _sayable(arrow, field.type)]
    if left := [name for name in schema.names if name not in columns]:
        source.note("bytes", f"the columns {listed(left)} hold bytes and were left out")
    return columns


def _sayable(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return False
    return all(_sayable(arrow, kind.field(place).type) for place in range(kind.num_fields))


def _rows(table: Any) -> Iterator[Record]:
    for row in table.to_pylist():
        yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it: times and decimals as text, what is not a number as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta) else value
