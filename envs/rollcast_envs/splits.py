"""Fixed train, validation and test splits, their parts for k-fold validation, and a fixed order within them, by hash.

Owns the assignment of a group to a split and to a part of train, and how splits are named; does not know what the
groups are. Records of one group share their split and their part, so a task that gives all forms of a fact one group
never trains on what it is judged by. A record keeps its split when others come or go, on every machine and in every
release.
"""

import re
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

VALIDATION_STARTS = 0.8
TEST_STARTS = 0.9
PART = re.compile(r"(train|fold)-([1-9]\d*)/([1-9]\d*)", re.ASCII)


class Portion(NamedTuple):
    """What the name of a split stands for: a split, or what is inside or outside one part of train. Name -> records."""

    split: Split
    part: int = 1
    parts: int = 1
    """So many parts is train cut into; 1 for a whole split."""
    inside: bool = True

    @property
    def training(self) -> str:
        """The split to take examples from: never what this one is judged by."""
        return "train" if self.parts == 1 else f"train-{self.part}/{self.parts}"

    def takes(self, mark: Any) -> Any:
        """Whether records of its split whose group has this `fold_mark` are in the portion; marks may be an array."""
        return (mark % self.parts == self.part - 1) == self.inside


def portion_named(name: str) -> Portion:
    """`train`, `validation`, `test`, or of k parts of train: `fold-i/k` the i-th (from 1), `train-i/k` all others.

    Raises ValueError for any other name.

    >>> portion_named("test").split, portion_named("fold-2/5").training
    ('test', 'train-2/5')
    """
    found = PART.fullmatch(name)
    if found is None:
        return Portion(valid_split(name))
    part, parts = int(found[2]), int(found[3])
    if parts < 2 or part > parts:
        raise ValueError(f"split is {name!r}; expected a part from 1 to the number of parts, which is 2 or more")
    return Portion("train", part, parts, found[1] == "fold")


def fold_names(part: int, parts: int) -> tuple[str, str]:
    """The names of what to train on and of what to judge by, for part `part` of `parts`, from 1.

    >>> fold_names(2, 5)
    ('train-2/5', 'fold-2/5')
    """
    return f"train-{part}/{parts}", f"fold-{part}/{parts}"


def in_split(group: str, name: str) -> bool:
    """Whether a group is in the split, or the part of train, of that name. Raises ValueError for an unknown name.

    >>> in_split("country:FR", "train"), in_split("country:FR", "fold-2/2"), in_split("country:FR", "train-2/2")
    (True, True, False)
    """
    portion = portion_named(name)
    return split_of(group) == portion.split and bool(portion.takes(fold_mark(group)))


def split_of(group: str) -> Split:
    """Eight groups in ten are train, one validation, one test.

    >>> split_of("country:FR"), split_of("country:IN"), split_of("country:CZ")
    ('train', 'validation', 'test')
    """
    place = _digest(group, purpose=b"rollcast.split") / 2**64
    if place < VALIDATION_STARTS:
        return "train"
    return "validation" if place < TEST_STARTS else "test"


def fold_mark(group: str) -> int:
    """64 bits that tell into which part a group falls, whatever the number of parts (`Portion.takes`)."""
    return _digest(group, purpose=b"rollcast.fold")


def position(identifier: str) -> int:
    """A sort key that shuffles: the first n records of a split are then a fair sample of it."""
    return _digest(identifier, purpose=b"rollcast.order")


def valid_split(name: str) -> Split:
    """`name`, if it is a whole split; for tasks that know no parts of train."""
    if name not in SPLITS:
        raise ValueError(f"split is {name!r}; expected one of {', '.join(SPLITS)}")
    return name


def _digest(text: str, *, purpose: bytes) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=purpose).digest(), "big")
