"""Reward functions of the user in child processes: never in the caller's, each call with a deadline and retries.

Owns: the children, the queues before them, and the figures of every reward. Does not know what a reward is for, nor
weights; a child's side is `reward_child.py`.

A function may hang in a way that no thread can be freed of (a regular expression holds the interpreter's lock while
it backtracks), end its process, or print. So it runs in a process of its own, which is killed at the deadline and
replaced. Callers are threads of environments: they wait without that lock, and always get an `Outcome`, never an
exception.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

CHILD = Path(__file__).with_name("reward_child.py")
MAX_BATCH = 32
MAX_REPLY = 1_000_000
LOOK_S = 1.0
"""How often a caller looks whether its deadline has moved."""
GRACE_S = 0.25
"""How much later than its deadline a call gives up, so that the thread which saw why can say so."""


class RewardRefused(ValueError):
    """A reward function cannot be loaded, or cannot be called in any known form; says why."""


@dataclass(frozen=True)
class RewardCall:
    """One answer to be rewarded. `fields` and `references` hold JSON values. Wrapper -> reward."""

    question: str
    answer: str
    references: list[str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one call: a finite `value`, or the reason (`error`) why there is none."""

    value: float | None = None
    error: str | None = None
    seconds: float = 0.0
    """What the call took in all, waiting for its turn and retries included."""
    retries: int = 0
    timed_out: bool = False


@dataclass(frozen=True)
class RewardFigures:
    """What calls of one reward took since the process began."""

    calls: int = 0
    failures: int = 0
    timeouts: int = 0
    retries: int = 0
    slow_calls: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    def plus(self, outcome: Outcome, slow_s: float) -> "RewardFigures":
        return RewardFigures(
            self.calls + 1,
            self.failures + (outcome.value is None),
            self.timeouts + outcome.timed_out,
            self.retries + outcome.retries,
            self.slow_calls + (outcome.seconds > slow_s),
            self.total_s + outcome.seconds,
            max(self.max_s, outcome.seconds),
        )


@dataclass(frozen=True)
class Function:
    """A function of the user, the keywords that it always gets, and how many processes it may have."""

    path: str
    """`package.module:function`, or `file.py:function`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 2

    @property
    def key(self) -> str:
        return json.dumps([self.path, dict(self.options)], sort_keys=True)


@dataclass
class _Request:
    """One call on its way through the queue."""

    call: str  # As JSON.
    timeout_s: float
    retries: int
    submitted: float = field(default_factory=monotonic)
    started: float | None = None
    tries: int = 0
    alone: bool = False
    ends: float = field(init=False)
    settled: "Future[Outcome]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.ends = self.submitted + (self.retries + 1) * self.timeout_s

    def settle(self, **outcome: Any) -> None:
        retries = max(0, self.tries - 1)
        with suppress(InvalidStateError):  # The caller gave up and the child answered at the same moment.
            self.settled.set_result(Outcome(seconds=monotonic() - self.submitted, retries=retries, **outcome))

    def wait(self) -> Outcome:
        while (left := self.ends + GRACE_S - monotonic()) > 0:
            with suppress(TimeoutError):
                return self.settled.result(min(left, LOOK_S))
        now = monotonic()
        waited = (self.started or now) - self.submitted
        late = f"was not done within {now - self.submitted:.3g} s, {waited:.3g} s of which it waited for its turn"
        self.settle(error=f"{late}: give it more processes, or a longer timeout_s", timed_out=True)
        return self.settled.result()


class _Died(Exception):
    """The child ended, or said what is no answer."""


class _Child:
    """One process with one function loaded. Used by the thread that made it, which it does not outlive."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        command = [sys.executable, "-P", str(CHILD), str(theirs.fileno()), str(os.getpid())]
        null = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=null, stdout=null, pass_fds=[theirs.fileno()], process_group=0
            )
        self._reaping = threading.Lock()
        self._received = b""
        self.batches = False

    def load(self, function: Function, start_s: float) -> None:
        """Raises `RewardRefused`."""
        path = [os.getcwd(), *(str(entry) or os.getcwd() for entry in sys.path)]
        opening = {"function": function.path, "options": dict(function.options), "path": path}
        try:
            ready = self.ask(json.dumps(opening), start_s)
        except TimeoutError as error:
            raise RewardRefused(f"was not loaded within {start_s:g} s") from error
        except _Died as death:
            raise RewardRefused(f"{death} while it was loaded") from death
        if "refused" in ready:
            raise RewardRefused(ready["refused"])
        self.batches = bool(ready["batches"])

    def ask(self, message: str, timeout_s: float) -> dict[str, Any]:
        """One line there, one line back. Raises `TimeoutError`, or `_Died` if there will be no answer."""
        deadline = monotonic() + timeout_s
        try:
            self._channel.settimeout(timeout_s)
            self._channel.sendall(message.encode() + b"\n")
            while b"\n" not in self._received:
                self._channel.settimeout(max(1e-3, deadline - monotonic()))
                chunk = self._channel.recv(65536)
                if not chunk or len(self._received) > MAX_REPLY:
                    raise _Died(self._last_words())
                self._received += chunk
        except TimeoutError:
            raise
        except OSError as error:
            raise _Died(self._last_words()) from error
        line, _, self._received = self._received.partition(b"\n")
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise _Died("wrote into its own channel") from error

    def strike(self) -> None:
        """Kills the process and whatever it started itself: they are a process group of their own. From any thread."""
        with self._reaping:
            self._strike()

    def kill(self) -> None:
        with self._reaping:
            self._strike()
            self._process.wait()
        self._channel.close()

    def _strike(self) -> None:
        if self._process.returncode is None:  # Not yet waited for, so its number is still its own.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        self.kill()
        code = self._process.returncode
        return f"ended its process with exit code {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"


class _Crew:
    """The children of one function, and the queue before them; one thread for each child."""

    def __init__(self, function: Function, start_s: float) -> None:
        self.function = function
        self.size = function.processes
        self._start_s = start_s
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._closed = False
        self._children: set[_Child] = set()
        self._opened: Future[None] = Future()

    def open(self) -> None:
        """Waits for the first child. Raises `RewardRefused`."""
        with self._changed:
            if not self._threads:
                self._hire()
        self._opened.result()

    def submit(self, request: _Request) -> None:
        with self._changed:
            if self._closed:
                request.settle(error="was called after its pool was closed")
                return
            self._waiting.append(request)
            if len(self._waiting) > len(self._threads) - self._busy and len(self._threads) < self.size:
                self._hire()
            self._changed.notify()

    def close(self) -> None:
        """Kills the children at once; what waits fails."""
        with self._changed:
            self._closed = True
            for child in self._children:
                child.strike()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _hire(self) -> None:
        # The kernel ends a child with the thread that started it: so each has its own, which stays.
        thread = threading.Thread(target=self._work, daemon=True, name=f"reward {self.function.path}")
        try:
            thread.start()
        except RuntimeError as error:  # The system has no more; those there are go on, if there are any.
            if not self._threads:
                self._give_up(RewardRefused(f"got no thread ({error})"))
            return
        self._threads.append(thread)

    def _give_up(self, refusal: RewardRefused) -> None:
        if not self._opened.done():
            self._opened.set_exception(refusal)
        while self._waiting:
            self._waiting.popleft().settle(error=str(refusal))

    def _work(self) -> None:
        child = self._start()
        while batch := self._take(child is not None and child.batches):
            child = child or self._start(batch)
            if child is not None and not self._run(child, batch):
                self._discard(child)
                child = self._start(batch)
            with self._changed:
                self._busy -= 1
        if child is not None:
            self._discard(child)

    def _start(self, held: Sequence[_Request] = ()) -> _Child | None:
        """A new child. The clocks of `held` stand still meanwhile; if there can be no child, they fail of that."""
        began = monotonic()
        for request in held:
            request.ends += self._start_s
        try:
            child = self._loaded()
        except RewardRefused as refusal:
            if not self._opened.done():
                self._opened.set_exception(refusal)
            for request in held:
                request.settle(error=str(refusal))
            return None
        finally:
            for request in held:
                request.ends -= self._start_s - (monotonic() - began)
        if not self._opened.done():
            self._opened.set_result(None)
        return child

    def _loaded(self) -> _Child:
        try:
            child = _Child()
        except OSError as error:
            raise RewardRefused(f"got no process ({error})") from error
        with self._changed:
            self._children.add(child)
            if self._closed:
                child.strike()
        try:
            child.load(self.function, self._start_s)
        except BaseException:
            self._discard(child)
            raise
        return child

    def _discard(self, child: _Child) -> None:
        child.kill()
        with self._changed:
            self._children.discard(child)

    def _take(self, batches: bool) -> list[_Request]:
        """What to call next; several only if the function takes a batch. Empty when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._drop_abandoned())
            if self._closed:
                for request in self._waiting:
                    request.settle(error="was called while its pool was closed")
                return []
            self._busy += 1
            taken = [self._waiting.popleft()]
            while batches and len(taken) < MAX_BATCH and self._drop_abandoned() and not taken[0].alone:
                if self._waiting[0].alone:
                    break
                taken.append(self._waiting.popleft())
            return taken

    def _drop_abandoned(self) -> int:
        """How many still wait, after those whose callers gave up are gone from the head of the queue."""
        while self._waiting and self._waiting[0].settled.done():
            self._waiting.popleft()
        return len(self._waiting)

    def _run(self, child: _Child, batch: list[_Request]) -> bool:
        """Calls the function once; False if the child is lost."""
        timeout_s = min(request.timeout_s for request in batch)
        for request in batch:
            request.tries += 1
            request.started = request.started or monotonic()
        message = '{"calls": [' + ", ".join(request.call for request in batch) + "]}"
        try:
            results = child.ask(message, timeout_s).get("results", [])
            if len(results) != len(batch):
                raise _Died("wrote into its own channel")
        except TimeoutError:
            self._again(batch, f"did not return within {timeout_s:g} s", split=len(batch) > 1, timed_out=True)
            return False
        except _Died as death:
            self._again(batch, str(death), split=len(batch) > 1)
            return False
        for request, result in zip(batch, results, strict=True):
            if "error" in result:
                self._again([request], result["error"], split=len(batch) > 1)
            else:
                request.settle(value=result.get("value"), error=result.get("bad"))
        return True

    def _again(self, batch: list[_Request], error: str, *, split: bool, timed_out: bool = False) -> None:
        """Tries again what has a retry left. After a batch each goes alone, free: one must not cost the others."""
        for request in reversed(batch):
            if split:
                request.tries -= 1
                request.alone = True
            with self._changed:
                if self._closed or request.tries > request.retries or monotonic() >= request.ends:
                    request.settle(error=error, timed_out=timed_out)
                else:
                    # What merely shared a batch has waited; what failed itself makes way for the others.
                    (self._waiting.appendleft if split else self._waiting.append)(request)
                    self._changed.notify()


class RewardPool:
    """Functions of the user, each in children of its own. Called from any number of threads."""

    def __init__(self, slow_s: float = 1.0, start_s: float = 60.0) -> None:
        self.slow_s = slow_s
        self.start_s = start_s
        self._crews: dict[str, _Crew] = {}
        self._figures: dict[str, RewardFigures] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    def prepare(self, function: Function) -> None:
        """Loads the function in a first child; others follow when they are needed. Raises `RewardRefused`."""
        crew = self._crew(function)
        try:
            crew.open()
        except RewardRefused:
            with self._lock:
                self._crews.pop(function.key, None)
            crew.close()
            raise

    def start(self, function: Function, call: RewardCall, timeout_s: float, retries: int = 0) -> Callable[[], Outcome]:
        """Queues one call, and returns what waits for its outcome.

        Each try may take `timeout_s`. The whole call, its wait for a free child included, ends after
        `(retries + 1) * timeout_s`, not counting what it takes to load a new child where it lost one. What the function
        raises, a try out of time and a child that died are tried again; a function that returns nonsense is not.
        """
        try:
            request = _Request(json.dumps(vars(call)), timeout_s, retries)
        except (TypeError, ValueError, RecursionError) as error:
            refused = Outcome(error=f"got what is not JSON ({error})")
            return lambda: refused
        self._crew(function).submit(request)
        return request.wait

    def count(self, name: str, outcome: Outcome) -> None:
        """Adds a call to the figures of the reward `name`, wherever it was computed."""
        with self._lock:
            self._figures[name] = self._figures.get(name, RewardFigures()).plus(outcome, self.slow_s)

    def report(self) -> dict[str, RewardFigures]:
        """Figures by reward. A call that took more than `slow_s`, all told, counts as slow."""
        with self._lock:
            return dict(self._figures)

    def close(self) -> None:
        """Ends every child; calls that wait fail. Does nothing in a process that was forked from the pool's own."""
        if os.getpid() != self._process:
            return
        with self._lock:
            crews, self._crews = list(self._crews.values()), {}
        for crew in crews:
            crew.close()

    def _crew(self, function: Function) -> _Crew:
        with self._lock:
            crew = self._crews.get(function.key)
            if crew is None:
                crew = self._crews[function.key] = _Crew(function, self.start_s)
            crew.size = max(crew.size, function.processes)
            return crew


_shared: RewardPool | None = None
_shared_lock = threading.Lock()


def shared() -> RewardPool:
    """The pool of this process; its children end with it."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = RewardPool()
            atexit.register(_shared.close)
        return _shared


def _forget() -> None:
    """In a forked process: neither threads nor locks of the parent's pool work here, and its children are not ours."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
