"""Figures of a run: `metrics.jsonl`, TensorBoard, and where the seconds went.

Owns: writing rows under fixed names, cutting them after a resume, and accounting time by stage. Does not know how a
figure comes about, nor what else is done with a row.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from rollcast.rundir import write_atomic


class MetricsWriter:
    """One object a step, flat keys; what is not known is absent, never NaN. `publish` is given each row as well."""

    def __init__(
        self, path: Path, tensorboard: Path | None, publish: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.path = path
        self._publish = publish
        self._board = SummaryWriter(str(tensorboard)) if tensorboard is not None else None

    def write(self, step: int, figures: Mapping[str, float]) -> dict[str, Any]:
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        row = {"step": step, "time": time.time(), **known}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._publish is not None:
            self._publish(row)
        return row

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def cut(path: Path, step: int) -> None:
    """Removes rows newer than the checkpoint a run resumes from."""
    kept = [row for row in read(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


class Stopwatch:
    """Seconds by stage. `with watch("publish"): ...`"""

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - started)

    def add(self, stage: str, seconds: float) -> None:
        self.total[stage] += seconds
        self._lap[stage] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds by stage since the last lap."""
        done, self._lap = dict(self._lap), defaultdict(float)
        return done
