"""The sandbox against code that means harm: each attempt is contained, costs its own answer only, leaves nothing."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollcast_envs import sandbox_child
from rollcast_envs.sandbox import (
    _POOL,
    CHILD,
    MAX_LINE,
    Call,
    Limits,
    Outcome,
    Sandbox,
    SandboxError,
    _converse,
    _outcome,
    run,
)

QUICK = Limits(0.25)
"""A second by the clock and a second of processor time."""
PATIENT = Limits(30)
NOTHING = Call("([], {})")
REFUSED = "PermissionError"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as started:
        yield started


def one(sandbox: Sandbox, source: str, limits: Limits = PATIENT) -> Outcome:
    """The outcome of `f()`."""
    (outcome,) = sandbox.run([source], "f", [NOTHING], limits)
    return outcome


def body(*lines: str) -> str:
    return "\n    ".join(["import os, sys, time, socket, ctypes, gc\ndef f():", *lines])


def assert_unharmed(sandbox: Sandbox) -> None:
    """The next answer is served as ever, and no process is left of the last."""
    assert sandbox.run(["def f(x): return x + 1"], "f", [Call("([1], {})")], PATIENT) == [Outcome(2)]
    assert psutil.Process(sandbox.pid).children(recursive=True) == []


ATTEMPTS = {
    "reads a file": (body("return open('/etc/passwd').read()"), REFUSED),
    "reads a file by its descriptor": (body("return os.open('/etc/passwd', os.O_RDONLY)"), REFUSED),
    "lists a folder": (body("return os.listdir('/')"), REFUSED),
    "looks at itself": (body("return open('/proc/self/environ').read()"), REFUSED),
    "writes a file": (body("open('f', 'w').write('x')"), REFUSED),
    "fills the disk": (body("with open('/tmp/f', 'wb') as f:", "    while True: f.write(bytes(1 << 20))"), REFUSED),
    "makes a file in memory": (body("return os.memfd_create('f')"), REFUSED),
    "removes a file": (body("os.unlink('/etc/passwd')"), REFUSED),
    "removes a folder": (body("import shutil", "shutil.rmtree('/')"), REFUSED),
    "opens a socket": (body("return socket.socket()"), REFUSED),
    "opens a socket pair": (body("return socket.socketpair()"), REFUSED),
    "asks for an address": (body("return socket.getaddrinfo('localhost', 80)"), "gaierror"),
    "forks": (body("while True: os.fork()"), REFUSED),
    "starts a thread": (body("import threading", "threading.Thread(target=f).start()"), "RuntimeError"),
    "starts a program": (body("os.execv('/bin/sh', ['sh'])"), REFUSED),
    "spawns a program": (body("return os.posix_spawn('/bin/sh', ['sh'], {})"), REFUSED),
    "starts a subprocess": (body("import subprocess", "subprocess.run('true')"), "ModuleNotFoundError"),
    "kills its parent": (body("os.kill(os.getppid(), 9)"), REFUSED),
    "kills all": (body("os.kill(-1, 9)"), REFUSED),
    "raises its limits": (body("import resource", "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"), "any"),
    "mounts": (body("if ctypes.CDLL(None).mount(b'none', b'/', b'tmpfs', 0, 0): raise OSError"), "OSError"),
    "becomes root": (body("os.setuid(0)"), REFUSED),
    "allocates 10 GB": (body("return len(bytearray(10 * 1024**3))"), "MemoryError"),
    "allocates bit by bit": (body("kept = []", "while True: kept.append(bytearray(1 << 20))"), "MemoryError"),
    "recurses": (body("return f()"), "RecursionError"),
    "exits": (body("sys.exit(0)"), "SystemExit"),
    "exits at once": (body("os._exit(0)"), "the process ended"),
    "raises what is no Exception": (body("class Odd(BaseException): pass", "raise Odd"), "Odd"),
    "crashes": (body("ctypes.string_at(0)"), "the process ended by SIGSEGV"),
    "returns 100 MB": (body("return 'x' * (100 << 20)"), "ValueError"),
    "returns a long list": (body("return [0] * 60_000"), "too much output"),
    "writes 100 MB": (body("for _ in range(1600): os.write(0, b'x' * 65536)"), "too much output"),
    "writes lies": (body("while True: os.write(0, b'{}\\n')"), "no result"),
    "returns an object": (body("return object()"), "TypeError"),
    "returns an endless iterator": (body("import itertools", "return itertools.count()"), "TypeError"),
    "returns a list in itself": (body("a = []", "a.append(a)", "return a"), "RecursionError"),
    "is no Python": ("def f(:", "SyntaxError"),
    "has a null": ("def f(): return '\0'", "any"),
    "nests deeply": ("x = " + "(" * 100_000, "SyntaxError"),
    "never defines it": ("def g(): pass", "KeyError"),
    "fails to load": ("1 / 0", "ZeroDivisionError"),
    "wants a library": ("import numpy\ndef f(): pass", "ModuleNotFoundError"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_is_contained(sandbox: Sandbox, attempt: str) -> None:
    source, error = ATTEMPTS[attempt]
    outcome = one(sandbox, source)
    assert outcome.value is None and outcome.error
    assert error in ("any", outcome.error)
    assert_unharmed(sandbox)


STALLS = {
    "loops": body("while True: pass"),
    "loops when loaded": "while True: pass",
    "loops in C": body("return sum(iter(int, 1))"),
    "takes every exception": body("while True:", "    try: time.sleep(1)", "    except BaseException: pass"),
    "sleeps": body("time.sleep(1000)"),
    "ignores signals": body(
        "import signal", "for s in (1, 2, 3, 15, 24): signal.signal(s, signal.SIG_IGN)", "while 1: 1"
    ),
    "waits for input": body("return os.read(0, 1)"),
    "hides behind a name": body(
        "class M(type):", "    def __instancecheck__(*_):", "        while True: pass", "return M"
    ),
}


@pytest.mark.parametrize("attempt", STALLS)
def test_what_does_not_end_is_ended_at_the_deadline(sandbox: Sandbox, attempt: str) -> None:
    started = time.monotonic()
    outcome = one(sandbox, STALLS[attempt], QUICK)
    assert outcome.error in ("time is up", "TypeError") and (outcome.error == "TypeError") == ("name" in attempt)
    assert time.monotonic() - started < 20
    assert_unharmed(sandbox)


def test_processor_time_is_limited_apart_from_the_clock(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop is ended after its second of processor time even if this process waits for two minutes."""
    monkeypatch.setattr(
        "rollcast_envs.sandbox._converse", lambda channel, job, count, _: _converse(channel, job, count, 120)
    )
    started = time.monotonic()
    assert one(sandbox, STALLS["loops"], Limits(1)).error == "time is up"
    assert time.monotonic() - started < 60
    assert_unharmed(sandbox)


def test_deep_recursion_with_the_limit_lifted_is_contained(sandbox: Sandbox) -> None:
    assert one(sandbox, "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()", QUICK).error
    assert one(sandbox, "def f():\n    a = []\n    for _ in range(10**6): a = [a]\n    return a", QUICK).error
    assert_unharmed(sandbox)


def test_c_code_reaches_no_further_than_python(sandbox: Sandbox) -> None:
    """Straight to the C library: each call answers -1, and errno is EPERM."""
    calls = {
        "fork": "()",
        "vfork": "()",
        "getppid": "()",
        "open": "(b'/etc/passwd', 0)",
        "socket": "(2, 1, 0)",
        "kill": "(1, 0)",
        "dup": "(0)",
        "pipe": "(ctypes.create_string_buffer(8))",
        "ptrace": "(0, 0, 0, 0)",
        "prctl": "(4, 1, 0, 0, 0)",
        "unshare": "(0x20000)",
        "chroot": "(b'/')",
        "mkdir": "(b'/tmp/x', 511)",
        "unlink": "(b'/etc/passwd')",
        "close": "(0)",
    }
    lines = [f"found['{name}'] = (libc.{name}{args}, ctypes.get_errno())" for name, args in calls.items()]
    source = body("libc, found = ctypes.CDLL(None, use_errno=True), {}", *lines, "return found")
    assert one(sandbox, source).value == dict.fromkeys(calls, (-1, 1))
    assert_unharmed(sandbox)


def test_calls_by_number_that_no_library_wraps_are_refused_too(sandbox: Sandbox) -> None:
    """clone3, execveat, io_uring_setup, pidfd_open, openat2, process_vm_readv, bpf, and the calls of 32-bit x86-64."""
    numbers = (435, 322, 425, 434, 437, 310, 321, 0x40000000 + 39, 0x40000000 + 2)
    lines = [f"found.append((libc.syscall({number}, 0, 0, 0, 0, 0), ctypes.get_errno()))" for number in numbers]
    source = body("libc, found = ctypes.CDLL(None, use_errno=True), []", *lines, "return found")
    assert one(sandbox, source).value == [(-1, 1)] * len(numbers)


def test_no_memory_becomes_executable(sandbox: Sandbox) -> None:
    lines = (
        "libc = ctypes.CDLL(None, use_errno=True)",
        "libc.mmap.restype = ctypes.c_ssize_t",
        "libc.mmap.argtypes = (ctypes.c_size_t,) * 6",
        "anonymous = 0x22",
        "block = libc.mmap(0, 4096, 3, anonymous, 2**64 - 1, 0)",
        "libc.mprotect.argtypes = (ctypes.c_size_t,) * 3",
        "return [block > 0, libc.mmap(0, 4096, 7, anonymous, 2**64 - 1, 0), libc.mprotect(block, 4096, 5)]",
    )
    assert one(sandbox, body(*lines)).value == [True, -1, -1]


def test_only_its_own_channel_can_be_read_and_written(sandbox: Sandbox) -> None:
    lines = ("found = []", "for d in range(1, 300):", "    try: found.append(os.write(d, b'x'))")
    assert one(sandbox, body(*lines, "    except PermissionError: pass", "return found")) == Outcome([])


def test_shell_commands_do_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "made"
    outcome = one(sandbox, body(f"return __import__('os').system('touch {target}')"))
    assert outcome.value != 0 and not target.exists()
    assert_unharmed(sandbox)


def test_nothing_is_left_in_it_of_the_answer_before(sandbox: Sandbox) -> None:
    """All that Python can reach from frames and from the collector: it knows its own calls and no more."""
    assert one(sandbox, "kept = 'tell-tale'\ndef f(): return kept") == Outcome("tell-tale")
    lines = (
        "frame, texts = sys._getframe(), []",
        "while frame:",
        "    texts.append(repr(frame.f_locals) + repr(frame.f_globals))",
        "    frame = frame.f_back",
        "texts += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple)]",
        "text = ''.join(texts)",
        "return ['([], {})' in text, '-'.join(['tell', 'tale']) in text]",
    )
    assert one(sandbox, body(*lines), Limits(60, 1024)).value == [True, False]


def test_an_evil_equal_or_repr_is_never_asked(sandbox: Sandbox) -> None:
    evil = """
class Evil(int):
    def __eq__(self, other): return True
    def __repr__(self): raise SystemExit
    __hash__ = int.__hash__
class Text(str):
    def __len__(self): return 0
"""
    for result in ("Evil(1)", "[Evil(1)]", "Text('x')", "{Evil(1): 1}", "type('D', (dict,), {})()"):
        assert one(sandbox, f"{evil}\ndef f(): return {result}") == Outcome(error="TypeError")
    assert_unharmed(sandbox)


def test_patched_builtins_hurt_the_answer_alone(sandbox: Sandbox) -> None:
    patches = (
        "builtins.type = lambda x: int",
        "builtins.repr = builtins.len = builtins.hex = None",
        "json.dumps = lambda *_: '{\"value\": 1}'",
        "os.write = os._exit = print",
        "sys.modules.clear()",
        "sys.settrace(lambda *_: 1 / 0)",
    )
    for patch in patches:
        outcome = one(sandbox, f"import builtins, json, os, sys\n{patch}\ndef f(): return 42", QUICK)
        assert outcome in (Outcome(42), Outcome(1)) or outcome.error
        assert_unharmed(sandbox)


def test_what_is_printed_goes_nowhere(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    source = "import sys\ndef f():\n    print('x' * 10**7)\n    print('y', file=sys.stderr)\n    return input"
    assert one(sandbox, source).error == "TypeError"
    assert one(sandbox, "def f(): return input()").error == "EOFError"
    assert capfd.readouterr() == ("", "")


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2**63,
        -(10**400),
        1.5,
        -0.0,
        1e300,
        float("inf"),
        1 + 2j,
        "",
        "é\n\0😀\ud800",
        b"\0\xff",
    ),
    *(
        [],
        [1, [2, [3]]],
        (),
        (1,),
        ((1, 2), [3]),
        {},
        {1: "a", "1": 2, (1, 2): [3]},
        {"b": {"c": {1}}},
        set(),
        {1, "a", (2,)},
    ),
    frozenset({1}),
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_a_value_comes_back_as_it_was(sandbox: Sandbox, value: Any) -> None:
    (outcome,) = sandbox.run([f"def f(): return {value!r}".replace("inf", "1e999")], "f", [NOTHING])
    assert (
        outcome.error == ""
        and type(outcome.value) is type(value)
        and sorted(repr(outcome.value)) == sorted(repr(value))
    )


def test_the_standard_librarys_dicts_come_back_as_dicts(sandbox: Sandbox) -> None:
    source = "from collections import *\ndef f(): return [Counter('aab'), defaultdict(int, a=1), OrderedDict(b=2)]"
    assert one(sandbox, source).value == [{"a": 2, "b": 1}, {"a": 1}, {"b": 2}]


def test_arguments_names_and_what_a_result_goes_through(sandbox: Sandbox) -> None:
    source = "def f(*args, **named):\n    yield from args\n    yield from named.items()"
    calls = [Call("([3, {1}], {'k': (2,)})", "list"), Call("([3, 1, 2], {})", "sorted"), Call("([1], {})")]
    first, second, third = sandbox.run([source], "f", calls)
    assert (first.value, second.value, third.error) == ([3, {1}, ("k", (2,))], [1, 2, 3], "TypeError")


def test_calls_before_a_crash_count_and_those_after_it_do_not(sandbox: Sandbox) -> None:
    source = "import os\ndef f(x):\n    if x == 2: os._exit(3)\n    if x == 1: raise ValueError\n    return x"
    outcomes = sandbox.run([source], "f", [Call(f"([{x}], {{}})") for x in range(5)])
    assert outcomes == [Outcome(0), Outcome(error="ValueError"), *[Outcome(error="the process ended")] * 3]


def test_sources_run_in_one_module_in_order(sandbox: Sandbox) -> None:
    sources = [
        "from math import pi\ndef helper(): return 2",
        "from __future__ import annotations\ndef f(): return helper() * pi",
    ]
    (outcome,) = sandbox.run(sources, "f", [NOTHING])
    assert outcome.value == pytest.approx(6.283185307)


def test_classes_and_modules_of_an_answer_work(sandbox: Sandbox) -> None:
    source = """
from __future__ import annotations
from dataclasses import dataclass
from typing import NamedTuple
@dataclass
class A:
    x: int = 3
class B(NamedTuple):
    y: int
def f(): return [A().x, B(4).y, __name__]
"""
    assert one(sandbox, source).value == [3, 4, "answer"]


@pytest.mark.parametrize("module", sandbox_child.MODULES)
def test_the_modules_are_there(sandbox: Sandbox, module: str) -> None:
    assert one(sandbox, f"import {module}\ndef f(): return True") == Outcome(True)


def test_equal_answers_get_equal_results(sandbox: Sandbox) -> None:
    """The order of a set of strings, and chance, are the same in each child and in each warm process."""
    source = "import random\ndef f(): return [list({'a', 'b', 'c', 'd'}), hash('x')]"
    with Sandbox() as other:
        assert one(sandbox, source) == one(sandbox, source) == one(other, source)


def test_it_is_neither_root_nor_in_the_systems_folders() -> None:
    with Sandbox() as sandbox:
        assert one(sandbox, "def f(): return 1") == Outcome(1)
        process = psutil.Process(sandbox.pid)
        assert os.geteuid() != 0 or process.uids().real == sandbox_child.NOBODY
        assert "deleted" in os.readlink(f"/proc/{sandbox.pid}/cwd")
        if os.geteuid() == 0:
            assert "deleted" in os.readlink(f"/proc/{sandbox.pid}/root")
            assert os.readlink(f"/proc/{sandbox.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    assert not psutil.pid_exists(process.pid)


def test_a_process_that_cannot_be_sealed_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses a filter that is no program; the same happens where there is no seccomp."""
    monkeypatch.setattr("rollcast_envs.sandbox.filter_program", lambda: bytes(8))
    with Sandbox() as sandbox, pytest.raises(SandboxError, match="seccomp or not at all"):
        one(sandbox, "def f(): return 1")


def test_a_filter_that_lets_everything_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all = (0x06).to_bytes(2, "little") + bytes(2) + (0x7FFF0000).to_bytes(4, "little")
    monkeypatch.setattr("rollcast_envs.sandbox.filter_program", lambda: allow_all)
    with Sandbox() as sandbox, pytest.raises(SandboxError, match="seal"):
        one(sandbox, "def f(): return 1")


LINES: tuple[Any, ...] = (
    *(
        b"",
        b"null",
        b"1",
        b"[]",
        b'"value"',
        b"{}",
        b"{",
        b"\xff",
        b'{"error": []}',
        b'{"value": {}}',
        b'{"value": {"a": 1}}',
    ),
    *(b'{"value": {"int": 5}}', b'{"value": {"int": "0x' + b"f" * 5000 + b'"}}', b'{"value": ' + b"9" * 5000 + b"}"),
    *(
        b'{"value": {"set": [[1]]}}',
        b'{"value": {"dict": [[[], 1]]}}',
        b'{"value": {"dict": [1]}}',
        b'{"value": {"tuple": 3}}',
    ),
    *(
        b'{"value": {"complex": [1' + b"0" * 400 + b", 0]}}",
        b'{"value": {"complex": "x"}}',
        b'{"value": {"bytes": "zz"}}',
    ),
    *(b'{"value": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"value": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    b'{"value": "' + b"x" * MAX_LINE + b'"}',
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:30].decode(errors="replace"))
def test_whatever_a_child_writes_is_read_without_harm(line: bytes) -> None:
    outcome = _outcome(line)
    assert outcome.value is None and outcome.error


def test_many_threads_share_a_few_warm_processes() -> None:
    found: list[list[Outcome]] = []

    def work(number: int) -> None:
        found.append(run([f"def f(): return {number}"], "f", [NOTHING]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.value for (outcome,) in found) == list(range(24))


def test_a_warm_process_that_was_killed_is_replaced() -> None:
    before = run(["def f(): return 1"], "f", [NOTHING])
    victims = {sandbox.pid for sandbox in _POOL.idle}
    for pid in victims:
        psutil.Process(pid).kill()
    assert run(["def f(): return 1"], "f", [NOTHING]) == before == [Outcome(1)]
    assert {sandbox.pid for sandbox in _POOL.idle} - victims


def test_a_fork_of_this_process_has_warm_processes_of_its_own() -> None:
    assert run(["def f(): return 1"], "f", [NOTHING]) == [Outcome(1)]
    child = os.fork()
    if child == 0:
        right = not _POOL.idle and run(["def f(): return 2"], "f", [NOTHING]) == [Outcome(2)]
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(["def f(): return 3"], "f", [NOTHING]) == [Outcome(3)]


ORPHANS = """
import sys, threading, time
from rollcast_envs.sandbox import Call, Limits, Sandbox
sandbox = Sandbox()
answer = (["import time\\ndef f(): time.sleep(1000)"], "f", [Call("([], {})")], Limits(1000))
threading.Thread(target=sandbox.run, args=answer, daemon=True).start()
print(sandbox.pid, flush=True)
time.sleep(1000)
"""


def test_when_the_parent_is_killed_nothing_is_left() -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHILD.parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        warm = psutil.Process(int(parent.stdout.readline()))
        assert until(lambda: bool(warm.children()))
        answers = warm.children()
        parent.kill()
    gone, alive = psutil.wait_procs([warm, *answers], timeout=20)
    assert not alive and len(gone) == 2


def until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": -1}, {"memory_mb": 10}, {"seconds": float("nan")}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]


def test_more_memory_can_be_given(sandbox: Sandbox) -> None:
    source = "def f(): return len(bytearray(160 << 20))"
    assert one(sandbox, source, Limits(30, 128)).error == "MemoryError"
    assert one(sandbox, source, Limits(30, 256)).value == 160 << 20
