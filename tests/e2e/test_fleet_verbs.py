"""`rollcast scale | pause | resume | stop` from a second terminal: a run on a cluster of its own, with a token."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollcast import checkpoint, metrics
from rollcast.rundir import RunDir

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


class Terminal:
    """Where somebody types: a home, a token or none."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **environment}

    def types(self, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "rollcast", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, text=True, stdout=pipe, stderr=subprocess.STDOUT)

    def sees(self, *words: str) -> tuple[int, str]:
        process = self.types(*words)
        output, _ = process.communicate(timeout=120)
        assert "Traceback" not in output, output
        return process.returncode, " ".join(output.split())


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def status(folder: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.path / "status.json").read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "live")


@pytest.fixture
def first(tmp_path: Path, tiny_bf16: str, folder: RunDir) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """A run that somebody started in a first terminal, and the token that is known only there."""
    token = secrets.token_hex(32)
    terminal = Terminal(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    words = ["--model.path", tiny_bf16, "--run.dir", str(folder.path.parent), "--run.name", folder.path.name]
    endless = ["--run.steps", "100000", "--eval.every", "0", "--checkpoint.every", "1000"]
    trainer = terminal.types("train", str(SCRIPTED), *words, *endless)
    try:
        wait_for(lambda: len(metrics.read(folder.metrics)) > 1, 120)
        yield trainer, token
    finally:
        trainer.terminate()
        trainer.wait(60)


def test_a_run_is_scaled_paused_resumed_and_stopped_from_a_second_terminal(
    tmp_path: Path, first: "tuple[subprocess.Popen[str], str]", folder: RunDir
) -> None:
    trainer, token = first
    second = Terminal(tmp_path, RAY_AUTH_TOKEN=token)
    live = (str(folder.path),)

    code, said = Terminal(tmp_path).sees("pause", *live)
    assert code == 2 and "wants a token" in said and token not in said

    most = status(folder)["most_workers"]
    for impossible in ("-1", str(most + 1)):
        code, said = second.sees("scale", *live, "--", impossible)
        assert code == 2 and f"Possible are 0 to {most}" in said, said
    code, said = second.sees("scale", "nobody", "2", "--run.dir", str(folder.path.parent))
    assert code == 2 and "There is no run 'nobody'" in said and "live" in said

    code, said = second.sees("scale", *live, "2", "--json")
    assert code == 0 and json.loads(said)["asked"]["workers"] == 2
    wait_for(lambda: status(folder)["workers"] == 2, 60)

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
