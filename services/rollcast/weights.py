"""The weight store: published policies in node-local shared memory, pulled by version.

Owns: the folder on each node, who reads which version, the copy to another node, and what is removed when. Does not
know how a policy is learned, validated in detail (`segments.py`) or loaded into an engine.

Each node has one agent, an actor that lives with the trainer. The learner writes a version once into the agent's folder
on its node; readers there map those very files. On another node the agent fetches the bytes once through Ray's object
store and writes them down; readers there map the copy. A version that has been superseded and that nobody reads is
given back: at home its pages carry a later version, elsewhere its files go. The files of a learner that died go as soon
as nobody reads them.

Nodes come and go. A new node gets an agent; the agent of a lost node is forgotten, and with it its copies, since the
bytes are at home. Home itself is the learner's node: without it the learner counts as lost (`LearnerLost`).
"""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollcast.engine_traces import sweep_dead
from rollcast.intake import WeightsMissing, WeightsRefused
from rollcast_learners.errors import LearnerLost
from rollcast_learners.segments import (
    InvalidWeights,
    TensorSpec,
    private_files,
    segment_name,
    segments_of,
    validate,
    versions_in,
)
from rollcast_learners.types import Weights

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rollcast-"
OWNER = "owner.json"
TRANSFER_S = 300.0
"""The longest that a segment (at most 1 GiB) may be on its way to another node."""
ANSWER_S = 60.0
START_S = 300.0
"""An agent imports what it needs first."""
SAVE_S = 3600.0


def abandoned(root: Path = SHARED_MEMORY) -> list[Path]:
    """The folders of agents that were killed. An owner is its pid and its start time."""
    return [owner.parent for owner in root.glob(f"{PREFIX}*/{OWNER}") if not _owner_lives(owner)]


def sweep_abandoned(root: Path = SHARED_MEMORY) -> list[Path]:
    """Removes the folders of agents that were killed, and returns them."""
    folders = abandoned(root)
    for folder in folders:
        sweep_dead(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return folders


@contextmanager
def owned_folder(label: str) -> Iterator[Path]:
    """A folder in shared memory for the record of an engine that belongs to no store. Should this process be killed,
    the next run or `rollcast doctor --fix` sweeps up after it."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{label}-{os.getpid()}-", dir=SHARED_MEMORY) as folder:
        _own(Path(folder))
        yield Path(folder)


def _own(folder: Path) -> None:
    """Says that the folder goes with this process."""
    owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")


def _owner_lives(owner: Path) -> bool:
    try:
        record = json.loads(owner.read_text(encoding="utf-8"))
        return bool(abs(psutil.Process(record["pid"]).create_time() - record["started"]) < 1.0)
    except (psutil.NoSuchProcess, OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class Missing:
    """Why a version is not to be had on a node. Agent -> worker."""

    why: str
    passing: bool
    """Whether it may be had on another try."""


class NodeAgent:
    """Keeper of one node's folder. Plain class; `Store` makes one an actor on each node."""

    def __init__(
        self, run: str, node: str, first_version: int, root: str = str(SHARED_MEMORY), transfer_s: float = TRANSFER_S
    ) -> None:
        sweep_abandoned(Path(root))
        self.node = node
        self._transfer_s = transfer_s
        self.folder = Path(root) / f"{PREFIX}{run}-{node[:8]}-{os.getpid()}"
        self.folder.mkdir(mode=0o700)
        _own(self.folder)
        self._readers: dict[int, set[str]] = {}
        self._until: dict[str, float] = {}
        self._copies: dict[int, tuple[str, ...]] = {}
        self._orphans: set[int] = set()
        self._fetching = asyncio.Lock()
        self._oldest = first_version

    async def folder_path(self) -> str:
        return str(self.folder)

    async def acquire(self, weights: Weights, reader: str, home: Any, within_s: float | None = None) -> str | Missing:
        """Counts `reader` in and returns the folder of the version's files on this node.

        A reader whose death nobody would tell says how long it reads at most: it is forgotten after `within_s`.
        """
        if weights.version < self._oldest:
            return Missing("it is superseded and gone; a newer one was announced", passing=False)
        if within_s is not None:
            self._until[reader] = time.monotonic() + within_s
        self._readers.setdefault(weights.version, set()).add(reader)
        if weights.home == self.node:
            return weights.folder
        try:
            async with self._fetching:
                if weights.version not in self._copies:
                    await self._fetch(weights, home)
        except (RayActorError, ObjectLostError, TimeoutError) as error:
            await self.release(weights.version, reader)
            return Missing(self._told(error, weights), passing=True)
        return str(self.folder)

    def _told(self, error: Exception, weights: Weights) -> str:
        late = f"did not send it within {self._transfer_s:g} s"
        what = late if isinstance(error, TimeoutError) else "is gone"
        return f"node {weights.home[:8]}, where the learner wrote it, {what} (asked by node {self.node[:8]})"

    async def release(self, version: int, reader: str) -> None:
        self._readers.get(version, set()).discard(reader)
        self._remove_orphans()

    async def forget(self, reader: str) -> None:
        """A reader died: it reads nothing any more."""
        self._until.pop(reader, None)
        for readers in self._readers.values():
            readers.discard(reader)
        self._remove_orphans()

    async def begin_again(self, first_version: int) -> None:
        """The learner that wrote all earlier versions is gone: nobody can acquire them from now on; their files go."""
        async with self._fetching:  # A copy on its way is written first, and goes with the others.
            # Also what was given back to a learner that died before it wrote anything over it.
            self._orphans |= {version for version in versions_in(self.folder) if version < first_version}
            self._oldest = first_version
            self._copies.clear()
            for path in private_files(self.folder):
                path.unlink()
            self._remove_orphans()

    async def free(self, below: int) -> list[int]:
        """Versions below `below` that nobody reads. They cannot be acquired from now on; copies are removed."""
        for reader in [name for name, until in self._until.items() if until < time.monotonic()]:
            await self.forget(reader)
        unread = [v for v in range(self._oldest, below) if not self._readers.get(v)]
        # Versions are given back in order, so that one number says what is gone.
        freed = [v for position, v in enumerate(unread) if v == self._oldest + position]
        self._oldest += len(freed)
        for version in freed:
            self._readers.pop(version, None)
            for name in self._copies.pop(version, ()):
                (self.folder / name).unlink(missing_ok=True)
        return freed

    async def read(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one segment, for an agent on another node."""
        return np.memmap(self.folder / name, np.uint8, mode="r")

    async def save(self, weights: Weights, target: str) -> None:
        """Copies a version's files into the run folder, with its manifest: a model folder's safetensors."""
        await asyncio.to_thread(save_policy, weights, self.folder, Path(target))

    async def close(self) -> None:
        sweep_dead(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_orphans(self) -> None:
        for version in [v for v in self._orphans if not self._readers.get(v)]:
            self._orphans.remove(version)
            self._readers.pop(version, None)
            for path in segments_of(self.folder, version):
                path.unlink()

    async def _fetch(self, weights: Weights, home: Any) -> None:
        for name in weights.segments:
            content = await asyncio.wait_for(home.read.remote(name), self._transfer_s)
            partial = self.folder / f".{name}.partial"
            content.tofile(partial)
            partial.replace(self.folder / name)
        self._copies[weights.version] = weights.segments


def save_policy(weights: Weights, folder: Path, target: Path, version: int | None = None) -> None:
    """Copies a version's files to the folder `target`, with its manifest: whole, or not at all. `version` gives it
    another number there."""
    version = weights.version if version is None else version
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for place, name in enumerate(weights.segments):
        shutil.copyfile(folder / name, partial / segment_name(version, place))
    manifest = {
        "version": version,
        "kind": weights.kind,
        "tensors": [asdict(e) for e in weights.manifest],
    }
    (partial / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


@dataclass(frozen=True)
class StoreHandle:
    """How a worker reaches the store: the agents by node. Trainer -> worker."""

    agents: dict[str, Any]
    specs: tuple[TensorSpec, ...]

    async def pull(self, weights: Weights, reader: str, within_s: float | None = None) -> str:
        """Brings a version to this node and validates it; the caller releases it when read.

        Raises `WeightsRefused`, and `WeightsMissing` where it did not arrive but may on another try.
        """
        local, home = self._local, self.agents.get(weights.home)
        if local is None or home is None:
            where = "this node" if local is None else f"node {weights.home[:8]}"
            raise WeightsMissing(f"version {weights.version}: {where} has no agent of the weight store")
        try:
            folder = await local.acquire.remote(weights, reader, home, within_s)
        except RayActorError as error:
            raise WeightsMissing(f"version {weights.version}: this node's agent of the store is gone") from error
        if isinstance(folder, Missing):
            kind = WeightsMissing if folder.passing else WeightsRefused
            raise kind(f"version {weights.version}: {folder.why}")
        try:
            await asyncio.to_thread(validate, weights, folder, self.specs)
        except InvalidWeights as error:
            await self.release(weights.version, reader)
            raise WeightsRefused(f"version {weights.version}: {error}") from error
        return str(folder)

    async def release(self, version: int, reader: str) -> None:
        if self._local is not None:
            with contextlib.suppress(RayActorError):  # Who counted it is gone.
                await self._local.release.remote(version, reader)

    async def folder(self) -> Path | None:
        """This node's folder, where an engine's record lies too, for whoever has to sweep up; None without an agent."""
        try:
            return None if self._local is None else Path(await self._local.folder_path.remote())
        except RayActorError:
            return None

    @property
    def reaches_here(self) -> bool:
        """Whether this node had an agent when the handle was made."""
        return ray.get_runtime_context().get_node_id() in self.agents

    @property
    def _local(self) -> Any:
        return self.agents.get(ray.get_runtime_context().get_node_id())


class Store:
    """The trainer's side: agents on all nodes, and what they may give back.

    Every call raises `LearnerLost` when the agent at home is gone or silent: nothing can be published without it.
    """

    def __init__(self, run: str, home: str, first_version: int, transfer_s: float = TRANSFER_S) -> None:
        self.run = run
        self.first_version = first_version
        self.transfer_s = transfer_s
        self.home = home
        self.agents: dict[str, Any] = {}
        self._told: list[tuple[str, Any]] = []
        self._lock = threading.RLock()  # The learner's thread publishes while the trainer's counts nodes.
        self.add_nodes()
        self.folder: str = self._home_says("folder_path", within_s=START_S)

    def add_nodes(self) -> None:
        """An agent for every living node that has none; those of lost nodes, and those that died, are forgotten."""
        living = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        with self._lock:
            self._notice_deaths()
            self.agents = {node: agent for node, agent in self.agents.items() if node in living}
            for node in living - self.agents.keys():
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                options = ray.remote(NodeAgent).options(num_cpus=0, scheduling_strategy=where, max_concurrency=64)
                self.agents[node] = options.remote(self.run, node, self.first_version, transfer_s=self.transfer_s)

    def handle(self, specs: tuple[TensorSpec, ...]) -> StoreHandle:
        return StoreHandle(dict(self.agents), specs)

    def free(self, below: int) -> list[int]:
        """Versions whose pages at home may be written again."""
        for node in list(self.agents):
            if node != self.home:
                self._tell(node, "free", below)
        freed: list[int] = self._home_says("free", below)
        return freed

    def forget(self, reader: str) -> None:
        for node in list(self.agents):
            self._tell(node, "forget", reader)

    def begin_again(self, home: str, first_version: int) -> None:
        """A new learner publishes on node `home`, from `first_version` on; what the one before it left goes."""
        self.first_version = first_version
        self.add_nodes()
        # The old home comes last: others may be fetching from it.
        for node in sorted(self.agents, key=lambda node: node == self.home):
            for told in self._tell(node, "begin_again", first_version):
                ray.wait([told], timeout=ANSWER_S)
        self.add_nodes()
        self.home = home
        self.folder = self._home_says("folder_path", within_s=START_S)

    def save(self, weights: Weights, target: Path) -> None:
        self._home_says("save", weights, str(target), within_s=SAVE_S)

    def close(self) -> None:
        closing = [told for node in list(self.agents) for told in self._tell(node, "close")]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=ANSWER_S)
        for agent in self.agents.values():
            ray.kill(agent)

    def _home_says(self, method: str, *arguments: Any, within_s: float = ANSWER_S) -> Any:
        agent = self.agents.get(self.home)
        where = f"The weight store's agent on the learner's node {self.home[:8]}"
        if agent is None:
            raise LearnerLost(f"{where} is gone with its node.")
        try:
            return ray.get(getattr(agent, method).remote(*arguments), timeout=within_s)
        except RayActorError as error:
            self.agents.pop(self.home, None)
            raise LearnerLost(f"{where} is gone.") from error
        except GetTimeoutError as error:
            raise LearnerLost(f"{where} did not answer `{method}` within {within_s:g} s.") from error

    def _tell(self, node: str, method: str, *arguments: Any) -> list[Any]:
        """Without waiting for the answer, which is returned as a reference; none for a node that has just been lost."""
        with self._lock:
            agent = self.agents.get(node)
            if agent is None:
                return []
            told = getattr(agent, method).remote(*arguments)
            self._told.append((node, told))
            return [told]

    def _notice_deaths(self) -> None:
        """Forgets agents that died over something they were told. Home is noticed by `_home_says`."""
        waiting = []
        for node, told in self._told:
            if not ray.wait([told], timeout=0)[0]:
                waiting.append((node, told))
                continue
            try:
                ray.get(told)
            except RayActorError:
                if node != self.home:
                    self.agents.pop(node, None)
        self._told = waiting
