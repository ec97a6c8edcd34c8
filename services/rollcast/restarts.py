"""`rollcast train --restarts N`: the trainer as a child, started again when it crashes.

Owns: when a run is started again, and how signals reach it. Does not know what a run is: it goes on from its newest
checkpoint because `--resume auto` does. Loads nothing heavy: this process lives as long as the run.

A run is started again when its process crashed: killed by a signal, out of memory, or failed (exit code 1). It is not
when it is done, was asked to stop, is configured wrongly, or diverged: the next try would end the same way.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

FINAL = frozenset({0, 2, 3, 130})
"""Exit codes of `rollcast train` after which a start would change nothing."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class Restarts:
    """Runs `first` to its end, and `again` after a crash, at most `most` times."""

    def __init__(self, first: Sequence[str], again: Sequence[str], most: int, say: Callable[[str], None]) -> None:
        self.first, self.again = list(first), list(again)
        self.most = most
        self.say = say
        self.asked_to_stop: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """The exit code of the last start; 128 and the signal where one ended it."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = self._until_final()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return code if code >= 0 else 128 - code

    def _until_final(self) -> int:
        for start in range(self.most + 1):
            code = self._once(self.again if start else self.first)
            if code in FINAL or self.asked_to_stop is not None:
                return code
            if start < self.most:
                self.say(f"{_told(code)}; it is started again from its newest checkpoint ({start + 1} of {self.most})")
                self._wait(min(FIRST_WAIT_S * 2**start, LONGEST_WAIT_S))
                if self.asked_to_stop is not None:
                    return code
        self.say(f"{_told(code)}, and has been started again {self.most} times: no more")
        return code

    def _once(self, command: list[str]) -> int:
        """The child's exit code, or a signal's number below zero. It is in this process group, so
        that Ctrl-C, and Ray when it ends a job, reach it too."""
        parent = os.getpid()
        self._child = subprocess.Popen(command, preexec_fn=lambda: _end_with(parent))
        if self.asked_to_stop is not None:  # It came before there was a child to tell.
            self._child.terminate()
        return self._child.wait()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """SIGTERM is told to the child, which may have had it already: a second one changes nothing. SIGINT is not: a
        terminal sends Ctrl-C to both, and a second one would interrupt what the first asked to be saved."""
        self.asked_to_stop = number
        if number == signal.SIGTERM and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.asked_to_stop is None and time.monotonic() < deadline:
            time.sleep(0.1)


def _end_with(parent: int) -> None:
    """Linux sends SIGTERM to the child when this process dies: a killed supervisor leaves no run behind."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _told(code: int) -> str:
    if code < 0:
        return f"the run was killed by {signal.Signals(-code).name}"
    return f"the run failed with exit code {code}"


def train_again(first: Sequence[str], again: Sequence[str], most: int, say: Callable[[str], None]) -> int:
    """`rollcast FIRST`, and `rollcast AGAIN` after a crash; returns the exit code."""
    rollcast = [sys.executable, "-m", "rollcast"]
    return Restarts([*rollcast, *first], [*rollcast, *again], most, say).run()
