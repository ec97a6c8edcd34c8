"""When two labels or names are the same, and which of them a data set has.

Owns: the form in which they are compared, and the one look through a data set that finds them. Does not know tasks.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rollcast_envs.records import Record

COMPOSED = 1_000
"""Longer texts are not composed: it can take the square of their length."""

_FOUND: dict[tuple[str, ...], tuple[str, ...]] = {}


def plain(text: str) -> str:
    """The text in lower case, with blanks in the place of punctuation, symbols and white space.

    >>> plain(" **Computer_Science**.") == plain("computer science")
    True
    """
    composed = unicodedata.normalize("NFC", text) if len(text) <= COMPOSED else text
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in composed.casefold()).split())


def distinct(records: Sequence[Record], found_in: Callable[[Record], Iterable[str]], *key: Any) -> tuple[str, ...]:
    """All that `found_in` finds in the records, sorted. A data set, named by `key`, is looked through once a process.

    What `found_in` raises for a record, this raises.
    """
    name = tuple(repr(part) for part in (*key, len(records)))
    if name not in _FOUND:
        _FOUND[name] = tuple(sorted({found for record in records for found in found_in(record)}))
    return _FOUND[name]
