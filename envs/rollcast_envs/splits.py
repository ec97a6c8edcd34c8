"""Fixed train, validation and test splits, and a fixed order within them, by hash.

Owns the assignment of a group to a split; does not know what the groups are. Records of one group share
their split, so a task that gives all forms of a fact one group never trains on what it is judged by. A
record keeps its split when others come or go, on every machine and in every release.
"""

from hashlib import blake2b
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

VALIDATION_STARTS = 0.8
TEST_STARTS = 0.9


def split_of(group: str) -> Split:
    """Eight groups in ten are train, one validation, one test.

    >>> split_of("country:FR"), split_of("country:IN"), split_of("country:CZ")
    ('train', 'validation', 'test')
    """
    place = _digest(group, purpose=b"rollcast.split") / 2**64
    if place < VALIDATION_STARTS:
        return "train"
    return "validation" if place < TEST_STARTS else "test"


def position(identifier: str) -> int:
    """A sort key that shuffles: the first n records of a split are then a fair sample of it."""
    return _digest(identifier, purpose=b"rollcast.order")


def valid_split(name: str) -> Split:
    """`name`, if it is a split."""
    if name not in SPLITS:
        raise ValueError(f"split is {name!r}; expected one of {', '.join(SPLITS)}")
    return name


def _digest(text: str, *, purpose: bytes) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=purpose).digest(), "big")
