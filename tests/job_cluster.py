"""A Ray cluster of its own with a dashboard, as somebody would start one for jobs: `ray start --head`.

Owns: starting it on ports that are free, with a folder and an environment of its own, and ending exactly its processes.
Does not know what is submitted to it.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests


@dataclass(frozen=True)
class JobCluster:
    """A running head node."""

    url: str
    """Of its dashboard."""
    address: str
    token: str
    process: psutil.Process
    """The command `ray start`; everything of the cluster is below it."""

    def environment(self) -> dict[str, str]:
        """Of somebody outside who may use the cluster."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**others, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}

    def processes(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)


@contextmanager
def job_cluster(cpus: int = 4, environment: Mapping[str, str] | None = None) -> Iterator[JobCluster]:
    """A head node of `cpus` CPUs without GPUs; `environment` is added to that of its processes."""
    # Ray reads the token once in a process: where this one has a token already, it is the cluster's too.
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    folder = tempfile.mkdtemp(prefix="rcj-", dir="/tmp")  # Ray's socket names leave no room for a longer path.
    port, dashboard, *others = free_ports(7)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    for name in (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "metrics-export",
        "ray-client-server",
        "node-manager",
    ):
        command.append(f"--{name}-port={others.pop()}")
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}", "--num-gpus=0"]
    command.append(f"--object-store-memory={128 * 1024 * 1024}")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}
    log = Path(folder) / "start.log"
    with log.open("wb") as output:
        started = subprocess.Popen(command, env=outside | own, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{dashboard}"
    found = JobCluster(url, f"127.0.0.1:{port}", token, psutil.Process(started.pid))
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(_end, found, started)
        _wait_for_agent(found, log)
        yield found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, as the system gives them."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for it in sockets:
            it.bind(("127.0.0.1", 0))
        return [it.getsockname()[1] for it in sockets]


def _wait_for_agent(cluster: JobCluster, log: Path) -> None:
    """Until the dashboard lists jobs."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert cluster.process.is_running(), log.read_text()
        try:
            if requests.get(f"{cluster.url}/api/jobs/", headers=headers, timeout=5).status_code == 200:
                return
        except requests.exceptions.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the cluster did not start: {log.read_text()}")


def _end(cluster: JobCluster, started: "subprocess.Popen[bytes]") -> None:
    """`ray start --block` ends what it started when it is asked to end; whatever stays is ended by its pid."""
    left = cluster.processes()
    started.terminate()
    try:
        started.wait(20)
    except subprocess.TimeoutExpired:
        started.kill()
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        process.kill()
