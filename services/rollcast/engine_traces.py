"""What an engine leaves behind when it is killed: processes, shared memory, a folder of sockets.

Owns: noting these down while an engine lives, and removing them for a predecessor that was killed. Does not know vLLM:
whoever sweeps need not load it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

SEGMENT = r"/dev/shm/(?:psm_|vllm_dist_|sem\.mp-)[^/\s]+$"
"""Message queues, a worker's semaphore, and with tensor parallelism on the CPU the buffers of its collectives."""
SOCKETS_PREFIX = "rollcast-engine-"


@dataclass(frozen=True)
class Traces:
    """What an engine leaves behind when nobody ends it: processes, shared memory, a folder of sockets."""

    processes: tuple[psutil.Process, ...]
    segments: tuple[str, ...]
    sockets: str

    @classmethod
    def of(cls, cores: Iterable[BaseProcess], sockets: str) -> "Traces":
        found = []
        for core in cores:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(core.pid)
                found += [process, *process.children(recursive=True)]
        return cls(tuple(found), tuple(engine_segments(found)), sockets)

    def save(self, record: Path) -> None:
        rows = [[process.pid, process.create_time()] for process in self.processes]
        draft = record.with_suffix(".writing")
        draft.write_text(json.dumps({"processes": rows, "segments": self.segments, "sockets": self.sockets}))
        draft.replace(record)

    def remove(self) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=10)
        for segment in self.segments:
            Path(segment).unlink(missing_ok=True)
        shutil.rmtree(self.sockets, ignore_errors=True)


def engine_segments(processes: Iterable[psutil.Process]) -> list[str]:
    """The segments of shared memory that these processes map: vLLM draws their names at random."""
    found = set()
    for process in processes:
        with suppress(OSError):
            found |= set(re.findall(SEGMENT, Path(f"/proc/{process.pid}/maps").read_text(), re.MULTILINE))
    return sorted(found)


def sweep(record: Path) -> list[str]:
    """Ends what is left of the engine recorded in this file, and removes and returns its shared memory.

    For the successor of an owner that was killed. A process is known by its id and its time of creation, so
    that a stranger with a recycled id is left alone.
    """
    if not record.exists():
        return []
    content = json.loads(record.read_text())
    segments = tuple(name for name in content["segments"] if re.fullmatch(SEGMENT, name))
    sockets = content["sockets"] if Path(content["sockets"]).name.startswith(SOCKETS_PREFIX) else ""
    Traces(tuple(_same_processes(content["processes"])), segments, sockets).remove()
    record.unlink()
    return list(segments)


def _same_processes(rows: Iterable[tuple[int, float]]) -> Iterator[psutil.Process]:
    for pid, created in rows:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                yield process


def engine_record(worker: str) -> str:
    """The name of this process's record of its engine; the process id in it tells whether the owner still lives."""
    return f"engine-{worker}-{os.getpid()}.json"


def sweep_dead(folder: Path) -> None:
    """Sweeps after the engines of all processes that have died, as their records in `folder` tell."""
    for record in folder.glob("engine-*.json"):
        if not psutil.pid_exists(int(record.stem.rsplit("-", 1)[1])):
            sweep(record)
