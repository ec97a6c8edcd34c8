"""JSON documents as rows by number: SQuAD's v1.1 and v2.0, and lists of objects.

Owns: what SQuAD's format means as rows, and where in a document a row is. Does not know what a task needs of a row. A
document is read whole and stays in memory, as there is no other way to find its rows; large data are JSON lines.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from rollcast_envs.errors import DataError
from rollcast_envs.fields import Record, described, listed
from rollcast_envs.formats import DECODER, MARK, Source, decoded, refuse_json

BLANKS = re.compile(r"[ \t\r\n]*")


class Json(Source):
    """One JSON document, read whole: SQuAD's v1.1 or v2.0, or a list of objects."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.stem)
        self._path = path
        self._rows: list[Record] = []
        self._places: list[str] = []

    def scan(self) -> Iterator[Record]:
        text = self._text()
        try:
            document = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            refuse_json(error, f"{self.name}, line {line}", text)
        if isinstance(document, dict) and isinstance(document.get("data"), list):
            yield from self._squad(document["data"])
        elif isinstance(document, list):
            yield from self._items(document, text)
        else:
            fix = "give SQuAD's format or a list of objects; a file with one object a line is named .jsonl"
            raise DataError(self.name, "is neither in SQuAD's format nor a list of objects", fix)

    def read(self, number: int) -> Record:
        return deepcopy(self._rows[number])

    def at(self, number: int) -> str:
        return f"{self.name}, {self._places[number]}"

    def _text(self) -> str:
        raw = self._path.read_bytes()
        if raw.startswith(MARK):
            self.note("mark", "line 1 begins with a byte-order mark, which was skipped")
            raw = raw.removeprefix(MARK)
        if (end := raw.find(b"\r\n")) >= 0:
            line = raw.count(b"\n", 0, end) + 1
            self.note("ends", f"line {line} ends in CR LF, which was read as LF")
        return decoded(raw, 1, self.name)

    def _items(self, items: list[Any], text: str) -> Iterator[Record]:
        for line, item in zip(_item_lines(text), items, strict=True):
            self._places.append(f"line {line} (item {len(self._places) + 1})")
            yield self._kept(self._a(dict, item, self._places[-1]))

    def _squad(self, articles: list[Any]) -> Iterator[Record]:
        for a, article in enumerate(articles):
            paragraphs = self._part(article, "paragraphs", list, f"data[{a}]")
            for p, paragraph in enumerate(paragraphs):
                place = f"data[{a}].paragraphs[{p}]"
                context = self._part(paragraph, "context", str, place)
                shared = {"title": article.get("title"), "context": context, "group": article.get("title") or context}
                for q, asked in enumerate(self._part(paragraph, "qas", list, place)):
                    self._places.append(f"{place}.qas[{q}]")
                    yield self._kept(self._question(asked, self._places[-1]) | shared)

    def _question(self, asked: Any, place: str) -> Record:
        answers = self._part(asked, "answers", list, place)
        texts = [self._part(answer, "text", str, f"{place}.answers[{n}]") for n, answer in enumerate(answers)]
        unanswerable = asked.get("is_impossible", False)
        if not texts and unanswerable is not True:
            fix = 'give answers, or mark the question with "is_impossible": true'
            raise DataError(f"{self.name}, {place}, field 'answers'", "is empty, but the question has an answer", fix)
        return {**asked, "references": list(dict.fromkeys(texts)), "is_impossible": unanswerable}

    def _part(self, whole: Any, name: str, kind: type, place: str) -> Any:
        found = self._a(dict, whole, place)
        if name not in found:
            why = f"there is no such field; there are {listed(list(found))}"
            raise DataError(f"{self.name}, {place}, field {name!r}", why, "add it, as SQuAD's format has it")
        return self._a(kind, found[name], f"{place}, field {name!r}")

    def _a(self, kind: type, value: Any, place: str) -> Any:
        if not isinstance(value, kind):
            belongs = "an object" if kind is dict else "a list" if kind is list else "text"
            why = f"holds {described(value)}, where {belongs} belongs"
            raise DataError(f"{self.name}, {place}", why, f"put {belongs} there")
        return value

    def _kept(self, row: Record) -> Record:
        self._rows.append(row)
        return row


def _item_lines(text: str) -> Iterator[int]:
    """The line on which each item of a valid JSON list begins."""
    line, counted = 1, 0
    place = _skip(text, _skip(text, 0) + 1)
    while text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        yield line
        place = _skip(text, DECODER.raw_decode(text, place)[1])
        if text[place] == ",":
            place = _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    match = BLANKS.match(text, place)
    return match.end() if match else place
