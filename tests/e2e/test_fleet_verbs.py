"""`rollcast scale | pause | resume | stop` from a second terminal: a run on a cluster of its own, with a token.

`test_fleet.py` has the same verbs on a cluster that RAY_ADDRESS names.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollcast import checkpoint, metrics
from rollcast.rundir import RunDir
from run_checks import wait_for

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


class Terminal:
    """Where somebody types: a home, a token or none."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **environment}

    def trains(self, log: Path, *words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "rollcast", "train", *words]
        with log.open("w") as output:
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)

    def sees(self, *words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "rollcast", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, " ".join((done.stdout or done.stderr).split())


def status(folder: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.path / "status.json").read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "live")


@pytest.fixture
def first(tmp_path: Path, tiny_bf16: str, folder: RunDir) -> Iterator["tuple[subprocess.Popen[bytes], str]"]:
    """A run that somebody started in a first terminal, and the token that is known only there."""
    token = secrets.token_hex(32)
    terminal = Terminal(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    words = ["--model.path", tiny_bf16, "--run.dir", str(folder.path.parent), "--run.name", folder.path.name]
    endless = ["--run.steps", "100000", "--eval.every", "0", "--checkpoint.every", "1000"]
    trainer = terminal.trains(tmp_path / "log", str(SCRIPTED), *words, *endless)
    try:
        wait_for(lambda: len(metrics.read(folder.metrics)) > 1, 120)
        yield trainer, token
    finally:
        trainer.terminate()
        trainer.wait(60)


@pytest.mark.soak
def test_a_run_is_scaled_paused_resumed_and_stopped_from_a_second_terminal(
    tmp_path: Path, first: "tuple[subprocess.Popen[bytes], str]", folder: RunDir
) -> None:
    trainer, token = first
    second = Terminal(tmp_path, RAY_AUTH_TOKEN=token)
    live = (str(folder.path),)

    code, said = Terminal(tmp_path).sees("pause", *live)
    assert code == 2 and "wants a token" in said and token not in said

    most = status(folder)["most_workers"]
    code, said = second.sees("scale", *live, str(most + 1))
    assert code == 2 and f"Possible are 0 to {most}" in said, said
    code, said = second.sees("scale", "nobody", "2", "--run.dir", str(folder.path.parent))
    assert code == 2 and "There is no run 'nobody'" in said and "live" in said

    code, said = second.sees("scale", *live, "--", "-1")
    assert code == 2 and "cannot have -1" in said
    code, said = second.sees("scale", *live, "2", "--json")
    assert code == 0 and json.loads(said)["asked"]["workers"] == 2
    wait_for(lambda: status(folder)["workers"] == 2, 60)
    assert second.sees("scale", *live, "0")[0] == 0
    wait_for(lambda: status(folder)["workers"] == status(folder)["draining"] == 0, 30)
    step = status(folder)["step"]
    assert second.sees("scale", *live, "auto")[0] == 0
    wait_for(lambda: status(folder)["workers"] == 1 and status(folder)["step"] > step, 60)

    assert second.sees("pause", *live)[0] == 0
    wait_for(lambda: status(folder)["waiting_for"] == "to be resumed", 30)
    step = status(folder)["step"]
    time.sleep(2)
    assert status(folder)["step"] == step and status(folder)["paused"]
    assert second.sees("resume", *live)[0] == 0
    wait_for(lambda: status(folder)["step"] >= step + 2, 30)

    code, said = second.sees("stop", *live)
    assert code == 0 and "ended" in said
    assert trainer.wait(30) == 0
    kept = checkpoint.newest(folder.checkpoints, print)
    assert kept is not None and kept.step == metrics.read(folder.metrics)[-1]["step"]

    code, said = second.sees("scale", *live, "1")
    assert code == 2 and "does not live: it has ended" in said and "rollcast train" in said
