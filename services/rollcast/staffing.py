"""What the autoscaler sees of a run, and when: between two learner steps, and again and again where none ends.

Owns: measuring how long the learner waited, and when an observation is due. Does not know the rule (`autoscale.py`)
nor the fleet.
"""

import time
from collections.abc import Callable

from rollcast.autoscale import Bounds, Seen, Size, resize

LONGEST_WINDOW_S = 15.0
"""A learner that waits longer than this is seen to wait before it has its batch."""
RESTS_AFTER_S = 60.0
"""A pause this long is a rest: a fleet that may be empty gives its workers back."""


class Staffing:
    """How many workers are wanted; constant where the bounds leave no choice."""

    def __init__(
        self,
        bounds: Bounds,
        first: int,
        rests_after_s: float = RESTS_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bounds = bounds
        self.size = Size(first)
        self._rests_after_s = rests_after_s
        self._clock = clock
        self._window = clock()
        self._waits_since: float | None = None
        self._most = bounds.most
        self._full = 0.0
        self._paused_since: float | None = None

    def learner_comes(self, full: float) -> None:
        """The learner wants a batch and finds the buffer this full, 0 to 1."""
        self._waits_since, self._full = self._clock(), min(full, 1.0)

    def learner_goes(self, ready: int) -> None:
        """It has its batch; `ready` workers were playing."""
        self._observe(ready)
        self._waits_since = None

    def wanted(self, paused: bool, ready: int, most: int) -> int:
        """The number of workers as of now, of at most `most` that the cluster holds; asked all the while."""
        now, self._most = self._clock(), most
        if paused:
            self._paused_since = now if self._paused_since is None else self._paused_since
            rests = not self.bounds.fewest and now - self._paused_since > self._rests_after_s
            return 0 if rests else self.size.workers
        if self._paused_since is not None:
            self._paused_since, self._window = None, now
            self._waits_since = now if self._waits_since is not None else None
        if self._waits_since is not None and now - self._window > LONGEST_WINDOW_S:
            self._full = 0.0
            self._observe(ready)
        return self.size.workers

    def _observe(self, ready: int) -> None:
        now = self._clock()
        waited_s = 0.0 if self._waits_since is None else now - max(self._waits_since, self._window)
        share = min(waited_s / max(now - self._window, 1e-6), 1.0)
        self._window = now
        if self.bounds.fewest < self.bounds.most:
            held = Bounds(self.bounds.fewest, max(min(self.bounds.most, self._most), 1))
            self.size = resize(self.size, Seen(share, self._full, ready), held)
