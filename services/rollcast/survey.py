"""What the nodes of a cluster have and see: a small task on each, before a run's own processes are started there.

Owns: asking the nodes. Does not know what is wanted of them (`preflight.py`).
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollcast.preflight import Node, NodeReport
from rollcast.submitted import digest_of, imported

ANSWER_WITHIN_S = 120.0
"""What a node has to start one Python process, its environment included: that of a first job is fetched."""


def nodes() -> list[Node]:
    """All that live, the head first."""
    found = sorted(_alive(), key=lambda it: "node:__internal_head__" not in it["Resources"])
    return [Node(it["NodeManagerAddress"], *_devices(it["Resources"])) for it in found]


def _alive() -> list[dict[str, Any]]:
    return [it for it in ray.nodes() if it["Alive"]]


def _devices(resources: dict[str, float]) -> tuple[float, float]:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def ask_nodes(
    model: Path | None, mark: Path | None, engine: str | None = None, leftovers: bool = False
) -> list[NodeReport]:
    """Every node's own word. `model` is a folder to look for, `mark` a file of the trainer's in the run folder,
    `engine` a module to look for; a node that does not answer says why in `silent`."""
    task = ray.remote(num_cpus=0, max_retries=0)(look_around)
    asked = {}
    for it in _alive():
        there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(it["NodeID"], soft=False))
        asked[there.remote(it["NodeManagerAddress"], model, mark, engine, leftovers)] = it
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_WITHIN_S)
    for reference in silent:
        ray.cancel(reference, force=True)
    late = f"no answer within {ANSWER_WITHIN_S:.0f} s"
    reports = {reference: _answer(reference, asked[reference]) for reference in done}
    reports |= {it: NodeReport(asked[it]["NodeManagerAddress"], silent=late) for it in silent}
    alive = {it["NodeID"] for it in _alive()}  # One that has gone meanwhile is not in the way.
    return [report for reference, report in reports.items() if asked[reference]["NodeID"] in alive]


def _answer(reference: Any, node: dict[str, Any]) -> NodeReport:
    """A node that cannot run the task, because its rollcast is another one or none, is heard too."""
    try:
        report: NodeReport = ray.get(reference)
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return NodeReport(node["NodeManagerAddress"], silent=lines[-1] if lines else type(error).__name__)
    return replace(report, gpus=_devices(node["Resources"])[1])


def look_around(
    name: str, model: Path | None, mark: Path | None, engine: str | None, leftovers: bool = False
) -> NodeReport:
    """One node's word on itself, and the trainer's on its own."""
    folders = imported()
    free, left = _shared_memory() if leftovers else (0, ())
    return NodeReport(
        name=name,
        python=platform.python_version(),
        ray=ray.__version__,
        torch=importlib.metadata.version("torch"),
        code=digest_of(folders),
        code_folder=str(folders["rollcast"]),
        has_engine=engine is None or importlib.util.find_spec(engine) is not None,
        sees_model=model is None or (model / "config.json").is_file(),
        sees_run_folder=mark is None or mark.is_file(),
        free_shared_memory=free,
        leftovers=left,
    )


def _shared_memory() -> tuple[int, tuple[str, ...]]:
    import shutil

    from rollcast.weights import SHARED_MEMORY, abandoned

    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return free, tuple(str(folder) for folder in abandoned())


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """A file in the run folder by which another node recognises it."""
    mark = folder / f".seen-{uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink()
