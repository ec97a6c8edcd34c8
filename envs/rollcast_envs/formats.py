"""Text files as rows by number: JSON lines, CSV and TSV.

Owns: how rows are found in a file and read again, and what is wrong with a file as such. Does not know what a task
needs of a row, nor splits. Files stay on the disk: eight bytes a row are kept.
"""

import csv
import io
import json
import os
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from rollcast_envs.errors import DataError
from rollcast_envs.fields import SHORT, Record, described, listed
from rollcast_envs.text import MAX_LENGTH

MARK = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAX_LINE = 64 * 2**20
MAX_PARSED_CELL = 16 * MAX_LENGTH
"""The csv module gives up on longer cells without saying which column they are in; up to here, the check says it."""

# NaN and Infinity are no JSON, but Python and pandas write them where a number is missing.
DECODER = json.JSONDecoder(parse_constant=lambda name: None)


class Source(ABC):
    """The rows of one file or data set, by number from 0. `scan` runs once, before anything else is asked."""

    plain: ClassVar[bool] = False
    """Whether all cells are strings."""

    suspect = True
    """Whether the row that `scan` gave last may hold texts that `fields.check_texts` refuses."""

    def __init__(self, name: str, stem: str) -> None:
        self.name = name
        """For messages."""
        self.stem = stem
        """Names rows that have no id, with their number."""
        self.notes: dict[str, str] = {}
        """What was odd but could be read; the first of each sort."""

    @abstractmethod
    def scan(self) -> Iterator[Record]:
        """All rows in order. Raises `DataError`."""

    @abstractmethod
    def read(self, number: int) -> Record:
        """One row, in objects of its own; from any thread. Raises `DataError`."""

    def at(self, number: int) -> str:
        """Where row `number` is, for messages."""
        return f"{self.name}, row {number + 1}"

    def no_rows(self) -> DataError:
        """That there are no rows."""
        return DataError(self.name, "has no rows", "put at least one row into it")

    def note(self, sort: str, what: str) -> None:
        self.notes.setdefault(sort, what)


class TextFile(Source):
    """A file of lines, read by offset through one descriptor, so that a file replaced meanwhile goes on as it was."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.stem)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._starts = array("q")
        self._line = self._end = 0
        """While scanning: the number of the last line read, and the offset after it."""

    def read(self, number: int) -> Record:
        start, end = self._starts[number], self._starts[number + 1]
        raw = os.pread(self._descriptor, end - start, start)
        try:
            text = (raw if start else raw.removeprefix(MARK)).decode()
            row = self._again(text) if len(raw) == end - start else None
        except (ValueError, RecursionError, csv.Error):
            row = None
        if row is None:
            raise DataError(
                f"{self.name}, row {number + 1}",
                "cannot be read any more: the file was changed while it was in use",
                "start again, and write changes to a new file",
            )
        return row

    @abstractmethod
    def _again(self, text: str) -> Record | None:
        """The row in the text that it was found in; None, or a `ValueError`, if it is not there."""

    def at(self, number: int) -> str:
        return self._at_line(self._newlines(self._starts[number]) + 1)

    def _at_line(self, line: int) -> str:
        return f"{self.name}, line {line}"

    def _newlines(self, end: int) -> int:
        count = offset = 0
        while chunk := os.pread(self._descriptor, min(2**20, end - offset), offset):
            count += chunk.count(b"\n")
            offset += len(chunk)
        return count

    def _lines(self) -> Iterator[str]:
        with open(self._descriptor, "rb", buffering=2**20, closefd=False) as file:
            while raw := file.readline(MAX_LINE):
                self._line += 1
                self._end += len(raw)
                yield self._decoded(raw)

    def _decoded(self, raw: bytes) -> str:
        if self._line == 1 and raw.startswith(MARK):
            self.note("mark", "line 1 begins with a byte-order mark, which was skipped")
            raw = raw.removeprefix(MARK)
        if len(raw) >= MAX_LINE:
            why = f"is longer than {MAX_LINE // 2**20} MiB"
            raise DataError(self._at_line(self._line), why, "write one row on a line")
        return decoded(raw, self._line, self.name)

    def _blank(self) -> None:
        self.note("blank", f"line {self._line} is blank; blank lines were skipped")

    def _suspect(self, start: int) -> bool:
        """For the row up to here. Its bytes are UTF-8 without NUL, so that only its length is in question."""
        return self._end - start > MAX_LENGTH


class JsonLines(TextFile):
    """One JSON object a line."""

    def scan(self) -> Iterator[Record]:
        start = 0
        for text in self._lines():
            if text.isspace() or not text:
                self._blank()
            else:
                self._starts.append(start)
                self.suspect = self._suspect(start) or "\\u" in text
                yield self._row(text)
            if text.endswith("\r\n"):
                self.note("ends", f"line {self._line} ends in CR LF, which was read as LF")
            start = self._end
        self._starts.append(self._end)

    def _row(self, text: str) -> Record:
        try:
            row = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            refuse_json(error, self._at_line(self._line), text)
        if not isinstance(row, dict):
            fix = 'write one object on each line, as {"question": ...}; a file that is one list is named .json'
            raise DataError(self._at_line(self._line), f"holds {described(row)}, where an object belongs", fix)
        return row

    def _again(self, text: str) -> Record | None:
        row = DECODER.decode(text)
        return row if isinstance(row, dict) else None


class Csv(TextFile):
    """Comma-separated cells under a header; quoted cells may go over several lines. CR LF is CSV's own line end."""

    plain = True
    delimiter: ClassVar[str] = ","

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._header: list[str] = []

    def scan(self) -> Iterator[Record]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_PARSED_CELL))
        rows = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
        while (found := self._next(rows)) is not None:
            start, line, cells = found
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                self._blank()
            elif not self._header:
                self._header = self._valid_header(cells, line)
            else:
                self._starts.append(start)
                self.suspect = self._suspect(start)
                yield self._row(cells, line)
        self._starts.append(self._end)

    def _next(self, rows: Any) -> tuple[int, int, list[str]] | None:
        start, line = self._end, self._line + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            fix = 'close every quote, write a quote inside a quoted cell twice (""), and quote cells with line breaks'
            raise DataError(self._at_line(line), f"the row that begins here is broken ({error})", fix) from None
        return None if cells is None else (start, line, cells)

    def _valid_header(self, cells: list[str], line: int) -> list[str]:
        twice = next((name for name in cells if cells.count(name) > 1), None)
        if twice is not None:
            raise DataError(self._at_line(line), f"the header names the column {twice!r} twice", "rename one of them")
        return cells

    def _row(self, cells: list[str], line: int) -> Record:
        if len(cells) != len(self._header):
            why = f"has {_cells(len(cells))}, but the header has {len(self._header)}: {listed(self._header)}"
            fix = f"give every row as many; quote cells that hold a {self.delimiter!r} or a line break"
            raise DataError(self._at_line(line), why, fix)
        return dict(zip(self._header, cells, strict=True))

    def _again(self, text: str) -> Record | None:
        rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=self.delimiter, strict=True)
        cells, *more = (cells for cells in rows if cells)
        fits = len(cells) == len(self._header) and all(len(row) == 1 and not row[0].strip() for row in more)
        return dict(zip(self._header, cells, strict=True)) if fits else None

    def no_rows(self) -> DataError:
        if not self._header:
            return super().no_rows()
        return DataError(self.name, "has a header but no rows", "put at least one row below the header")


class Tsv(Csv):
    """The same with tabs."""

    delimiter = "\t"


def decoded(raw: bytes, line: int, name: str) -> str:
    """UTF-8 as text; `line` is the number of its first line. Raises `DataError`."""
    if line == 1 and raw.startswith(UTF16):
        raise DataError(f"{name}, line 1", "is in UTF-16, not UTF-8", "save the file as UTF-8")
    if (place := raw.find(b"\0")) >= 0:
        why = f"holds a NUL byte ({_around(raw, place)})"
        raise DataError(_line_at(name, line, raw, place), why, "save the file as UTF-8 text without NUL bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = _line_at(name, line, raw, error.start)
        raise DataError(where, f"is not UTF-8 ({_around(raw, error.start)})", "save the file as UTF-8") from None


def refuse_json(error: Exception, where: str, text: str) -> NoReturn:
    """Say what is wrong with JSON: the parser's own words, and what stands there."""
    if isinstance(error, json.JSONDecodeError):
        found = SHORT.repr(text[error.pos : error.pos + 60].rstrip()) if error.pos < len(text.rstrip()) else "the end"
        why = f"broken JSON at column {error.colno} ({error.msg}), at {found}"
    else:
        why = f"JSON that cannot be read ({error})"
    fix = "mend the line or take it out"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        fix += "; JSON lines are one object on each line, in a file named .jsonl"
    raise DataError(where, why, fix) from None


def _line_at(name: str, first: int, raw: bytes, place: int) -> str:
    newlines = raw.count(b"\n", 0, place)
    return f"{name}, line {first + newlines}"


def _around(raw: bytes, place: int) -> str:
    return repr(raw[max(0, place - 20) : place + 10])[1:]


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
