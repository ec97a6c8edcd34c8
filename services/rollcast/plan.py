"""What a run will start and need, and whether this machine can carry it: what `--dry-run` prints.

Owns: the list of processes, the memory estimate, and every refusal that takes a look at the machine.
Does not know how anything is started; it imports neither Ray nor torch nor vLLM, so that it answers at once.
Figures marked "about" are sized by rule of thumb; the others follow from the model's tensors.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from rollcast.config import RunConfig
from rollcast.errors import ConfigError

if TYPE_CHECKING:
    from rollcast.preflight import Node

Place = Literal["memory", "gpu memory", "shared memory", "disk"]

GIB = 2**30
FP32 = 4
# Resident size of a process that has imported torch, transformers and Ray (measured: 0.4), with some room.
PROCESS_BYTES = GIB // 2
# The largest header that the safetensors format allows.
LARGEST_HEADER = 100_000_000
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One kind of process: how many, and what Ray reserves for each."""

    name: str
    count: int
    cpus: float
    gpus: float
    does: str


@dataclass(frozen=True)
class Need:
    """Bytes that something will take, and where."""

    name: str
    place: Place
    nbytes: int
    about: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is: devices, and bytes free by place. `cluster` is the address when Ray runs elsewhere."""

    cpus: int
    gpus: int
    free: Mapping[Place, int]
    cluster: str | None


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs of a model; 0 where its config.json does not say."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    keys: int
    """Width of the keys of one layer: key-value heads times head dimension."""


@dataclass(frozen=True)
class Plan:
    """A run that can start, told before it does."""

    run: str
    run_dir: str
    model: str
    steps: int
    samples_per_step: int
    tokens_per_step: int
    """At most: every answer as long as allowed, in one turn."""
    parameters: int | None
    processes: tuple[Process, ...]
    needs: tuple[Need, ...]
    machine: Machine
    warnings: tuple[str, ...]


def make_plan(config: RunConfig) -> Plan:
    """Looks at the machine. Raises `ConfigError` for what cannot work here."""
    machine = look(run_directory(config))
    size = _model_size(config)
    processes = processes_of(config)
    needs = tuple(_needs(config, size)) if size else ()
    if machine.cluster is None:
        _refuse_missing_devices(processes, machine)
        _refuse_missing_engine(config)
        _refuse_cpu_build(config)
        _refuse_small_shared_memory(needs, machine)
    _refuse_unwritable(run_directory(config))
    return Plan(
        run=config.run.name,
        run_dir=str(run_directory(config)),
        model=config.model.path,
        steps=config.run.steps,
        samples_per_step=config.samples_per_step,
        tokens_per_step=config.samples_per_step * config.rollout.max_new_tokens,
        parameters=size.parameters if size else None,
        processes=processes,
        needs=needs,
        machine=machine,
        warnings=tuple(_warnings(needs, machine, size)),
    )


def run_directory(config: RunConfig) -> Path:
    """The folder of the run, absolute: a relative one counts from where the command was typed."""
    return Path(config.run.dir).expanduser().absolute() / config.run.name


# ---- processes and devices


def processes_of(config: RunConfig) -> tuple[Process, ...]:
    learner, rollout = config.learner, config.rollout
    engine = f"{rollout.engine} engine"
    if rollout.tensor_parallel > 1:
        engine += f" over {rollout.tensor_parallel} devices"
    learns = f"{learner.algorithm}, critic: {learner.critic}, {config.model.dtype} over float32 masters"
    learns += ", sharded (fsdp)" if learner.sharding == "fsdp" else ""
    group = (
        [Process("learner", learner.num_learners, learner.cpus_per_learner, learner.gpus_per_learner, learns)]
        if learner.num_learners
        else []
    )
    serve = config.serve
    if serve.enabled:
        whose = engine if serve.mode == "own" else "the workers' engines"
        does = f"the live policy on port {serve.port}, {whose}"
        group.append(Process("replica", serve.min_replicas, serve.cpus_per_replica, serve.gpus_per_replica, does))
    trainer = "the loop, ledger, versions, checkpoints"
    trainer += "" if learner.num_learners else f"; learns itself ({learns})"
    if not rollout.first_workers:
        return (Process("trainer", 1, 0, 0, trainer), *group)
    return (
        Process("trainer", 1, 0, 0, trainer),
        *group,
        Process(
            "rollout worker",
            rollout.first_workers,
            rollout.cpus_per_worker,
            rollout.gpus_per_worker,
            f"{engine}, {rollout.concurrency} episodes at once{_grows(config)}",
        ),
        Process("weight agent", 1, 0, 0, f"{config.weights.transport} segments; one on every node"),
    )


def _grows(config: RunConfig) -> str:
    fewest, most = config.rollout.fleet_bounds
    return f"; {fewest} to {most} as the learner needs them" if fewest < most else ""


def _reserved(processes: Sequence[Process]) -> tuple[float, float]:
    cpus = sum(process.count * process.cpus for process in processes)
    gpus = sum(process.count * process.gpus for process in processes)
    return cpus, gpus


def look(run_dir: Path) -> Machine:
    """This machine, and what is free where the run directory is to be."""
    free: dict[Place, int] = {"memory": _free_memory(), "disk": shutil.disk_usage(_standing(run_dir)).free}
    if SHARED_MEMORY.is_dir():
        free["shared memory"] = shutil.disk_usage(SHARED_MEMORY).free
    return Machine(_cpus(), _gpus(), free, cluster_address())


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where a run starts one of its own on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def _cpus() -> int:
    """The cores this process may run on; a container's quota counts too, as it does for Ray."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    match _cgroup("cpu.max").split():
        case [quota, period] if quota.isdigit():
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _gpus() -> int:
    """NVIDIA devices of this machine that the environment leaves visible."""
    present = sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _free_memory() -> int:
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def _cgroup(name: str) -> str:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


# ---- the model


def _model_size(config: RunConfig) -> ModelSize | None:
    """Size of the model, or None for one that has to be fetched from the hub first."""
    folder = Path(config.model.path).expanduser()
    if not folder.exists() and is_hub_id(config.model.path):
        return None
    settings = _model_settings(folder)
    layers = _number(settings, "num_hidden_layers", "n_layer")
    hidden = _number(settings, "hidden_size", "n_embd")
    heads = _number(settings, "num_attention_heads", "n_head")
    width = _number(settings, "head_dim") or (hidden // heads if heads else 0)
    return ModelSize(
        parameters=_parameters(folder),
        layers=layers,
        hidden=hidden,
        inner=_number(settings, "intermediate_size", "n_inner") or 4 * hidden,
        keys=(_number(settings, "num_key_value_heads") or heads) * width,
    )


def is_hub_id(path: str) -> bool:
    """`org/name`, unless it points into a folder that is here; `models/` is where the demo puts its own."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return False
    parent = Path(path).parent
    return not parent.exists() and parent.name != "models"


def _model_settings(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise ConfigError(
            f"model.path: there is no model folder {str(folder)!r}",
            "it is neither a folder nor a hub id of the form org/name",
            "correct model.path; `make demo` puts its model into models/smollm2-135m-instruct",
        )
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _bad_model(folder, "it holds no config.json") from None
    except (OSError, ValueError) as error:
        raise _bad_model(folder, f"its config.json cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise _bad_model(folder, "its config.json is not an object")
    # Models that also see or hear keep the language model's settings one level down.
    below = settings.get("text_config")
    return below if isinstance(below, dict) else settings


def _bad_model(folder: Path, why: str) -> ConfigError:
    fix = "point model.path at a folder that transformers' save_pretrained wrote"
    return ConfigError(f"model.path: {str(folder)!r} is not a model", why, fix)


def _number(settings: Mapping[str, Any], *names: str) -> int:
    found = (settings[name] for name in names if isinstance(settings.get(name), int))
    return next(found, 0)


def _parameters(folder: Path) -> int:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _bad_model(folder, "it holds no *.safetensors file")
    return sum(math.prod(shape) for path in files for shape in _shapes(path))


def _shapes(path: Path) -> Iterator[list[int]]:
    """Shapes of a file's tensors, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(min(length, LARGEST_HEADER)))
        yield from (entry["shape"] for name, entry in entries.items() if name != "__metadata__")
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError):
        why = f"{path.name} is not a safetensors file: it may be cut off, or a Git LFS pointer"
        raise _bad_model(path.parent, why) from None


# ---- memory


def _needs(config: RunConfig, size: ModelSize) -> Iterator[Need]:
    compute = _compute_bytes(config) * size.parameters
    yield from _learner_needs(config, size)
    yield from _worker_needs(config, size)
    adapter_alone = config.published_kind == "adapter"
    published = _compute_bytes(config) * _trained_parameters(config, size) if adapter_alone else compute
    yield Need("published weights, two versions", "shared memory", 2 * published)
    yield Need("checkpoints, with optimiser", "disk", _checkpoint_bytes(config, size))


def _compute_bytes(config: RunConfig) -> int:
    return FP32 if config.model.dtype == "float32" else 2


def _learner_needs(config: RunConfig, size: ModelSize) -> Iterator[Need]:
    place: Place = "gpu memory" if config.learner.gpus_per_learner else "memory"
    learners = max(1, config.learner.num_learners)
    sharded = config.learner.sharding != "none"
    compute = _compute_bytes(config) * size.parameters
    separate = config.learner.critic == "separate"
    trained = FP32 * _trained_parameters(config, size) * (2 if separate else 1)

    def need(name: str, nbytes: int, about: bool = False) -> Need:
        return Need(f"learner: {name}", place, learners * nbytes, about)

    def shared(name: str, nbytes: int) -> Need:
        return Need(f"learner: {name}", place, nbytes if sharded else learners * nbytes)

    if sharded:  # Its weights are the masters' own, cast as they are gathered; those of an adapter's base stay cast.
        yield need("layers gathered to compute with", _gathered_bytes(config, size), about=True)
    if config.adapter is not None or (config.model.dtype != "float32" and not sharded):
        yield shared("policy to compute with", compute)
    if separate and config.model.dtype != "float32" and not sharded:
        yield need("critic to compute with", compute)
    yield shared("float32 masters", trained)
    yield shared("Adam moments", 2 * trained)
    yield shared("gradients", trained)
    if config.kl.kind != "none" and config.adapter is None:  # An adapter is switched off instead.
        yield shared("reference policy", compute)
    yield need("activations", _activation_bytes(config, size), about=True)
    yield Need("learner: Python and libraries", "memory", learners * PROCESS_BYTES, about=True)


def _trained_parameters(config: RunConfig, size: ModelSize) -> int:
    """All of them, or about those of the adapters: two narrow matrices for each linear layer (Llama)."""
    if config.adapter is None:
        return size.parameters
    widths = {
        "q_proj": 2 * size.hidden,
        "k_proj": size.hidden + size.keys,
        "v_proj": size.hidden + size.keys,
        "o_proj": 2 * size.hidden,
        "gate_proj": size.hidden + size.inner,
        "up_proj": size.hidden + size.inner,
        "down_proj": size.hidden + size.inner,
    }
    of_layer = sum(widths.get(name, 2 * size.hidden) for name in config.adapter.targets)
    return size.layers * config.adapter.rank * of_layer


def _gathered_bytes(config: RunConfig, size: ModelSize) -> int:
    """What a learner of a sharded policy has whole at a time: two layers, of which one is on its way, and all that is
    in no layer (Llama)."""
    layer = 2 * size.hidden * (size.hidden + size.keys) + 3 * size.hidden * size.inner + 2 * size.hidden
    others = max(0, size.layers - 2) * layer
    return _compute_bytes(config) * max(0, size.parameters - others)


def _activation_bytes(config: RunConfig, size: ModelSize) -> int:
    """What backward keeps of one micro-batch: a token and layer, 11 hidden and 4 inner vectors (Llama).

    With activation checkpointing that of one layer at a time, and the inputs of the others.
    """
    tokens = min(config.learner.microbatch_tokens, config.samples_per_step * config.rollout.max_model_len)
    of_layer = 11 * size.hidden + 4 * size.inner
    kept_whole = 1 if config.learner.activation_checkpointing else size.layers
    values = tokens * (kept_whole * of_layer + (size.layers - kept_whole) * size.hidden)
    return values * _compute_bytes(config)


def _worker_needs(config: RunConfig, size: ModelSize) -> Iterator[Need]:
    rollout = config.rollout
    place: Place = "gpu memory" if rollout.gpus_per_worker else "memory"
    # vLLM's engine is a process beside its worker.
    processes = 2 if rollout.engine == "vllm" else 1
    if rollout.engine != "scripted":
        yield Need("workers: engine weights", place, rollout.first_workers * _compute_bytes(config) * size.parameters)
        cache = (
            (rollout.concurrency + config.serve.reserved)
            * rollout.max_model_len
            * 2
            * size.layers
            * size.keys
            * _compute_bytes(config)
        )
        yield Need("workers: KV cache, all answers full", place, rollout.first_workers * cache)
    yield Need("workers: Python and libraries", "memory", rollout.first_workers * processes * PROCESS_BYTES, about=True)


def _checkpoint_bytes(config: RunConfig, size: ModelSize) -> int:
    """A new checkpoint is complete before the oldest goes: one more than are kept."""
    checkpoint = 3 * FP32 * _trained_parameters(config, size) * (2 if config.learner.critic == "separate" else 1)
    published = _compute_bytes(config) * _trained_parameters(config, size)
    return (config.checkpoint.keep_last + 1) * (checkpoint + published)


def _total(needs: Sequence[Need], place: Place) -> int:
    return sum(need.nbytes for need in needs if need.place == place)


def _warnings(needs: Sequence[Need], machine: Machine, size: ModelSize | None) -> Iterator[str]:
    if size is None:
        yield "the model is not on this machine: it is fetched from the hub first, and its size is unknown"
    if machine.cluster is not None:
        yield f"the run starts on {machine.cluster}: free devices and memory here say nothing about it"
        return
    places: tuple[Place, ...] = ("memory", "disk")
    for place in places:
        wanted, free = _total(needs, place), machine.free[place]
        if wanted > free:
            yield f"{place}: about {_gib(wanted)} wanted, {_gib(free)} free"


# ---- refusals


def _refuse_missing_devices(processes: Sequence[Process], machine: Machine) -> None:
    cpus, gpus = _reserved(processes)
    cpu_parts = [f"{it.count} x {it.name} with {it.cpus}" for it in processes if it.cpus]
    gpu_parts = [f"{it.count} x {it.name} with {it.gpus:g}" for it in processes if it.gpus]
    problems = [
        _too_few(kind, wanted, here, parts)
        for kind, wanted, here, parts in (
            ("CPU", cpus, machine.cpus, cpu_parts),
            ("GPU", gpus, machine.gpus, gpu_parts),
        )
        if wanted > here
    ]
    if problems:
        raise ConfigError.join("the run does not fit this machine", problems)


def _too_few(kind: str, wanted: float, here: int, parts: Sequence[str]) -> tuple[str, str, str]:
    key = f"{kind.lower()}s"
    return (
        f"it asks for {wanted:g} {kind}s, and {here} are here",
        f"they are reserved and never shared: {', '.join(parts)}",
        f"lower rollout.workers, rollout.{key}_per_worker or learner.{key}_per_learner, set"
        " learner.num_learners = 0, or name a larger cluster in RAY_ADDRESS",
    )


def _refuse_missing_engine(config: RunConfig) -> None:
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: vLLM is not installed here",
            "this Python finds no module of that name",
            'install rollcast[cpu] or rollcast[nvidia], or set rollout.engine = "torch"',
        )


def _refuse_cpu_build(config: RunConfig) -> None:
    if config.learner.gpus_per_learner and importlib.metadata.version("torch").endswith("+cpu"):
        raise ConfigError(
            "learner.gpus_per_learner: torch is a build for CPUs here",
            "a learner that is given a GPU could not use it",
            "install rollcast[nvidia] (`make setup ENGINE=nvidia`), or set learner.gpus_per_learner = 0",
        )


def _refuse_small_shared_memory(needs: Sequence[Need], machine: Machine) -> None:
    wanted, free = _total(needs, "shared memory"), machine.free.get("shared memory")
    if free is not None and wanted > free:
        raise ConfigError(
            f"shared memory is too small: {_gib(wanted)} wanted, {_gib(free)} free",
            f"two versions of the policy lie in {SHARED_MEMORY} while workers change over",
            "give the container more (docker run --shm-size), free some, or take a smaller model",
        )


def _refuse_unwritable(run_dir: Path) -> None:
    """Tries it: only the file system knows whether a folder can be written."""
    standing = _standing(run_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".rollcast-", dir=standing):
            return
    except OSError as error:
        raise ConfigError(
            f"run.dir: {str(run_dir)!r} cannot be written",
            f"{str(standing)!r}: {error.strerror}",
            "free that path, or name another folder with --run.dir",
        ) from None


def _standing(path: Path) -> Path:
    """The nearest part of `path` that exists."""
    return next(part for part in (path, *path.parents) if os.path.exists(part))


# ---- telling it


def render(plan: Plan, nodes: "Sequence[Node]" = ()) -> str:
    """The plan as text for people; `nodes` are those of the cluster it would start on."""
    machine = plan.machine
    where = machine.cluster or "this machine"
    cpus, gpus = _reserved(plan.processes)
    sampled = f"{plan.samples_per_step} samples, at most {plan.tokens_per_step:,} new tokens"
    size = "size unknown" if plan.parameters is None else f"{plan.parameters / 1e6:,.1f} M parameters"
    lines = [
        f"run {plan.run} in {plan.run_dir}",
        f"model {plan.model}, {size}",
        f"{plan.steps} steps of {sampled}",
        "",
        f"processes on {where}",
        *_process_lines(plan.processes),
        f"  disjoint: {cpus} CPUs, {gpus:g} GPUs reserved; {_devices_told(machine, nodes)}",
        "",
        *_need_lines(plan.needs, machine),
        *(f"warning: {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines).rstrip()


def _devices_told(machine: Machine, nodes: "Sequence[Node]") -> str:
    if not nodes:
        return f"{machine.cpus} CPUs, {machine.gpus} GPUs here"
    return "; ".join(f"{node.name} has {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)


def _process_lines(processes: Sequence[Process]) -> Iterator[str]:
    for process in processes:
        devices = f"{process.cpus} CPU, {process.gpus:g} GPU each"
        yield f"  {process.count:>3} x {process.name:<15}{devices:<20}{process.does}"


def _need_lines(needs: Sequence[Need], machine: Machine) -> Iterator[str]:
    places = dict.fromkeys(need.place for need in needs)
    for place in places:
        free = machine.free.get(place)
        beside = f", {_gib(free)} free here" if free is not None else ""
        yield f"{place}: {_gib(_total(needs, place))}{beside}"
        for need in needs:
            if need.place == place:
                yield f"  {'about ' if need.about else '':>6}{_gib(need.nbytes):>10}  {need.name}"
        yield ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB"
