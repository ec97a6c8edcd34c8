"""The Ray cluster a run works on: the one that RAY_ADDRESS names, or one of its own on this machine.

Owns: connecting, what every process of a run finds in its environment, asking the cluster whether the run can start
there, and the compute dtype of the machine. Does not know what runs there.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import ray

from rollcast import preflight, survey
from rollcast.config import RunConfig
from rollcast.plan import Process, cluster_address, is_hub_id, processes_of, run_directory
from rollcast.submitted import job_variables

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
    """Connects to Ray for the time of a run and gives the cluster's address. A cluster of its own ends with it.

    Raises `ConfigError` when the run could never start there.
    """
    if ray.is_initialized():  # A caller's own session: tests, notebooks.
        yield ray.get_runtime_context().gcs_address
        return
    with session():
        require_devices(config)
        if cluster_address() is not None:
            require_views(config, run_directory(config))
        yield ray.get_runtime_context().gcs_address


@contextmanager
def session(address: str | None = None) -> Iterator[str]:
    """Connected for a time; gives the address of the dashboard, empty where there is none.

    Without `address` it is the one that RAY_ADDRESS names, else "local": one of its own. Ray would join whatever was
    started last on this machine.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    context = ray.init(
        address=address,
        namespace=NAMESPACE,
        include_dashboard=False if address == "local" else None,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": environment()},
    )
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def namespace() -> str:
    """In which the run's named actors are found: `NAMESPACE`, or that of a caller's own session."""
    found: str = ray.get_runtime_context().namespace
    return found


def environment() -> dict[str, str]:
    """`ENVIRONMENT`, less what a submitted job sets itself: Ray refuses a variable that is set in both places."""
    return {name: value for name, value in ENVIRONMENT.items() if name not in job_variables()}


def require_devices(config: RunConfig) -> None:
    """Raises `ConfigError` when the run's processes would wait for devices for ever, and says why."""
    if not config.run.wait_for_devices:
        preflight.refuse(preflight.device_problems(processes_of(config), survey.nodes()))


def require_views(config: RunConfig, run_dir: Path | None) -> None:
    """Raises `ConfigError` when a node has other versions, or does not see the model or the run folder."""
    folder = Path(config.model.path).expanduser()
    model = None if is_hub_id(config.model.path) else folder.absolute()
    engine = "vllm" if config.rollout.engine == "vllm" else None
    with ExitStack() as stack:
        # Without learners of their own the trainer writes the checkpoints.
        alone = run_dir is None or not config.learner.num_learners
        mark = None if alone or run_dir is None else stack.enter_context(survey.marked(run_dir))
        reports = survey.ask_nodes(model, mark, engine)
        here = survey.look_around("the trainer", None, None, None)
    on_gpu = config.learner.gpus_per_learner > 0
    preflight.refuse(preflight.node_problems(reports, here, config.model.path, config.run.dir, on_gpu))


def examined(config: RunConfig) -> list[preflight.Node]:
    """The nodes of the cluster that RAY_ADDRESS names, for a plan. Raises as a start there would."""
    with session():
        require_devices(config)
        require_views(config, None)
        return survey.nodes()


def most_workers(config: RunConfig) -> int:
    """How many rollout workers the cluster holds beside learners and replicas: each whole on one node."""
    found = {it.name: it for it in processes_of(config)}
    nobody, rollout = Process("nobody", 0, 1, 0, ""), config.rollout
    worker = Process("rollout worker", 1, rollout.cpus_per_worker, rollout.gpus_per_worker, "")
    nodes = preflight.beside(found.get("replica", nobody), survey.nodes())
    return max(preflight.most_beside(found.get("learner", nobody), worker, nodes), 0)


def compute_dtype(config: RunConfig) -> Dtype:
    """`model.dtype`, where "auto" means bfloat16 if the processor (or a GPU) computes in it."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if config.learner.gpus_per_learner > 0:
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
