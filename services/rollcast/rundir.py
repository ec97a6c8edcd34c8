"""The run directory: where everything a run leaves behind lies, and who may write there.

Owns: file names below `runs/NAME/`, the owner's record and the version high-water mark. Does not know what
the files mean to a learner.
"""

import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rollcast.errors import UsageError


def write_atomic(path: Path, text: str) -> None:
    """The file is either the old or the new one, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes what was written to a file, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunDir:
    """`runs/NAME/` and the names below it."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    def published(self, version: int) -> Path:
        """Where the policy of that version lies published, or will."""
        return self.weights / f"v{version}"

    def forget_published_but(self, version: int) -> None:
        """Removes what was published before `version`."""
        for old in self.weights.glob("v*"):
            if old != self.published(version):
                shutil.rmtree(old)

    @property
    def best(self) -> Path:
        return self.weights / "best"

    @property
    def signatures(self) -> Path:
        return self.path / "signatures.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def base(self) -> Path:
        """The policy that a run from another run began with."""
        return self.path / "base"

    @property
    def verdict(self) -> Path:
        """What the gate said of a round of continual learning."""
        return self.path / "verdict.json"

    @property
    def feedback(self) -> Path:
        return self.path / "feedback.sqlite"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def create(self) -> None:
        """Makes the folders, readable by their owner only. Raises `UsageError` where that cannot be done."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.rollouts, self.evaluations, self.checkpoints, self.weights, self.logs):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The run directory {self.path} cannot be written.",
                f"{type(error).__name__}: {error}",
                "Choose another with --run.dir, or free that path.",
            ) from error

    def refuse_owned(self) -> None:
        """Raises `UsageError` while another living process of this host owns the run."""
        owner = self.owner()
        if owner and is_alive(owner):
            raise UsageError(
                f"The run {self.path.name} is being trained already.",
                f"Process {owner['pid']} on this host owns {self.path}.",
                "Stop that process, or choose another name with --run.",
            )

    def claim(self, address: str, namespace: str) -> None:
        """Writes `run.json`. Raises `UsageError` while another living process of this host owns the run."""
        self.refuse_owned()
        process = psutil.Process()
        record: dict[str, Any] = {
            "name": self.path.name,
            "address": address,
            "namespace": namespace,
            "auth": os.environ.get("RAY_AUTH_MODE", "disabled").lower(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "host": socket.gethostname(),
            "started": time.time(),
        }
        origin = self.base / "origin.json"
        if origin.is_file():
            record["from"] = json.loads(origin.read_text(encoding="utf-8"))
        write_atomic(self.run_json, json.dumps(record, indent=2) + "\n")

    def owner(self) -> dict[str, Any] | None:
        """The record of the process that trains, or last trained, this run."""
        if not self.run_json.exists():
            return None
        record: dict[str, Any] = json.loads(self.run_json.read_text(encoding="utf-8"))
        return record

    def high_water_mark(self) -> int:
        """The highest version ever announced by this run; -1 before the first."""
        path = self.weights / "high_water.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["version"]) if path.exists() else -1

    def raise_high_water_mark(self, version: int) -> None:
        """On the disk before the version is announced, so that no number ever means two policies."""
        highest = self.high_water_mark()
        if version <= highest:
            raise ValueError(f"version {version} is not above {highest}, the highest so far: versions only grow")
        write_atomic(self.weights / "high_water.json", json.dumps({"version": version}) + "\n")


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the recorded process of this host still runs; its pid alone may be another process's since."""
    if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(owner["pid"])
        same = bool(abs(process.create_time() - owner["process_started"]) < 1.0)
        # A container without an init keeps the dead for ever.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
