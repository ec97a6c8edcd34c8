"""Sequences that begin alike, as a tree that holds every common beginning once.

Owns: the radix tree of token sequences (PATRICIA, Morrison 1968), and its order as it is packed. Does not know
trajectories, what a row of a model is, or attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NO_SEGMENT = -1


@dataclass(eq=False)
class Segment:
    """Tokens that all sequences below it have in common, after those of the segment above it."""

    tokens_T: NDArray[np.int32]
    ends: list[int] = field(default_factory=list)
    """The sequences whose last token is the last of this segment."""
    following: dict[int, "Segment"] = field(default_factory=dict)
    """The segments that continue it, by their first token."""

    def cut(self, length: int) -> None:
        """Leaves this segment its first `length` tokens; the others become the one segment that follows."""
        rest = Segment(self.tokens_T[length:], self.ends, self.following)
        self.tokens_T, self.ends, self.following = self.tokens_T[:length], [], {int(rest.tokens_T[0]): rest}


class PrefixTree:
    """Takes sequences one by one; their numbers say which is which."""

    def __init__(self) -> None:
        self._top = Segment(np.empty(0, np.int32))

    def add(self, number: int, tokens_T: NDArray[np.int32]) -> None:
        """Takes in a sequence of at least one token."""
        segment = self._top
        while len(tokens_T):
            following = segment.following.setdefault(int(tokens_T[0]), Segment(tokens_T))
            common = _common(following.tokens_T, tokens_T)
            if common < len(following.tokens_T):
                following.cut(common)
            segment, tokens_T = following, tokens_T[common:]
        segment.ends.append(number)

    def packed(self) -> Iterator[tuple[int, Segment]]:
        """Every segment and the number of the one above it (`NO_SEGMENT`: none), which came before; all that lies
        below a segment follows it at once. Numbers count from 0 in this order."""
        waiting = [(NO_SEGMENT, segment) for segment in reversed(self._top.following.values())]
        number = 0
        while waiting:
            above, segment = waiting.pop()
            yield above, segment
            waiting += [(number, below) for below in reversed(segment.following.values())]
            number += 1


def _common(one_T: NDArray[np.int32], other_T: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    length = min(len(one_T), len(other_T))
    different = np.flatnonzero(one_T[:length] != other_T[:length])
    return int(different[0]) if len(different) else length
