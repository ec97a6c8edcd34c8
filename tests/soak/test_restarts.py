"""Long: a trainer killed again and again at random moments always goes on, and every invariant holds to the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rollcast import checkpoint, metrics
from rollcast.rundir import RunDir

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
KILLS = 10
SEED = int(os.environ.get("ROLLCAST_SOAK_SEED", "0"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments(tmp_path: Path, tiny_bf16: str) -> None:
    print(f"ROLLCAST_SOAK_SEED={SEED}")
    draw = random.Random(SEED)
    folder = RunDir(tmp_path / "soak")

    def trainer(steps: int) -> "subprocess.Popen[bytes]":
        words = ["--model.path", tiny_bf16, "--run.dir", str(tmp_path), "--run.name", "soak", "--checkpoint.every", "3"]
        command = [sys.executable, "-m", "rollcast", "train", str(SCRIPTED), *words, "--run.steps", str(steps)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    highest = -1
    for _ in range(KILLS):
        process = trainer(100_000)
        begun = len(metrics.read(folder.metrics))
        deadline = time.monotonic() + 120
        while len(metrics.read(folder.metrics)) <= begun and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 8))
        assert process.poll() is None, "it was alive until the kill"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert folder.high_water_mark() > highest, "versions only grow"
        highest = folder.high_water_mark()
        time.sleep(3)

    kept = checkpoint.newest(folder.checkpoints, print)
    assert kept is not None
    assert trainer(kept.step + 3).wait(timeout=300) == 0
    assert [row["step"] for row in metrics.read(folder.metrics)] == list(range(kept.step + 4))
    assert_trained_once(folder)
    assert not list(Path("/dev/shm").glob("rollcast-soak-*"))


def assert_trained_once(folder: RunDir) -> None:
    """Of all that counts at the end (training undone by a rollback does not), no group stands there twice."""
    done: dict[int, int] = {}
    trained: Counter[int] = Counter()
    for line in folder.ledger.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "rollback":
            done = {group: step for group, step in done.items() if step <= event["step"]}
            trained = Counter(done.keys())
        elif event["event"] == "done":
            done[event["group"]] = event["step"]
            trained[event["group"]] += 1
    assert set(trained.values()) == {1}
