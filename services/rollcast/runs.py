"""Runs by name: which there are, where one lies, and whether it still goes on.

Owns: what RUN and CHECKPOINT mean on the command line, and the state of a run. Does not know what a run has learned.
"""

import json
import os
import socket
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollcast import metrics
from rollcast.checkpoint import MANIFEST
from rollcast.errors import UsageError
from rollcast.rundir import RunDir, is_alive

State = Literal["running", "finished", "ended", "unknown"]
"""`ended`: before its last step. `unknown`: it ran on another host, and nothing was heard from it lately."""

HEARD_LATELY_S = 60.0


@dataclass(frozen=True)
class Source:
    """A policy that somebody names: of a run, or of one checkpoint of it."""

    run: RunDir
    checkpoint: Path | None = None


def known(base: Path) -> list[RunDir]:
    """The runs below `base`, the one started last first."""
    found = [RunDir(path.parent.absolute()) for path in base.glob("*/run.json")]
    return sorted(found, key=lambda run: -started(run))


def find(word: str | None, base: Path) -> RunDir:
    """The run of that name below `base`, or in that folder; without a word the one started last."""
    if word is None:
        runs = known(base)
        if not runs:
            raise _no_runs(base)
        return runs[0]
    for path in (base / word, Path(word).expanduser()):
        if is_run(path):
            return RunDir(path.absolute())
    raise _unknown(f"There is no run {word!r}.", base)


def find_source(word: str, base: Path) -> Source:
    """RUN or CHECKPOINT; a checkpoint is a folder inside its run."""
    for path in (base / word, Path(word).expanduser()):
        if (path / MANIFEST).is_file():
            return Source(_run_of(path.absolute()), path.absolute())
        if is_run(path):
            return Source(RunDir(path.absolute()))
    raise _unknown(f"There is no run or checkpoint {word!r}.", base)


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def started(run: RunDir) -> float:
    """Epoch seconds at which the run was last started; 0 where that is not known."""
    return float(owner_of(run).get("started", 0.0))


def owner_of(run: RunDir) -> dict[str, Any]:
    """run.json, or nothing where it cannot be read."""
    return read_json(run.run_json)


def status_of(run: RunDir) -> dict[str, Any]:
    """The last status.json, or nothing."""
    return read_json(run.path / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    """An object, empty where there is none to read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def total_steps(run: RunDir) -> int | None:
    """How many steps the run is to take: what it last said, else what its configuration says."""
    said = status_of(run).get("total_steps")
    if said is not None:
        return int(said)
    try:
        return int(tomllib.loads(run.config.read_text(encoding="utf-8"))["run"]["steps"])
    except (OSError, ValueError, KeyError):
        return None


def state_of(run: RunDir) -> State:
    """Whether the run goes on, as its process or, from another host, its last word tells."""
    owner, status = owner_of(run), status_of(run)
    elsewhere = owner.get("host") != socket.gethostname()
    if not elsewhere and is_alive(owner):
        return "running"
    steps, rows = total_steps(run), metrics.read(run.metrics)
    if steps is not None and rows and rows[-1]["step"] >= steps:
        return "finished"
    if elsewhere:
        return "running" if time.time() - status.get("time", 0.0) < HEARD_LATELY_S else "unknown"
    return "ended"


def _run_of(checkpoint: Path) -> RunDir:
    path = checkpoint.parent.parent
    if not is_run(path):
        raise UsageError(
            f"{checkpoint} is not inside a run.",
            "The run's config.toml names the model that the checkpoint belongs to.",
            "Name a checkpoint such as runs/NAME/checkpoints/step_10.",
        )
    return RunDir(path)


def _unknown(what: str, base: Path) -> UsageError:
    runs = known(base)
    if not runs:
        return UsageError(
            what, f"{base.absolute()} holds no runs.", "Name a run directory, or its parent with --run.dir."
        )
    names = ", ".join(run.path.name for run in runs)
    why = f"The runs below {base.absolute()} are: {names}."
    return UsageError(what, why, "Name one of them or a run directory, or other runs' parent with --run.dir.")


def _no_runs(base: Path) -> UsageError:
    why = "There is no such folder." if not os.path.isdir(base) else "No folder in it has a run.json."
    fix = "Start one with `rollcast demo` or `rollcast train CONFIG.toml`, or name their folder with --run.dir."
    return UsageError(f"There are no runs below {base.absolute()}.", why, fix)
