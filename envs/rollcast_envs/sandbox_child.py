"""What runs inside the sandbox: a warm process that forks one child for each answer; the child seals itself, then runs.

Started by `rollcast_envs.sandbox` by its path, with a clean environment and the standard library only. Owns: the order
of sealing, the modules that an answer finds imported, and how a result is written. Does not know what a right result
is: no expected value ever comes here. The warm process never sees an answer; each child reads its own from a socket of
its own, after it has been sealed.

    python -P -s -S sandbox_child.py FILTER      (in hexadecimal; standard input is the control socket)
"""

import ast
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

CHANNEL = 0
SEALED = b"sealed\n"
MAX_RESULT = 64 * 1024
"""Bytes of one encoded result."""
NOBODY = 65534

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_NEWUSER = 0x10000000
NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000  # Mounts, host name, IPC, network.

MODULES = (
    *(
        "__future__",
        "abc",
        "argparse",
        "array",
        "ast",
        "base64",
        "binascii",
        "bisect",
        "calendar",
        "cmath",
        "collections",
    ),
    *("collections.abc", "colorsys", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib"),
    *("enum", "fnmatch", "fractions", "functools", "graphlib", "hashlib", "heapq", "html", "inspect", "io"),
    *("ipaddress", "itertools", "json", "keyword", "logging", "math", "numbers", "operator", "os", "pprint"),
    *("queue", "random", "re", "reprlib", "secrets", "shlex", "statistics", "string", "struct", "sys", "textwrap"),
    *("threading", "time", "timeit", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid", "warnings"),
    *("weakref", "zlib", "encodings.ascii", "encodings.cp1252", "encodings.hex_codec", "encodings.idna"),
    *("encodings.latin_1", "encodings.rot_13", "encodings.unicode_escape", "encodings.utf_16", "encodings.utf_32"),
)
"""What an answer can import; nothing else can be loaded any more when it runs."""

THROUGH: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "sorted": sorted, "dict": dict}
"""What a result may be passed through before it is written, such as an iterator through `list`."""

SIZED = (str, bytes, list, tuple, set, frozenset, dict, defaultdict, OrderedDict, Counter)


class Nowhere(io.TextIOBase):
    """Takes what an answer prints."""

    def write(self, text: str) -> int:
        return len(text)


def main() -> None:
    program = bytes.fromhex(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    libc = ctypes.CDLL(None, use_errno=True)
    warm()
    leave_the_system(libc)
    warm_process = os.getpid()
    while request := receive(control):
        limits, channel = request
        child = os.fork()
        if child == 0:
            control.close()
            seal(libc, warm_process, program, channel, limits)
            answer()
            os._exit(0)
        os.close(channel)
        control.recv(16)  # "end", or nothing when the parent is gone: the child ends in both cases.
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        control.send(str(status).encode())


def receive(control: socket.socket) -> tuple[dict[str, int], int] | None:
    """The limits of the next answer and its socket; None when the parent is gone."""
    message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
    return (json.loads(message), descriptors[0]) if message else None


def warm() -> None:
    """Imports what answers may use, and lets go of what could load more."""
    for module in MODULES:
        importlib.import_module(module)
    "".encode("idna")
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.argv[:] = [""]
    gc.collect()
    gc.freeze()


def leave_the_system(libc: ctypes.CDLL) -> None:
    """Second walls, each where the system permits it; the filter holds without them.

    No network, an empty root folder that has been deleted, so that nothing can be created in it, and no root.
    """
    if libc.unshare(NAMESPACES) != 0:
        libc.unshare(NAMESPACES | CLONE_NEWUSER)
    walls: tuple[Callable[[], None], ...] = (
        enter_a_deleted_folder,
        lambda: os.chroot("."),
        lambda: os.setgroups([]),
        lambda: os.setresgid(NOBODY, NOBODY, NOBODY),
        lambda: os.setresuid(NOBODY, NOBODY, NOBODY),
    )
    for wall in walls:
        try:
            wall()
        except OSError:  # Not root here, or nowhere to write.
            continue
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def enter_a_deleted_folder() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def seal(libc: ctypes.CDLL, parent: int, program: bytes, channel: int, limits: dict[str, int]) -> None:
    """Gives up, for good, all that the answer must not have; ends the process if that fails, or if `parent` is gone."""
    demand(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0 and os.getppid() == parent)
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, 256)  # The warm process was started with three and has opened two.
    for limit, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        allowed = resource.getrlimit(limit)[1]
        lower = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(limit, (lower, lower))
    instructions = ctypes.create_string_buffer(program, len(program))
    array = Program(len(program) // 8, ctypes.addressof(instructions))
    demand(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
    demand(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(array), 0, 0) == 0)
    demand(libc.getppid() == -1 and libc.dup(CHANNEL) == -1)  # Both would work without the filter.
    send(SEALED)


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def demand(done: bool) -> None:
    if not done:
        os._exit(1)


def answer() -> None:
    """Runs the answer's sources in one module, then each call, and writes one line for each."""
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = Nowhere()
    job = json.loads(receive_line())
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    try:
        for source in job["sources"]:
            exec(compile(source, "<answer>", "exec", dont_inherit=True), module.__dict__)
        function = module.__dict__[job["entry_point"]]
    except BaseException as error:  # Whatever it raises, SystemExit too, is an answer that failed.
        return send(line({"error": name_of(error)}) * len(job["calls"]))
    for call in job["calls"]:
        send(result_of(function, call))


def result_of(function: Any, call: dict[str, str]) -> bytes:
    """One call's line."""
    try:
        positional, named = ast.literal_eval(call["arguments"])
        value = function(*positional, **named)
        if call["through"]:
            value = THROUGH[call["through"]](value)
        written = line({"value": encoded(value)})
        return written if len(written) <= MAX_RESULT else line({"error": "too much output"})
    except BaseException as error:
        return line({"error": name_of(error)})


def encoded(value: Any) -> Any:
    """`value` as JSON. Exactly the built-in types: a subclass may lie about itself, so it is refused.

    A str, bool, float, None, list or small int stands for itself; else {type: content}.
    """
    kind = type(value)
    if kind in SIZED and len(value) > MAX_RESULT:
        raise ValueError("too much output")
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -(2**63) < value < 2**63 else {"int": hex(value)}
    if kind is list:
        return [encoded(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encoded(item) for item in value]}
    if kind in (dict, defaultdict, OrderedDict, Counter):
        return {"dict": [[encoded(key), encoded(item)] for key, item in dict.items(value)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    raise TypeError("no literal")


def name_of(error: BaseException) -> str:
    """The name of its class, as far as that is an honest one."""
    name = type.__dict__["__name__"].__get__(type(error))
    return str(name)[:100]


def line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def receive_line() -> bytes:
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"\n")):
        parts.append(os.read(CHANNEL, 1 << 16))
        demand(bool(parts[-1]))
    return b"".join(parts)


def send(text: bytes) -> None:
    while text:
        text = text[os.write(CHANNEL, text) :]


if __name__ == "__main__":
    main()
