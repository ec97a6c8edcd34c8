"""What `rollcast doctor` finds out about the cluster that RAY_ADDRESS names: its nodes, and who may use it.

Owns: asking it, in a process of its own (`python -m rollcast.doctor_cluster`) since a connection may hang, and judging
what comes back. Does not know this machine (`doctor.py`).
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import httpx

from rollcast.plan import GIB
from rollcast.preflight import Node, NodeReport, node_problems

LIMIT_S = 180.0
HTTP_LIMIT_S = 10.0
LEAST_SHARED_MEMORY = GIB


class Finding(NamedTuple):
    """One thing looked at, what was found, and what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    do_this: str = ""


def examine(address: str, limit_s: float = LIMIT_S) -> list[Finding]:
    """All findings on the cluster; one that says why it cannot be asked, where it cannot."""
    name = "cluster"
    fix = "See that RAY_ADDRESS, the token and the version of Ray are the cluster's, and that its ports are reachable."
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rollcast.doctor_cluster"], capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return [Finding(name, "fail", f"{address} cannot be asked: no answer within {limit_s:.0f} s", fix)]
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        return [Finding(name, "fail", f"{address} cannot be asked: {lines[-1] if lines else 'it said nothing'}", fix)]
    told = json.loads(lines[-1])
    nodes = [Node(**node) for node in told["nodes"]]
    reports = [NodeReport(**{**it, "leftovers": tuple(it["leftovers"])}) for it in told["reports"]]
    return [*judge(nodes, reports, NodeReport(**told["here"])), *_dashboard(told["dashboard"])]


def judge(nodes: Sequence[Node], reports: Sequence[NodeReport], here: NodeReport) -> Iterator[Finding]:
    """What the nodes have, whether they agree with this process, and what dead runs left in their shared memory."""
    listed = "; ".join(f"{node.name} has {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
    yield Finding("nodes", "ok", listed)
    problems = node_problems(reports, here, "", "")
    for what, why, fix in problems:
        yield Finding("nodes agree", "fail", f"{what}: {why}", f"{fix[0].upper()}{fix[1:]}.")
    if not problems:
        yield Finding("nodes agree", "ok", f"Python {here.python}, Ray {here.ray}, rollcast {here.code[:12]}")
    yield from _shared_memory([report for report in reports if not report.silent])


def _shared_memory(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    name = "shared memory of nodes"
    small = [it for it in reports if it.free_shared_memory < LEAST_SHARED_MEMORY]
    left = [it for it in reports if it.leftovers]
    if small:
        told = ", ".join(f"{it.name} has {it.free_shared_memory / GIB:.1f} GiB free" for it in small)
        yield Finding(name, "warn", told, "Give the containers more (docker run --shm-size=8g), or free some.")
    if left:
        told = "; ".join(f"{it.name}: {', '.join(it.leftovers)}" for it in left)
        yield Finding(name, "warn", f"dead rollcast processes left {told}", "Run `rollcast doctor --fix` there.")
    if not small and not left:
        yield Finding(name, "ok", "nothing left behind by dead rollcast processes")


def _dashboard(url: str) -> Iterator[Finding]:
    """Whether a stranger may submit jobs: whoever may, runs code on the cluster."""
    name = "dashboard"
    if not url:
        fix = "Start the head with --include-dashboard=true; `rollcast submit` needs it."
        yield Finding(name, "warn", "there is none, so that no job can be submitted", fix)
        return
    try:
        status = httpx.get(f"http://{url}/api/jobs/", timeout=HTTP_LIMIT_S).status_code
    except httpx.HTTPError as error:
        yield Finding(name, "warn", f"{url} does not answer from here: {error}", "Ask from a node, or open the port.")
        return
    if status in (401, 403):
        yield Finding(name, "ok", f"{url} asks for the token")
    else:
        fix = "Start every node with RAY_AUTH_MODE=token and a token; keep the port on loopback until then."
        yield Finding(name, "fail", f"{url} lets anybody run code (status {status} without a token)", fix)


def _ask() -> dict[str, Any]:
    from rollcast import cluster, survey

    with cluster.session() as dashboard:
        reports = survey.ask_nodes(None, None, leftovers=True)
        here = survey.look_around("here", None, None, None)
        nodes = survey.nodes()
    return {
        "dashboard": dashboard,
        "nodes": [asdict(node) for node in nodes],
        "reports": [asdict(report) for report in reports],
        "here": asdict(here),
    }


if __name__ == "__main__":
    print(json.dumps(_ask()))
