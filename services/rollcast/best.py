"""The best policy of a run so far: kept by one named figure, and the reason to stop when nothing gets better.

Owns: `weights/best/` and `best.json` beside it, and the count of evaluations since. Does not know how a figure is
measured, or how weights are stored.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from rollcast import metrics
from rollcast.config import EvalSection
from rollcast.errors import RunFailed
from rollcast.rundir import RunDir, write_atomic


class BestPolicy:
    """Judges each evaluation. A resumed run goes on with the best policy of before, if that came before the resume."""

    def __init__(self, folder: RunDir, settings: EvalSection, step: int) -> None:
        self.folder = folder
        self.settings = settings
        self.value: float | None = None
        self.without_better = 0
        kept = read(folder)
        if kept is None or settings.best_metric != kept["metric"] or int(kept["step"]) > step:
            shutil.rmtree(folder.best, ignore_errors=True)
            return
        self.value = float(kept["value"])
        later = [row for row in metrics.read(folder.metrics) if row["step"] > kept["step"]]
        self.without_better = sum(f"eval/{settings.best_metric}" in row for row in later)

    @property
    def out_of_patience(self) -> bool:
        """Whether `eval.patience` evaluations in a row brought nothing better."""
        return 0 < self.settings.patience <= self.without_better

    def judge(self, step: int, version: int, figures: Mapping[str, float], save: Callable[[Path], None]) -> bool:
        """Whether this evaluation is the best so far; its policy is then written with `save`, whole or not at all.

        Raises `RunFailed` when the evaluation has no such figure.
        """
        metric = self.settings.best_metric
        if metric is None:
            return False
        value = figures.get(f"eval/{metric}")
        if value is None:
            known = sorted(name.removeprefix("eval/") for name in figures if name.startswith("eval/"))
            why = f"The evaluation has: {', '.join(known) or 'nothing, since every episode failed'}."
            raise RunFailed(f"eval.best_metric: there is no figure {metric!r}.", why, "Name one of them.")
        if self.value is not None and value <= self.value:
            self.without_better += 1
            return False
        self.value, self.without_better = value, 0
        keep(self.folder, {"metric": metric, "value": value, "step": step, "policy_version": version}, save)
        return True


def keep(folder: RunDir, said: Mapping[str, float | int | str], save: Callable[[Path], None]) -> None:
    """Makes what `save` writes the best policy, and `said` what is known of it: whole, or not at all."""
    partial = folder.best.with_name(".best.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    write_atomic(partial / "best.json", json.dumps(said, indent=2) + "\n")
    shutil.rmtree(folder.best, ignore_errors=True)
    partial.replace(folder.best)


def read(folder: RunDir) -> dict[str, float | int | str] | None:
    """What is known of the best policy: metric, value, step and policy version; None where none is kept."""
    path = folder.best / "best.json"
    if not path.is_file():
        return None
    kept: dict[str, float | int | str] = json.loads(path.read_text(encoding="utf-8"))
    return kept
