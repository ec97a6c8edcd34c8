"""The Ray cluster a run works on: the one that RAY_ADDRESS names, or one of its own on this machine.

Owns: connecting, what every process of a run finds in its environment, and the compute dtype of the machine. Does not
know what runs there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import ray

from rollcast.config import RunConfig
from rollcast.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
NAMESPACE = "rollcast"
ENVIRONMENT = {
    # Threads that wait at a barrier sleep: spinning ones stop everybody else on a full machine (measured on 2 cores
    # beside one busy process: a learner step of 5.6 s took 32 to 50 s).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Ray's workers would stand back behind everything else on the machine, the learner in the trainer's process first.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


# On import, since torch and transformers read them when they are imported: run.py imports this file first.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


@contextmanager
def connected(config: RunConfig) -> Iterator[str]:
    """Connects to Ray for the time of a run and gives the cluster's address. A cluster of its own ends with it."""
    if ray.is_initialized():  # A caller's own session: tests, notebooks.
        yield ray.get_runtime_context().gcs_address
        return
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address,
        namespace=NAMESPACE,
        include_dashboard=False if address is None else None,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    try:
        require_devices(config)
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def namespace() -> str:
    """In which the run's named actors are found: `NAMESPACE`, or that of a caller's own session."""
    found: str = ray.get_runtime_context().namespace
    return found


def require_devices(config: RunConfig) -> None:
    """Raises `ConfigError` with the counts when the cluster has fewer CPUs or GPUs than the run's actors ask for."""
    rollout, learner, replicas = config.rollout, config.learner, served_replicas(config)
    wanted = {
        "CPU": rollout.first_workers * rollout.cpus_per_worker
        + learner.num_learners * learner.cpus_per_learner
        + replicas * config.serve.cpus_per_replica,
        "GPU": rollout.first_workers * rollout.gpus_per_worker
        + learner.num_learners * learner.gpus_per_learner
        + replicas * config.serve.gpus_per_replica,
    }
    has = ray.cluster_resources()
    short = {kind: count for kind, count in wanted.items() if count > has.get(kind, 0.0)}
    if short:
        needs = ", ".join(f"{count:g} {kind}s" for kind, count in short.items())
        found = ", ".join(f"{has.get(kind, 0.0):g} {kind}s" for kind in short)
        raise ConfigError(
            f"The run needs {needs}; the cluster has {found}.",
            f"{rollout.first_workers} rollout workers, {learner.num_learners} learners and {replicas} replicas of the "
            "live policy hold their devices alone.",
            "Ask for fewer with rollout.workers, rollout.cpus_per_worker, learner.cpus_per_learner or "
            "serve.cpus_per_replica, or add nodes.",
        )


def served_replicas(config: RunConfig) -> int:
    """Replicas of the live policy that are there for as long as the run trains."""
    return config.serve.min_replicas if config.serve.enabled else 0


def most_workers(config: RunConfig) -> int:
    """How many rollout workers the cluster holds beside learners and replicas: each whole on one node."""
    rollout, learner = config.rollout, config.learner
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for _ in range(learner.num_learners):
        _take(nodes, {"CPU": float(learner.cpus_per_learner), "GPU": float(learner.gpus_per_learner)})
    replica = {"CPU": config.serve.cpus_per_replica, "GPU": config.serve.gpus_per_replica}
    for _ in range(served_replicas(config) if any(replica.values()) else 0):
        _take(nodes, replica)
    worker = {"CPU": float(rollout.cpus_per_worker), "GPU": float(rollout.gpus_per_worker)}
    return sum(_room(node, worker) for node in nodes)


def _room(node: dict[str, float], needs: dict[str, float]) -> int:
    """How many of that kind a node holds."""
    return min(int(node.get(kind, 0.0) / count + 1e-9) for kind, count in needs.items() if count)


def _take(nodes: list[dict[str, float]], needs: dict[str, float]) -> None:
    """Puts one on the first node with room for it."""
    for node in nodes:
        if _room(node, needs):
            for kind, count in needs.items():
                node[kind] = node.get(kind, 0.0) - count
            return


def compute_dtype(config: RunConfig) -> Dtype:
    """`model.dtype`, where "auto" means bfloat16 if the processor (or a GPU) computes in it."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if config.learner.gpus_per_learner > 0:
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
