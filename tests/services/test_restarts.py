"""Restarts of a child that crashes: real processes, no trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollcast import restarts
from rollcast.restarts import Restarts


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_WAIT_S", 0.01)


def child(tmp_path: Path, word: str, *then: str) -> list[str]:
    """A shell that notes its word, then does what it is told."""
    return ["/bin/sh", "-c", "; ".join([f"echo {word} >> {tmp_path / 'starts'}", *then])]


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "starts").read_text().split()


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_an_end_that_would_be_the_same_again_is_final(tmp_path: Path, code: int) -> None:
    first, again = child(tmp_path, "first", f"exit {code}"), child(tmp_path, "again")
    assert Restarts(first, again, 3, print).run() == code
    assert starts(tmp_path) == ["first"]


@pytest.mark.parametrize("crash", ["exit 1", "kill -9 $$", "exit 77"])
def test_a_crash_is_started_again_until_it_ends_well(tmp_path: Path, crash: str) -> None:
    said: list[str] = []
    first, again = child(tmp_path, "first", crash), child(tmp_path, "again", "exit 0")
    assert Restarts(first, again, 3, said.append).run() == 0
    assert starts(tmp_path) == ["first", "again"]
    assert len(said) == 1 and "started again from its newest checkpoint (1 of 3)" in said[0]


def test_there_is_an_end_to_it(tmp_path: Path) -> None:
    said: list[str] = []
    crash = child(tmp_path, "start", "kill -9 $$")
    assert Restarts(crash, crash, 2, said.append).run() == 128 + signal.SIGKILL
    assert starts(tmp_path) == ["start"] * 3
    assert said[-1] == "the run was killed by SIGKILL, and has been started again 2 times: no more"


SUPERVISOR = """
import sys
from rollcast.restarts import Restarts
sys.exit(Restarts(sys.argv[1:], sys.argv[1:], 5, lambda text: print(text, file=sys.stderr)).run())
"""


def supervised(tmp_path: Path, *then: str) -> "tuple[subprocess.Popen[bytes], psutil.Process]":
    """A supervisor of its own process, and its child, once that runs."""
    command = [sys.executable, "-c", SUPERVISOR, *child(tmp_path, "start", *then)]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "starts").exists() or not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, psutil.Process(process.pid).children()[0]


WAITS = 'trap "echo saved >> $0.out; exit 0" TERM; while true; do sleep 0.05; done'


def test_sigterm_reaches_the_child_which_is_not_started_again(tmp_path: Path) -> None:
    waits = WAITS.replace("$0.out", str(tmp_path / "starts"))
    process, _ = supervised(tmp_path, waits)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert starts(tmp_path) == ["start", "saved"]


def test_ctrl_c_comes_once_to_each_process_of_the_group(tmp_path: Path) -> None:
    interrupted = f'trap "echo interrupted >> {tmp_path / "starts"}; exit 130" INT; while true; do sleep 0.05; done'
    process, _ = supervised(tmp_path, interrupted)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does.
    assert process.wait(20) == 130
    assert starts(tmp_path) == ["start", "interrupted"]


def test_a_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    waits = WAITS.replace("$0.out", str(tmp_path / "starts"))
    process, below = supervised(tmp_path, waits)
    process.kill()
    process.wait()
    psutil.wait_procs([below], timeout=20)
    assert starts(tmp_path) == ["start", "saved"], "it was asked to end, and could save"
