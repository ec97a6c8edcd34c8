"""The sandbox's filter by itself: which calls it allows on each processor, and that it holds without other walls."""

import json
import os
import struct
import subprocess
import sys

import pytest

from rollcast_envs import sandbox_filter
from rollcast_envs.sandbox import CHILD, SandboxError
from rollcast_envs.sandbox_filter import ARCHITECTURES, CALLS, assemble, filter_program


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64"), ("win32", "AMD64")])
def test_other_machines_are_refused_in_words(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sandbox_filter.sys, "platform", system)
    monkeypatch.setattr(sandbox_filter.platform, "machine", lambda: machine)
    with pytest.raises(SandboxError, match=f"no sandbox on {system} {machine}.*Do this"):
        filter_program()


def decide(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """What a filter answers to a call: the four instructions that it is made of, interpreted."""
    data = struct.pack("=IIQ6Q", number, ARCHITECTURES[machine], 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    place, held = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, place * 8)
        if code == sandbox_filter.RETURN:
            return int(operand)
        if code == sandbox_filter.LOAD:
            (held,) = struct.unpack_from("=I", data, operand)
            place += 1
        else:
            holds = held == operand if code == sandbox_filter.IF_EQUAL else bool(held & operand)
            place += 1 + (if_true if holds else if_false)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_allows_its_calls_and_no_other_number(machine: str) -> None:
    program, column = assemble(machine), list(ARCHITECTURES).index(machine)
    allowed = {n for n in range(1024) if decide(program, machine, n) == sandbox_filter.ALLOW}
    assert allowed == {numbers[column] for numbers in CALLS.values()}
    read, mmap = CALLS["read"][column], CALLS["mmap"][column]
    assert decide(program, machine, read, 1) == decide(program, machine, read, 2**32 - 1) == sandbox_filter.REFUSE
    assert decide(program, machine, mmap, 0, 4096, 7) == sandbox_filter.REFUSE
    other = next(name for name in ARCHITECTURES if name != machine)
    assert decide(program, other, read) == sandbox_filter.KILL_PROCESS


ALONE = """
import ctypes, json, os, socket, sys
sys.path.insert(0, sys.argv[1])
import sandbox_child
ours, theirs = socket.socketpair()
child = os.fork()
if child == 0:
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    uid = os.getuid()
    sandbox_child.seal(libc, parent, bytes.fromhex(sys.argv[2]), theirs.fileno(), {"memory": 1 << 28, "cpu_s": 9})
    found = {"uid": uid}
    for name, attempt in {
        "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "fork": os.fork,
        "kill": lambda: os.kill(parent, 9),
        "mkdir": lambda: os.mkdir("/tmp/never"),
        "socket": socket.socket,
    }.items():
        try:
            found[name] = str(attempt())
        except PermissionError:
            found[name] = "refused"
    sandbox_child.send(json.dumps(found).encode())
    os._exit(0)
theirs.close()
os.waitpid(child, 0)
print(ours.recv(4096).decode())
"""


def test_the_filter_alone_holds_for_whoever_runs_it_root_too() -> None:
    """Without the second walls: the child is sealed as the user of these tests, which is root in a container."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(CHILD.parent), filter_program().hex()],
        capture_output=True,
        text=True,
        check=True,
    )
    sealed, found = done.stdout.splitlines()
    refused = dict.fromkeys(("open", "fork", "kill", "mkdir", "socket"), "refused")
    assert sealed == "sealed" and json.loads(found) == {"uid": os.getuid(), **refused}
