"""A run that `rollcast train` trains in a process of its own, on a cluster, and that other commands are asked about.

Owns: starting it with tiny numbers, asking it, reading what it wrote. Does not know the cluster.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollcast import metrics
from rollcast.rundir import RunDir
from run_checks import wait_for

SCRIPTED = Path(__file__).resolve().parents[1] / "deploy" / "configs" / "scripted.toml"
SLOW = ("--env.0.id", "slow_envs:slow/Letters-v0")
GROUPS = 4


class LiveRun:
    """A run on the cluster that `environment` names, trained by `rollcast train`, asked by other verbs."""

    def __init__(
        self,
        environment: dict[str, str],
        base: Path,
        name: str,
        model: str,
        *words: str,
        program: tuple[str, ...] = ("-m", "rollcast", "train"),
    ) -> None:
        self.environment = environment
        self.folder = RunDir(base / name)
        size = ("--rollout.group_size", "2", "--rollout.concurrency", "2", "--learner.prompts_per_step", str(GROUPS))
        endless = ("--run.steps", "100000", "--checkpoint.every", "100000", "--eval.every", "0")
        told = ("--run.dir", str(base), "--run.name", name, "--model.path", model, *size, *endless, *words)
        self.log = base / f"{name}.log"
        with self.log.open("w") as log:
            command = [sys.executable, *program, str(SCRIPTED), *told]
            self.trainer = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def asks(self, verb: str, *words: str) -> tuple[int, str]:
        """Exit code and output of `rollcast VERB RUN ...` in another process."""
        command = [sys.executable, "-m", "rollcast", verb, str(self.folder.path), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, " ".join((done.stdout or done.stderr).split())

    def status(self) -> dict[str, Any]:
        found = self.folder.path / "status.json"
        return json.loads(found.read_text()) if found.exists() else {}

    def events(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.folder.ledger.read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]

    def waits_until(self, condition: Callable[[], object], seconds: float) -> None:
        wait_for(lambda: self.ended() or condition(), seconds)
        assert not self.ended(), self.log.read_text()

    def goes_on(self, steps: int, seconds: float = 60) -> list[dict[str, Any]]:
        """The rows of the next so many steps."""
        begun = len(metrics.read(self.folder.metrics))
        self.waits_until(lambda: len(metrics.read(self.folder.metrics)) >= begun + steps, seconds)
        return metrics.read(self.folder.metrics)[begun : begun + steps]

    def ended(self) -> bool:
        return self.trainer.poll() is not None

    def close(self) -> None:
        self.trainer.terminate()
        self.trainer.wait(60)
