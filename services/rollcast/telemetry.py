"""Figures of a run at Ray's metrics endpoint, for Prometheus: how a key of `metrics.jsonl` is called there.

Owns: the rule from keys to names and labels (docs/metrics.md). Does not know which figures there are, nor who scrapes
them: it is given whole rows, so that no figure is listed twice.
"""

import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

PREFIX = "rollcast_"
EXPORTED_PREFIX = "ray_"
"""Ray puts it before the name of every metric."""
# First part of a key -> the name, and what the further parts say.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "eval": ("eval", ("env", "metric")),
    "eval_kind": ("eval_kind", ("env", "kind", "metric")),
    "reward_of": ("reward_of", ("env", "part")),
    "reward_s": ("reward_function_seconds", ("function", "stat")),
    "ledger": ("ledger_groups", ("state",)),
    "time": ("stage_seconds", ("stage",)),
}
AGAIN_S = 1.0
"""Half of the shortest time after which Ray forgets a gauge; its usual one is 20 s."""
UNITS = (("_per_s", "_per_second"), ("_s", "_seconds"))


class Series(NamedTuple):
    """Where a figure is found: the name without Ray's prefix, and the labels besides `run`."""

    name: str
    labels: dict[str, str]


def series(key: str) -> Series:
    """The series of a key of `metrics.jsonl`.

    >>> series("sync/publish_s")
    Series(name='rollcast_sync_publish_seconds', labels={})
    >>> series("eval/QA-v0/f1")
    Series(name='rollcast_eval', labels={'env': 'QA-v0', 'metric': 'f1'})
    """
    first, *rest = key.split("/")
    name, labels = FAMILIES.get(first, ("", ()))
    if not labels or len(rest) < len(labels):
        return Series(PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", _with_unit(key)), {})
    values = [*rest[: len(labels) - 1], "/".join(rest[len(labels) - 1 :])]
    if first == "time":
        values = [values[0].removesuffix("_s")]
    return Series(PREFIX + name, dict(zip(labels, values, strict=True)))


def _with_unit(key: str) -> str:
    if key == "time":
        return "time_seconds"
    for short, long in UNITS:
        if key.endswith(short):
            return key.removesuffix(short) + long
    return key


class Telemetry:
    """Publishes rows of one run, from the first row to `close`. Needs a connection to Ray.

    Each figure keeps its newest value while the run lives: Ray forgets a gauge that nobody set for twice its report
    interval, and a step may take minutes. So a thread sets all of them again, every `AGAIN_S`.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._newest: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="telemetry", daemon=True)

    def publish(self, row: Mapping[str, float]) -> None:
        """Every figure of a row of `metrics.jsonl`."""
        with self._lock:
            self._newest |= row
        self._set_all()
        if not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """Ends the thread; Ray then forgets the figures."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while not self._closed.wait(AGAIN_S):
            self._set_all()

    def _set_all(self) -> None:
        with self._lock:
            for key, value in self._newest.items():
                found = series(key)
                self._gauge(key, found).set(float(value), {"run": self.run, **found.labels})

    def _gauge(self, key: str, found: Series) -> "Gauge":
        from ray.util.metrics import Gauge

        if found.name not in self._gauges:
            described = f"{key.partition('/')[0]} of metrics.jsonl" if found.labels else f"{key} of metrics.jsonl"
            self._gauges[found.name] = Gauge(found.name, f"{described}, see docs/files.md", ("run", *found.labels))
        return self._gauges[found.name]
