"""Runs code that a model wrote: each answer in a sealed process of its own, under limits on time and memory.

Owns: the warm processes (`sandbox_child.py`), the deadline, the limit on output, and the reading of results, which are
untrusted text. Does not know tasks, nor what a right result is.

What contains an answer: a seccomp filter that allows no file, no network, no process and no signal to another
(`sandbox_filter.py`); limits on memory, processor time and descriptors; SIGKILL at the deadline, and when this process
ends. All of it holds for root. Where there is no seccomp, nothing runs: `SandboxError`.
"""

import atexit
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollcast_envs.sandbox_filter import SandboxError, filter_program

__all__ = ["Call", "Limits", "Outcome", "Sandbox", "SandboxError", "run"]

CHILD = Path(__file__).parent / "sandbox_child.py"
MAX_LINE = 64 * 1024 + 1
"""Bytes of one encoded result, with its line's end."""
MAX_DEPTH = 100
"""Lists within lists of a result."""
MAX_DIGITS = 3500
"""Hexadecimal digits of an int: those are below Python's limit of 4,300 decimal ones."""
PATIENCE_S = 60.0
"""What the sandbox itself, not the answer, may take to start or to clean up: long, as a machine may be overloaded."""
CLOCK = 4
"""Seconds by the clock for one of processor time: that a machine is overloaded is no fault of the answer's."""
PLACES = min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1)
"""How many answers one process runs at once; more would only share the processors."""


@dataclass(frozen=True)
class Limits:
    """What one answer may use, for all of its calls together. Task -> sandbox."""

    seconds: float = 3.0
    """Of processor time, rounded up to whole ones; by the clock `CLOCK` times that, for what sleeps."""
    memory_mb: int = 256
    """Address space, of which Python itself takes about 40."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds is {self.seconds}; expected more than 0 and at most 3600")
        if not 128 <= self.memory_mb <= 1 << 20:
            raise ValueError(f"memory_mb is {self.memory_mb}; expected 128 to {1 << 20}: Python itself takes about 40")


@dataclass(frozen=True)
class Call:
    """One call of the entry point. Task -> sandbox."""

    arguments: str
    """A literal: `([positional, ...], {"name": value, ...})`."""
    through: str = ""
    """What the result is passed through before it is sent: list, tuple, set, sorted or dict; "" for nothing."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call. Sandbox -> task."""

    value: Any = None
    """What it returned, if `error` is ""."""
    error: str = ""
    """Why there is no value: the name of an exception, or what ended the process."""


class Sandbox:
    """One warm process; it runs one answer at a time, each in a fresh sealed child. `run` shares some of them.

    Example:
        >>> with Sandbox() as sandbox:
        ...     sandbox.run(["def double(x): return 2 * x"], "double", [Call("([21], {})")])
        [Outcome(value=42, error='')]
    """

    def __init__(self) -> None:
        program = filter_program()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE_S)
        with theirs:
            self._process = subprocess.Popen(
                # Neither the user's packages nor the user's settings reach it.
                [sys.executable, "-P", "-s", "-S", "-B", str(CHILD), program.hex()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},  # Fixed, so that equal answers get equal rewards.
                start_new_session=True,  # Ctrl-C is for us.
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, sources: Sequence[str], entry_point: str, calls: Sequence[Call], limits: Limits | None = None
    ) -> list[Outcome]:
        """Runs the sources one after the other in one module, then calls its `entry_point`; one outcome a call.

        Raises `SandboxError` if the sandbox itself fails, never for what the code does.
        """
        limits = limits or Limits()
        job = {"sources": list(sources), "entry_point": entry_point, "calls": [asdict(call) for call in calls]}
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._start(theirs, limits)
            try:
                self._await_seal(ours)
                lines, why = _converse(ours, json.dumps(job).encode() + b"\n", len(calls), limits.seconds * CLOCK)
            finally:
                status = self._end()
        missing = Outcome(error=why or _ending(status))
        return [_outcome(line) for line in lines] + [missing] * (len(calls) - len(lines))

    def close(self) -> None:
        """Ends the warm process, and with it whatever it runs."""
        self.forget()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Lets go of the warm process without ending it: after a fork it is the other process's."""
        self._control.close()

    def _start(self, channel: socket.socket, limits: Limits) -> None:
        request = {"memory": limits.memory_mb << 20, "cpu_s": math.ceil(limits.seconds)}
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [channel.fileno()])
        except OSError as error:
            raise self._lost() from error

    def _await_seal(self, channel: socket.socket) -> None:
        """Nothing of the answer is sent before."""
        if not _read_lines(channel, 1, PATIENCE_S)[0]:
            raise SandboxError(
                "no sandbox here: a process could not seal itself with seccomp, and code that a model wrote is run "
                "under seccomp or not at all. Do this: use a kernel with CONFIG_SECCOMP_FILTER, and a container whose "
                "own profile allows prctl(PR_SET_SECCOMP), as Docker's does by default"
            )

    def _end(self) -> int:
        """Has the child killed and reaped; returns its wait status."""
        try:
            self._control.send(b"end")
            status = self._control.recv(64)
        except OSError as error:
            raise self._lost() from error
        if not status:
            raise self._lost()
        return int(status)

    def _lost(self) -> SandboxError:
        return SandboxError(f"the sandbox's warm process {self.pid} has gone, or does not answer; was it killed?")


class _Pool:
    """The warm processes of this process, at most `PLACES`, started when they are first needed."""

    def __init__(self) -> None:
        self.idle: list[Sandbox] = []
        self.places = threading.Semaphore(PLACES)

    def borrow(self) -> Sandbox:
        try:
            return self.idle.pop()
        except IndexError:
            return Sandbox()

    def close(self) -> None:
        while self.idle:
            self.idle.pop().close()

    def after_fork(self) -> None:
        """A fork starts its own: two processes cannot share a control socket."""
        for sandbox in self.idle:
            sandbox.forget()
        self.idle.clear()
        self.places = threading.Semaphore(PLACES)


def run(sources: Sequence[str], entry_point: str, calls: Sequence[Call], limits: Limits | None = None) -> list[Outcome]:
    """`Sandbox.run` on one of this process's own; waits while all are busy. For use from any thread."""
    with _POOL.places:
        try:
            return _run_on(_POOL.borrow(), sources, entry_point, calls, limits)
        except SandboxError:  # Its warm process was killed, perhaps while idle: that says nothing about the answer.
            return _run_on(Sandbox(), sources, entry_point, calls, limits)


def _run_on(sandbox: Sandbox, *answer: Any) -> list[Outcome]:
    try:
        outcomes = sandbox.run(*answer)
    except SandboxError:
        sandbox.close()
        raise
    _POOL.idle.append(sandbox)
    return outcomes


_POOL = _Pool()
atexit.register(_POOL.close)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_POOL.after_fork)


def _converse(channel: socket.socket, job: bytes, count: int, seconds: float) -> tuple[list[bytes], str]:
    """Sends the job and reads `count` lines; fewer come with the reason, as far as it is known on this side."""
    started = time.monotonic()
    channel.settimeout(seconds)
    try:
        channel.sendall(job)
    except TimeoutError:
        return [], "time is up"
    except OSError:  # It is gone already; how, its status tells.
        return [], ""
    return _read_lines(channel, count, started + seconds - time.monotonic())


def _read_lines(channel: socket.socket, count: int, seconds: float) -> tuple[list[bytes], str]:
    deadline = time.monotonic() + seconds
    received, lines = bytearray(), 0
    why = ""
    while lines < count and not why:
        left = deadline - time.monotonic()
        chunk = _receive(channel, left) if left > 0 else None
        if not chunk:
            why = "time is up" if chunk is None else ""
            break
        received += chunk
        lines += chunk.count(b"\n")
        why = "too much output" if len(received) > count * MAX_LINE else ""
    return bytes(received).split(b"\n")[:-1][:count], why


def _receive(channel: socket.socket, seconds: float) -> bytes | None:
    """What has come; nothing at the end of the process, None when nothing has come in time."""
    channel.settimeout(seconds)
    try:
        return channel.recv(1 << 16)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""


def _ending(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return "the process ended"
    name = signal.Signals(os.WTERMSIG(status)).name
    return "time is up" if name in ("SIGKILL", "SIGXCPU") else f"the process ended by {name}"


def _outcome(line: bytes) -> Outcome:
    """Reads a line of the child. It may be anything: an answer can write to its channel itself."""
    if len(line) > MAX_LINE:
        return Outcome(error="too much output")
    try:
        content = json.loads(line)
        if "value" in content:
            return Outcome(_decoded(content["value"], 0))
        return Outcome(error=str(content["error"])[:200] or "unknown")
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return Outcome(error="no result")


def _decoded(tagged: Any, depth: int) -> Any:
    """The value that `sandbox_child.encoded` wrote; raises for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(tagged, list):
        return [_decoded(item, depth + 1) for item in tagged]
    if not isinstance(tagged, dict):
        return tagged
    ((kind, content),) = tagged.items()
    if kind in ("int", "bytes", "complex"):
        return _SIMPLE[kind](content)
    if kind == "dict":
        return {_decoded(key, depth + 1): _decoded(value, depth + 1) for key, value in content}
    return _COLLECTIONS[kind](_decoded(item, depth + 1) for item in content)


def _int(hexadecimal: str) -> int:
    if len(hexadecimal) > MAX_DIGITS:
        raise ValueError("an int that Python does not print")
    return int(hexadecimal, 16)


_SIMPLE: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
}
_COLLECTIONS: dict[str, Callable[[Iterable[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
