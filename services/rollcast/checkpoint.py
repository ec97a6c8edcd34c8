"""Checkpoints: a folder a step, complete or absent, with a manifest of sizes and digests written last.

Owns: atomic writing, verification, choosing the newest good one, and removal of old ones. Does not know what the files
hold: the learner writes its own, the trainer its own.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from rollcast.rundir import sync

MANIFEST = "MANIFEST.json"
TRAINER = "trainer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was verified."""

    path: Path
    step: int
    trainer: dict[str, Any]


def save(folder: Path, step: int, trainer: dict[str, Any], write_learner: Callable[[Path], None]) -> Path:
    """Writes `folder/step_N`: whatever happens meanwhile, the name appears only on a complete checkpoint."""
    partial = folder / f"step_{step}.tmp-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    write_learner(partial)
    (partial / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n", encoding="utf-8")
    files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    final = folder / f"step_{step}"
    if final.exists():  # A run that went back past this step makes it again.
        shutil.rmtree(final)
    partial.rename(final)
    sync(folder)
    return final


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; those passed over are reported."""
    for path in _by_age(folder):
        problem = problem_of(path)
        if problem is None:
            return open_checkpoint(path)
        report(f"checkpoint {path.name} is not used: {problem}")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises `ValueError` when the folder is not a whole checkpoint."""
    problem = problem_of(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], json.loads((path / TRAINER).read_text(encoding="utf-8")))


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, if anything: every file is held to its size and digest."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _describe(path / name) != expected:
                return f"{name} differs from its digest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last`, and what interrupted saves left behind."""
    for path in list(_by_age(folder))[keep_last:]:
        shutil.rmtree(path)
    for path in folder.glob("step_*.tmp-*"):
        shutil.rmtree(path)


def _by_age(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    yield from sorted(found, key=lambda path: -int(path.name.removeprefix("step_")))


def _describe(path: Path) -> dict[str, Any]:
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return {"bytes": path.stat().st_size, "blake3": digest.hexdigest()}
