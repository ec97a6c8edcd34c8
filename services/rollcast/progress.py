"""What a person sees while a run goes on: a line a step, and below it what is waited for.

Owns: the terminal, its copy in `logs/trainer.log`, and `status.json` for whoever asks from elsewhere. Does not know how
figures come about.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

STATUS_EVERY_S = 1.0
COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("train loss", "loss/supervised", "{:.3f}"),
    ("KL", "kl/behaviour", "{:.4f}"),
    ("entropy", "loss/entropy", "{:.2f}"),
    ("explained", "explained_variance", "{:.2f}"),
    ("stale", "staleness/mean", "{:.1f}"),
    ("samples/s", "samples_per_s", "{:.1f}"),
    ("tokens/s", "learner/tokens_per_s", "{:.0f}"),
)


class Progress:
    """Prints; on a terminal the current activity spins below the last line."""

    def __init__(self, status_file: Path, log: Path, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.status_file = status_file
        self.log = log
        self.total_steps = total_steps
        self._spinner = self.console.status("starting") if self.console.is_terminal else None
        self._written = 0.0
        self._activity = ""

    def start(self) -> None:
        if self._spinner is not None:
            self._spinner.start()

    def stop(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()

    def say(self, text: str) -> None:
        self._print(text)

    def waiting(self, activity: str, facts: Mapping[str, Any]) -> None:
        """What the trainer does now; written to `status.json` about once a second, and at each change."""
        now = time.monotonic()
        if activity == self._activity and now - self._written < STATUS_EVERY_S:
            return
        self._activity, self._written = activity, now
        if self._spinner is not None:
            self._spinner.update(f"{activity}  [dim]{_facts(facts)}[/dim]")
        partial = self.status_file.with_name(f".{self.status_file.name}.{os.getpid()}")
        partial.write_text(json.dumps(self.status(activity, facts)) + "\n", encoding="utf-8")
        partial.replace(self.status_file)

    def status(self, activity: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What `status.json` holds, and the run's control hears."""
        return {"time": time.time(), "waiting_for": activity, "total_steps": self.total_steps, **facts}

    def step(self, row: Mapping[str, Any]) -> None:
        """One line for one step, evaluation included when there was one."""
        parts = [f"step {row['step']:>4}/{self.total_steps}"]
        parts += [f"{label} {form.format(row[key])}" for label, key, form in COLUMNS if key in row]
        parts += [f"{key.removeprefix('eval/')} {row[key]:.3f}" for key in row if key.startswith("eval/")]
        self._print("  ".join(parts))

    def _print(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")


def _facts(facts: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())
