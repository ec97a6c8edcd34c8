"""The policies that must not go: the best one, and those a rollback can go back to, in `runs/NAME/live/`.

Owns: that folder, its lock, and acting upon the run's gate. Does not know engines or HTTP; what is chosen when is
`versions.py`'s.

Replicas share the folder: whoever sees a change first makes it, under a lock, and the others follow. The trainer
writes over `weights/best` and removes old `weights/vN`, so that what is served lies here, linked or copied.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rollcast import best
from rollcast.export import read_published
from rollcast.live.versions import NoSuchPolicy, Releases
from rollcast.rundir import RunDir, write_atomic
from rollcast.runs import read_json
from rollcast.weights import save_policy
from rollcast_learners.types import Weights


class Shelf:
    """The kept policies of one run, and what was chosen among them."""

    def __init__(self, run: RunDir, canary: float = 0.0) -> None:
        self.run = run
        self.folder = run.path / "live"
        self.canary = canary
        """The share where nobody has set another."""

    def read(self) -> Releases:
        """What was chosen so far."""
        said = read_json(self.folder / "releases.json")
        if not said:
            return Releases(canary=self.canary)
        return Releases(**{**said, "previous": tuple(said["previous"])})

    def look(self) -> Releases:
        """The same, after acting upon what the run's evaluation says."""
        releases = self.read()
        chosen = best.read(self.run)
        if chosen is None or int(chosen["policy_version"]) <= releases.gate:
            return releases
        version = int(chosen["policy_version"])
        try:
            return self.change(lambda now: now.passed_gate(version), lambda: self._link(self.run.best, version))
        except OSError:  # The trainer replaces it in this very moment: the next look finds the new one.
            return releases

    def promote(self, weights: Weights, folder: str) -> Releases:
        """Makes a policy the best one, whose files lie in `folder`."""
        return self.change(lambda now: now.promote(weights.version), lambda: self._keep(weights, folder))

    def change(self, choose: Callable[[Releases], Releases], bring: Callable[[], None] = lambda: None) -> Releases:
        """Brings what is to be chosen, and chooses, under the lock. Raises `NoSuchPolicy` for what is not kept."""
        with self._locked():
            bring()
            releases = choose(self.read())
            missing = [version for version in releases.kept if not self._path(version).is_dir()]
            if releases.best in missing:
                raise NoSuchPolicy(f"version {releases.best} is not kept any more")
            write_atomic(self.folder / "releases.json", json.dumps(asdict(releases)) + "\n")
            for old in self.folder.glob("v*"):
                if old.name not in {f"v{version}" for version in releases.kept}:
                    shutil.rmtree(old, ignore_errors=True)
        return releases

    def published(self, version: int) -> Weights:
        """A kept policy."""
        return read_published(self._path(version))

    def _path(self, version: int) -> Path:
        return self.folder / f"v{version}"

    def _keep(self, weights: Weights, folder: str) -> None:
        if not self._path(weights.version).is_dir():
            save_policy(weights, Path(folder), self._path(weights.version))

    def _link(self, source: Path, version: int) -> None:
        if self._path(version).is_dir():
            return
        partial = self.folder / f".v{version}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        if read_json(partial / "manifest.json").get("version") != version:
            raise OSError(f"{source} holds another version by now")
        partial.rename(self._path(version))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # Another file system, or one without links.
        shutil.copyfile(source, target)
