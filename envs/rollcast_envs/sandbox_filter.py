"""The seccomp filter of the sandbox: which system calls a sealed process may make, as a BPF program.

Owns: the list of calls and its assembly for x86-64 and 64-bit ARM. Does not install anything: the sandbox's child does.

It is an allow-list, so a call that nobody thought of is refused, to root too. What is on it can use memory that the
process may have anyway, tell the time, end the process itself, and read and write the one descriptor that is left.
Nothing on it names a file, another process or the network, and no memory can be made executable.
"""

import platform
import struct
import sys
from collections.abc import Iterator

CHANNEL = 0
"""The one descriptor that a sealed process keeps."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""`AUDIT_ARCH_*` of `linux/audit.h`: the same number is another call on another processor."""

CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
"""Every call that is allowed, with its number on each of `ARCHITECTURES`."""
ON_CHANNEL = ("read", "write")
"""Allowed with `CHANNEL` as first argument."""
WITHOUT_EXEC = ("mmap", "mprotect")
"""Allowed unless the third argument asks for executable memory."""
PROT_EXEC = 4

LOAD, IF_EQUAL, IF_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
KILL_PROCESS, REFUSE, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # REFUSE answers errno 1, EPERM.
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, THIRD_ARGUMENT = 0, 4, 16, 32  # Offsets in `struct seccomp_data`.

Instruction = tuple[int, int, int, int]
"""What to do, how many instructions to skip if it holds, and if not, and the operand: a `struct sock_filter`."""


class SandboxError(RuntimeError):
    """There is no sandbox to be had on this machine, or it broke. Never raised for what the code inside does."""


def filter_program() -> bytes:
    """The filter for this machine: an array of `struct sock_filter`. Raises `SandboxError` where there is none."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        raise SandboxError(
            f"no sandbox on {sys.platform} {machine}: code that a model wrote is run under seccomp or not at all, and "
            f"the filter is for Linux on {' and '.join(ARCHITECTURES)}. Do this: play this environment on such a "
            "machine or in a Linux container, or choose another environment"
        )
    return assemble(machine)


def assemble(machine: str) -> bytes:
    """The filter for one of `ARCHITECTURES`."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in _instructions(machine))


def _instructions(machine: str) -> Iterator[Instruction]:
    column = list(ARCHITECTURES).index(machine)
    yield LOAD, 0, 0, ARCHITECTURE
    yield IF_EQUAL, 1, 0, ARCHITECTURES[machine]
    yield RETURN, 0, 0, KILL_PROCESS
    yield LOAD, 0, 0, NUMBER
    for name, numbers in CALLS.items():
        allow = list(_allow(name))
        yield IF_EQUAL, 0, len(allow), numbers[column]
        yield from allow
    yield RETURN, 0, 0, REFUSE


def _allow(name: str) -> Iterator[Instruction]:
    """What follows once the call is known to be `name`."""
    if name in ON_CHANNEL:
        yield LOAD, 0, 0, FIRST_ARGUMENT  # Its low half: the kernel takes a descriptor as an unsigned int.
        yield IF_EQUAL, 1, 0, CHANNEL
        yield RETURN, 0, 0, REFUSE
    if name in WITHOUT_EXEC:
        yield LOAD, 0, 0, THIRD_ARGUMENT
        yield IF_BITS, 0, 1, PROT_EXEC
        yield RETURN, 0, 0, REFUSE
    yield RETURN, 0, 0, ALLOW
