"""The run directory: one living owner, a version mark that only rises, and plain words where nothing can be written."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rollcast.errors import UsageError
from rollcast.rundir import RunDir, write_atomic


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "first")
    run.create()
    return run


@pytest.fixture
def other() -> "subprocess.Popen[bytes]":
    """Another living process, as good as a trainer for this purpose."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def owned_by(run: RunDir, process: psutil.Process, **more: object) -> None:
    run.claim("local", "rollcast")
    record = json.loads(run.run_json.read_text())
    record |= {"pid": process.pid, "process_started": process.create_time(), **more}
    run.run_json.write_text(json.dumps(record))


def test_the_folders_are_there_and_private(run: RunDir) -> None:
    for folder in (run.rollouts, run.checkpoints, run.weights, run.logs):
        assert folder.is_dir() and folder.parent == run.path
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    run.create()
    assert {run.config.name, run.metrics.name, run.ledger.name, run.curve.name, run.tensorboard.name} == {
        "config.toml",
        "metrics.jsonl",
        "ledger.jsonl",
        "curve.png",
        "tensorboard",
    }


@pytest.mark.parametrize("taken", ["runs", "runs/first", "runs/first/weights"])
def test_a_folder_that_cannot_be_made_is_told_in_three_lines(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        RunDir(tmp_path / "runs" / "first").create()
    assert caught.value.exit_code == 2 and "--run.dir" in caught.value.fix and taken in caught.value.why


def test_the_owner_is_recorded(run: RunDir) -> None:
    assert run.owner() is None
    run.claim("ray://head:10001", "rollcast")
    owner = run.owner()
    assert owner is not None
    assert (owner["name"], owner["address"], owner["pid"]) == ("first", "ray://head:10001", os.getpid())
    run.claim("local", "rollcast")


def test_a_run_with_a_living_owner_is_refused(run: RunDir, other: "subprocess.Popen[bytes]") -> None:
    owned_by(run, psutil.Process(other.pid))
    before = run.run_json.read_bytes()
    with pytest.raises(UsageError, match="is being trained already") as caught:
        run.claim("local", "rollcast")
    assert str(other.pid) in caught.value.why and run.run_json.read_bytes() == before


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_dead_owner_is_followed(run: RunDir, other: "subprocess.Popen[bytes]", reaped: bool) -> None:
    owned_by(run, psutil.Process(other.pid))
    os.kill(other.pid, signal.SIGKILL)
    if reaped:
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    run.claim("local", "rollcast")
    owner = run.owner()
    assert owner is not None and owner["pid"] == os.getpid()


def test_a_pid_given_to_another_process_is_no_owner(run: RunDir, other: "subprocess.Popen[bytes]") -> None:
    process = psutil.Process(other.pid)
    owned_by(run, process, process_started=process.create_time() - 3600)
    run.claim("local", "rollcast")


def test_an_owner_on_another_host_is_not_ours_to_judge(run: RunDir, other: "subprocess.Popen[bytes]") -> None:
    owned_by(run, psutil.Process(other.pid), host="another-host")
    run.claim("local", "rollcast")


def test_the_high_water_mark_only_rises_and_is_read_back(run: RunDir) -> None:
    assert run.high_water_mark() == -1
    for version in (0, 1, 7):
        run.raise_high_water_mark(version)
        assert RunDir(run.path).high_water_mark() == version
    for announced in (7, 3, -1):
        with pytest.raises(ValueError, match="versions only grow"):
            run.raise_high_water_mark(announced)
    assert run.high_water_mark() == 7


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomic(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["state.json"]
