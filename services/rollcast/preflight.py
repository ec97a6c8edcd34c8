"""What a run needs against what a cluster has: why it would wait for ever, told before anything starts.

Owns: the arithmetic of devices on nodes, and what each node must see. Pure: it is given the nodes as `survey.py` or the
dashboard's API found them, and does not know Ray.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rollcast.errors import ConfigError
from rollcast.plan import Process

Problem = tuple[str, str, str]
"""What, why, do this."""


@dataclass(frozen=True)
class Node:
    """One node, by its address, and all that it has, whoever uses it now."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself."""

    name: str
    silent: str = ""
    """Why it does not answer; the rest is then unknown."""
    python: str = ""
    ray: str = ""
    torch: str = ""
    """Version, whose ending names the kind of its build."""
    gpus: float = 0.0
    code: str = ""
    """Digest of the rollcast that it imports."""
    code_folder: str = ""
    has_engine: bool = True
    sees_model: bool = True
    sees_run_folder: bool = True
    free_shared_memory: int = 0
    leftovers: tuple[str, ...] = ()
    """Shared memory that dead rollcast processes left."""


def refuse(problems: Sequence[Problem]) -> None:
    """Raises one `ConfigError` with all of them, if there are any."""
    if problems:
        raise ConfigError.join("the run does not fit this cluster", problems)


# ---- devices


def device_problems(processes: Sequence[Process], nodes: Sequence[Node]) -> list[Problem]:
    """Why Ray could never place these processes on these nodes; empty when there is a way to place them all."""
    processes = [it for it in processes if it.count and (it.cpus or it.gpus)]
    return [*_too_few(processes, nodes)] or [*_too_large(processes, nodes)] or [*_no_way(processes, nodes)]


def _too_few(processes: Sequence[Process], nodes: Sequence[Node]) -> Iterator[Problem]:
    """More devices than all nodes have together."""
    for kind in ("CPU", "GPU"):
        wanted = sum(it.count * _of(it, kind) for it in processes)
        has = sum(_of(node, kind) for node in nodes)
        if wanted > has:
            parts = ", ".join(f"{it.count} x {it.name} with {_of(it, kind):g}" for it in processes if _of(it, kind))
            yield (
                f"it needs {_counted(wanted, kind)}, the cluster has {has:g}",
                f"they are reserved and never shared: {parts}",
                f"lower {_settings(processes, kind)}, or add nodes",
            )


def _too_large(processes: Sequence[Process], nodes: Sequence[Node]) -> Iterator[Problem]:
    """A process that no single node can hold."""
    for it in processes:
        if not any(_room(it, node.cpus, node.gpus) for node in nodes):
            devices = " and ".join(_counted(_of(it, kind), kind) for kind in ("CPU", "GPU") if _of(it, kind))
            listed = ", ".join(f"{node.name}: {_held(node)}" for node in nodes)
            yield (
                f"a {it.name} needs {devices} on one node, and no node has as many",
                f"the nodes are {listed}",
                f"lower {_settings([it], 'CPU', 'GPU', count=False)}, or add a node that is large enough",
            )


def _no_way(processes: Sequence[Process], nodes: Sequence[Node]) -> Iterator[Problem]:
    """Enough in all, and each fits somewhere, but not all at once: devices of two nodes cannot be joined."""
    if len(processes) > 2 or not processes:
        return
    first, last = processes[0], processes[-1]
    if len(processes) == 1:
        placed = sum(_room(first, node.cpus, node.gpus) for node in nodes)
        missing = first.count - placed
    else:
        placed = most_beside(first, last, nodes)
        missing = last.count - placed
    if missing > 0:
        beside = f" beside {first.count} x {first.name}" if len(processes) == 2 else ""
        listed = ", ".join(f"{node.name}: {_held(node)}" for node in nodes)
        yield (
            f"{last.count} x {last.name} are wanted{beside}, and there is room for {max(placed, 0)}",
            f"each is on one node, and devices of two nodes cannot be joined ({listed})",
            f"lower {_settings([last], 'CPU', 'GPU')}, or add nodes",
        )


def most_beside(first: Process, other: Process, nodes: Sequence[Node]) -> int:
    """How many of `other` can be placed when all of `first` are; -1 when those alone do not fit.

    Node by node: the most of `other` for every number of `first` placed so far.
    """
    best = [0] + [-1] * first.count
    for node in nodes:
        here = [
            _room(other, node.cpus - count * first.cpus, node.gpus - count * first.gpus)
            for count in range(min(_room(first, node.cpus, node.gpus), first.count) + 1)
        ]
        best = [
            max((best[n - k] + room for k, room in enumerate(here) if k <= n and best[n - k] >= 0), default=-1)
            for n in range(first.count + 1)
        ]
    return best[first.count]


def beside(process: Process, nodes: Sequence[Node]) -> list[Node]:
    """What the nodes have left when all of `process` are placed, each on the first that holds it."""
    left = list(nodes)
    for _ in range(process.count if process.cpus or process.gpus else 0):
        at = next((at for at, node in enumerate(left) if _room(process, node.cpus, node.gpus)), None)
        if at is not None:
            left[at] = replace(left[at], cpus=left[at].cpus - process.cpus, gpus=left[at].gpus - process.gpus)
    return left


def _room(process: Process, cpus: float, gpus: float) -> int:
    """How many of a process fit into so much; Ray counts devices in ten-thousandths."""
    parts = [(cpus, process.cpus), (gpus, process.gpus)]
    if 0 < process.gpus < 1 and gpus == int(gpus):  # A share is of one GPU: the rest of two cannot be joined.
        parts[1] = (gpus, 1 / (10_000 // round(process.gpus * 10_000)))
    return min(int(round(has * 10_000) // round(wanted * 10_000)) for has, wanted in parts if wanted)


def _of(it: Process | Node, kind: str) -> float:
    return it.cpus if kind == "CPU" else it.gpus


def _counted(count: float, kind: str) -> str:
    return f"{count:g} {kind}" + ("" if count == 1 else "s")


def _held(node: Node) -> str:
    return ", ".join(_counted(_of(node, kind), kind) for kind in ("CPU", "GPU") if _of(node, kind)) or "no device"


SETTINGS = {
    "rollout worker": ("rollout.workers", "worker"),
    "learner": ("learner.num_learners", "learner"),
    "replica": ("serve.min_replicas", "replica"),
}


def _settings(processes: Sequence[Process], *kinds: str, count: bool = True) -> str:
    """The keys that decide what these processes hold."""
    keys: list[str] = []
    for it in processes:
        number, role = SETTINGS[it.name]
        section = number.partition(".")[0]
        held = [f"{section}.{kind.lower()}s_per_{role}" for kind in kinds if _of(it, kind)]
        keys += [number, *held] if count and held else held
    return " or ".join(keys)


# ---- what each node sees


def node_problems(
    reports: Sequence[NodeReport], here: NodeReport, model: str, run_dir: str, learns_on_gpu: bool = False
) -> list[Problem]:
    """What is wrong with nodes that processes of the run may be placed on; `here` is the trainer's own word."""
    heard = [report for report in reports if not report.silent]
    return [
        *_silent([report for report in reports if report.silent]),
        *_versions(heard, here),
        *_views(heard, model, run_dir),
        *(cpu_builds([report for report in heard if report.gpus]) if learns_on_gpu else ()),
    ]


def _silent(reports: Sequence[NodeReport]) -> Iterator[Problem]:
    if reports:
        yield (
            f"rollcast cannot be run on {_nodes([report.name for report in reports])}",
            "; ".join(f"{report.name}: {report.silent}" for report in reports),
            "submit with `rollcast submit`, which ships its code; else see raylet.err and runtime_env_agent.log in the "
            "folder of Ray's session there",
        )


def _versions(reports: Sequence[NodeReport], here: NodeReport) -> Iterator[Problem]:
    for what, field, fix in (
        ("Python", "python", "give all nodes one image, or one Python"),
        ("Ray", "ray", "give all nodes one version of Ray"),
        ("rollcast's code", "code", "submit with `rollcast submit`, which ships its code to every node"),
    ):
        mine = getattr(here, field)
        others = [report for report in reports if getattr(report, field) != mine]
        if others:
            told = ", ".join(f"{report.name} has {getattr(report, field)[:12]}" for report in others)
            yield f"{what} is not the same on all nodes", f"{told}; the trainer has {mine[:12]}", fix


def _views(reports: Sequence[NodeReport], model: str, run_dir: str) -> Iterator[Problem]:
    for field, what, why, fix in (
        (
            "has_engine",
            "rollout.engine: vLLM is not installed on",
            "a rollout worker that is placed there could not start its engine",
            'install the same image on all nodes, or set rollout.engine = "torch"',
        ),
        (
            "sees_model",
            f"model.path: {model!r} is not on",
            "workers and learners read the model where they are placed",
            "put it on a file system that all nodes share, at one path, or name a hub id `org/name`",
        ),
        (
            "sees_run_folder",
            f"run.dir: {run_dir!r} is another folder on",
            "a learner that is placed there would write checkpoints that the trainer cannot see",
            "name a folder on a file system that all nodes share, or set learner.num_learners = 0",
        ),
    ):
        without = [report.name for report in reports if not getattr(report, field)]
        if without:
            yield f"{what} {_nodes(without)}", why, fix


def cpu_builds(reports: Sequence[NodeReport]) -> Iterator[Problem]:
    """A learner with a GPU computes there, and several of them talk through NCCL: torch for CPUs has neither."""
    without = [report.name for report in reports if report.torch.endswith("+cpu")]
    if without:
        yield (
            f"learner.gpus_per_learner: torch is a build for CPUs on {_nodes(without)}",
            "a learner that is given a GPU could not use it",
            "install rollcast[nvidia] there (`make setup ENGINE=nvidia`), or set learner.gpus_per_learner = 0",
        )


def _nodes(names: Sequence[str]) -> str:
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"
