"""The training loop. Read this first: what happens, in the order in which it happens.

Owns: the story. Each verb is a method of `Run` (run.py), one call away.

Rollout workers play all the time. Synchronous training is `max_staleness = 0` in this same loop: a new group is then
handed out only when the last batch has been learned from. While the learner works, workers are fed and heard. When a
learner dies, the loop begins again from the newest checkpoint, with the workers that are there.
"""

import signal
from pathlib import Path

from rollcast.config import RunConfig
from rollcast.run import Run
from rollcast.session import opened


def train(config: RunConfig, run_dir: Path, resume: str = "auto") -> None:
    """Runs or resumes a run in `run_dir`. Raises `RollcastError`; `KeyboardInterrupt` after Ctrl-C, saved."""
    with opened(config, run_dir, resume, Run) as run:
        run.see_through(loop)
        stopped_by = run.stop.signal
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


def loop(run: Run) -> None:
    """From the evaluation before the first step, or the checkpoint the run stands at, to the last checkpoint."""
    if run.step == 0 and run.goes_on:
        run.evaluate()
        run.record()
    while run.goes_on:
        groups = run.collect()
        if groups is None:  # Asked to stop while it waited.
            break
        run.learn(groups)
        run.publish()
        if run.is_due(run.config.eval.every):
            run.evaluate()
        run.record()
        if run.is_due(run.config.checkpoint.every):
            run.save()
    run.finish()
