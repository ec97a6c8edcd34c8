"""How many rollout workers a run should have, from what its learner waits for.

Owns: the rule, and its hysteresis. Does not know workers, Ray or clocks: it is told what was seen, and answers with a
number.

A learner that waits for rollouts needs more of them: of n workers that kept it waiting for a share w of the time,
n / (1 - w) would just do. A learner that never waits, and finds the buffer full each time it comes, may have more than
it needs: one worker goes at a time, and the next only after a while. If the learner then waits again, the worker comes
back, and the next attempt to save it has to wait twice as long: a fleet at its right size stays there.
"""

import math
from dataclasses import dataclass, replace

WAITS_ABOVE = 0.05
"""Share of the time that the learner waits for rollouts from which the fleet is too small."""
WAITS_NOT_BELOW = 0.01
FULL_ABOVE = 0.95
GROW_AFTER = 2
"""Observations in a row that it takes to grow, so that one slow answer starts no engine."""
SHRINK_AFTER = 4
LONGEST_PATIENCE = 64


@dataclass(frozen=True)
class Bounds:
    """Fewest and most workers; `most` at least 1."""

    fewest: int
    most: int

    def keep(self, size: int) -> int:
        return max(min(size, self.most), self.fewest, 1 if self.most else 0)


@dataclass(frozen=True)
class Seen:
    """What was seen between two learner steps. Run -> autoscaler."""

    waited: float
    """Share of the time that the learner waited for rollouts, 0 to 1."""
    full: float
    """How full the buffer was when the learner came for a batch: 1 is all that may wait there, 0 nothing."""
    ready: int
    """Workers that were playing."""


@dataclass(frozen=True)
class Size:
    """The number of workers wanted, and what led to it."""

    workers: int
    short: int = 0
    """Observations in a row in which the learner waited."""
    ample: int = 0
    """Observations in a row in which it did not, and the buffer was full."""
    patience: int = SHRINK_AFTER
    shrunk: bool = False
    """Whether the last change was a worker less."""


def resize(size: Size, seen: Seen, bounds: Bounds) -> Size:
    """The size after one more observation.

    >>> size = Size(2)
    >>> for _ in range(GROW_AFTER):
    ...     size = resize(size, Seen(waited=0.6, full=0.0, ready=2), Bounds(1, 8))
    >>> size.workers
    4
    """
    kept = bounds.keep(size.workers)
    if kept != size.workers:
        return Size(kept, patience=size.patience)
    if seen.ready != size.workers:  # What was asked for last has not come about yet: this says nothing about it.
        return replace(size, short=0, ample=0)
    if seen.waited > WAITS_ABOVE:
        return _grown(replace(size, short=size.short + 1, ample=0), seen, bounds)
    if seen.waited < WAITS_NOT_BELOW and seen.full > FULL_ABOVE:
        return _shrunk(replace(size, short=0, ample=size.ample + 1), bounds)
    return replace(size, short=0, ample=0)


def _grown(size: Size, seen: Seen, bounds: Bounds) -> Size:
    enough = math.ceil(size.workers / max(1.0 - seen.waited, 0.5))
    wanted = bounds.keep(max(enough, size.workers + 1))
    if size.short < GROW_AFTER or wanted == size.workers:
        return size
    patience = min(2 * size.patience, LONGEST_PATIENCE) if size.shrunk else size.patience
    return Size(wanted, patience=patience)


def _shrunk(size: Size, bounds: Bounds) -> Size:
    wanted = bounds.keep(size.workers - 1)
    if size.ample < size.patience or wanted == size.workers:
        return size
    return Size(wanted, patience=size.patience, shrunk=True)
