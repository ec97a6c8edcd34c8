"""Rollout workers that were sent away: each ends its engine in good order, or is ended.

Owns: who is still on the way out. Does not know why, nor what the worker had to do before.
"""

import time
from typing import Any

import ray

STOP_S = 20.0
"""What an engine has to end in good order."""


class Departures:
    """Actors that were told to stop."""

    def __init__(self, within_s: float = STOP_S) -> None:
        self._within_s = within_s
        self._leaving: list[tuple[Any, Any, float]] = []

    def send_away(self, actor: Any) -> None:
        self._leaving.append((actor, actor.stop.remote(), time.monotonic() + self._within_s))

    def look(self) -> None:
        """Forgets who is gone, and ends who is late."""
        staying = []
        for actor, stopped, deadline in self._leaving:
            if time.monotonic() > deadline or ray.wait([stopped], timeout=0)[0]:
                ray.kill(actor)
            else:
                staying.append((actor, stopped, deadline))
        self._leaving = staying

    def close(self) -> None:
        """Waits until all are gone, as long as they may take."""
        if self._leaving:
            ray.wait(
                [stopped for _, stopped, _ in self._leaving], num_returns=len(self._leaving), timeout=self._within_s
            )
        for actor, _, _ in self._leaving:
            ray.kill(actor)
        self._leaving = []
