"""A Ray cluster of several nodes on this machine, in a process of its own, so that the session's cluster is left alone.

Owns: that process, its token, and nodes that come and go. Run as a program it is the process; `Nodes` talks to it in
lines of JSON. Does not know what runs on the cluster.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from net_spaces import Network

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("services", "learners", "envs", "tests")
REPLY = "nodes: "


class Nodes:
    """A head, and whatever nodes are added. `environment` is for the processes that work there.

    With `apart` each added node is a host of its own in a small network (`net_spaces.py`).
    """

    def __init__(self, folder: str, apart: bool = False, **head: float) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **kept,
            "HOME": folder,
            "PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in SOURCES),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            # A lost node is noticed in seconds, as tests have no minutes.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "3",
        }
        command = [sys.executable, __file__, folder]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=self.environment, text=True, stdin=pipe, stdout=pipe)
        self.environment["RAY_ADDRESS"] = self._ask("head", apart=apart, **head)
        self.added: list[str] = []
        """Ids of the living nodes beside the head."""

    def add(self, **resources: float) -> str:
        """A new node with `num_cpus`, `num_gpus`; returns its id."""
        self.added.append(self._ask("add", **resources))
        return self.added[-1]

    def remove(self, node: str) -> None:
        """The node and all that runs there is killed."""
        self._ask("remove", node=node)
        self.added.remove(node)

    def processes(self, title: str) -> list[psutil.Process]:
        """Of the cluster, by what they call themselves, such as `ray::RolloutRunner`."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def cut(self, node: str) -> None:
        """The node goes on, and nobody hears of it: its link is down."""
        self._ask("cut", node=node)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._ask("close")
        self._process.wait(60)

    def _ask(self, what: str, **how: Any) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, how]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(REPLY):
                return line.removeprefix(REPLY).strip()
        raise AssertionError(f"the cluster's process ended with {self._process.wait()} while it was to {what}")


@contextlib.contextmanager
def nodes(apart: bool = False, **head: float) -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="rc-", dir="/tmp")  # Ray's socket names leave no room for a longer path.
    made = Nodes(folder, apart, **head)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def serve(folder: str) -> None:
    """Does what the lines of standard input say; ends with them."""
    from ray.cluster_utils import Cluster

    cluster: Any = None
    network: Network | None = None
    added: dict[str, Any] = {}
    for line in sys.stdin:
        what, how = json.loads(line)
        reply = ""
        if what == "head":
            small = {"include_dashboard": False, "object_store_memory": 128 * 2**20, "temp_dir": folder}
            if how.pop("apart"):
                network = Network()
                small["node_ip_address"] = network.address
            cluster = Cluster(initialize_head=True, head_node_args={**how, **small})
            reply = cluster.address
        elif what == "add":
            address = network.add() if network is not None else None
            with network.at(address) if network is not None and address is not None else contextlib.nullcontext():
                where = {} if address is None else {"node_ip_address": address}
                node = cluster.add_node(**how, **where, object_store_memory=128 * 2**20)
            added[node.node_id] = node
            reply = node.node_id
        elif what == "cut" and network is not None:
            network.cut(added[how["node"]].node_ip_address)
        elif what == "remove":
            cluster.remove_node(added.pop(how["node"]), allow_graceful=False)
        print(f"{REPLY}{reply}", flush=True)
        if what == "close":
            break
    if cluster is not None:
        cluster.shutdown()
    if network is not None:
        network.close()


if __name__ == "__main__":
    serve(sys.argv[1])
