"""Where a run starts, or goes back to when a learner dies: afresh, from its newest good checkpoint, or from one that
somebody names.

Owns: that choice, and putting the run directory back to it. Does not know what is in a learner's state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rollcast import checkpoint, metrics, records
from rollcast.errors import UsageError
from rollcast.rundir import RunDir


@dataclass(frozen=True)
class Start:
    """The step a run goes on from; `checkpoint` is None for a fresh one."""

    step: int
    checkpoint: Path | None
    again: str = "auto"
    """What to `choose_start` with to come back here, until the run has saved a checkpoint of its own."""


def choose_start(folder: RunDir, resume: str, report: Callable[[str], None]) -> Start:
    """`resume` is auto, never, or the path of a checkpoint. Rows and rollouts after the start are removed.

    Raises `UsageError` when `never` meets an existing run, or a named checkpoint is not whole.
    """
    if resume == "auto":
        found = checkpoint.newest(folder.checkpoints, report)
    elif resume == "never":
        _refuse_existing(folder)
        found = None
    else:
        found = _named(Path(resume))
    again = "auto" if resume == "never" else resume
    start = Start(found.step, found.path, again) if found is not None else Start(0, None)
    # Without a checkpoint the row of step 0 is made again too.
    keep = start.step if found is not None else -1
    metrics.cut(folder.metrics, keep)
    records.cut(folder.rollouts, keep)
    records.cut(folder.evaluations, keep)
    if found is not None:
        report(f"resuming from {found.path}, step {found.step}")
    return start


def _refuse_existing(folder: RunDir) -> None:
    if any(folder.checkpoints.iterdir()) or folder.metrics.exists():
        raise UsageError(
            f"The run {folder.path.name} exists already.",
            f"{folder.path} holds an earlier run, and --resume never does not go on with it.",
            "Choose another name with --run, or use --resume auto.",
        )


def _named(path: Path) -> checkpoint.Checkpoint:
    try:
        return checkpoint.open_checkpoint(path)
    except ValueError as error:
        raise UsageError(
            "The checkpoint cannot be resumed from.",
            str(error),
            "Name a folder such as runs/NAME/checkpoints/step_10.",
        ) from error
