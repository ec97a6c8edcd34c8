"""The commands of docker-compose.yml, run as processes: head, worker, health checks, discovery, and figures on the way
to Prometheus. Only ports, folders and names of hosts differ. Everything is ended by its process id.
"""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployment import ROOT, compose, documents
from rollcast import metrics

SERVICES = compose()["services"]
BIN = Path(sys.executable).parent
REPORT_MS = 1000
"""Ray's own default of ten seconds would make the test a minute longer."""
PUBLISHER = """
import sys, time, ray
from rollcast.telemetry import Telemetry
ray.init(address="auto", logging_level="ERROR")
telemetry = Telemetry("deployed")
telemetry.publish({"step": 3, "reward/mean": 0.25})
telemetry.publish({"step": 4, "eval/QA-v0/f1": 0.5})
print("published", flush=True)
sys.stdin.readline()
telemetry.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. They lie below those that the system hands out, so that nobody gets them soon."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


@dataclass
class Node:
    """A service of the compose file as a process of this machine."""

    process: subprocess.Popen[str]
    ports: dict[str, int]
    log: Path


@dataclass
class Deployed:
    """A cluster made of the compose file's own commands."""

    folder: Path
    token_file: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        service = SERVICES["head"]["environment"]
        assert service["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        sources = os.pathsep.join(str(ROOT / source) for source in ("services", "learners", "envs"))
        return {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": sources,
            "RAY_AUTH_MODE": service["RAY_AUTH_MODE"],
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_metrics_report_interval_ms": str(REPORT_MS),
        }

    def words(self, command: Sequence[str], ports: Mapping[str, int]) -> list[str]:
        """A command of the file, for this machine."""
        head = f"127.0.0.1:{self.nodes['head'].ports['port'] if 'head' in self.nodes else ports['port']}"
        words = [word.replace("head:6379", head).replace("0.0.0.0", "127.0.0.1") for word in command]
        words = [word.replace(":52365/", f":{ports['dashboard-agent-listen-port']}/") for word in words]
        for name, port in ports.items():
            words = [f"--{name}={port}" if word.startswith(f"--{name}=") else word for word in words]
        return [f"--temp-dir={self.folder}" if word.startswith("--temp-dir=") else word for word in words]

    def start(self, name: str) -> None:
        """Starts a service's command. Ports that containers have each for themselves get an option."""
        head = name == "head"
        names = ["dashboard-agent-listen-port", "metrics-export-port"]
        names += ["port", "dashboard-port", "ray-client-server-port"] if head else []
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        words = self.words(SERVICES[name]["command"], ports)
        asked = {word.partition("=")[0].removeprefix("--") for word in words}
        words += [f"--{extra}={port}" for extra, port in ports.items() if extra not in asked]
        if not head:  # A worker takes the folder from the head, and Ray says so.
            words = [word for word in words if not word.startswith("--temp-dir=")]
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(words, env=self.environment, stdout=file, stderr=file, text=True)
        self.nodes[name] = Node(process, ports, log)

    def healthy(self, name: str, **changed: str) -> bool:
        """Whether the service's own health check passes."""
        check = SERVICES[name]["healthcheck"]["test"]
        assert check[0] == "CMD"
        words = self.words(check[1:], self.nodes[name].ports)
        environment = {**self.environment, **changed}
        return subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        node = self.nodes[name]
        wait_for(f"{name} to be healthy", 90, lambda: node.process.poll() is not None or self.healthy(name))
        assert node.process.poll() is None, node.log.read_text()

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.nodes['head'].ports[port]}"

    def close(self) -> None:
        for node in reversed(self.nodes.values()):
            end(node.process.pid)
        shutil.rmtree(self.folder, ignore_errors=True)


def end(pid: int) -> None:
    """Ends a process of ours and all that came of it."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    root.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


def wait_for(what: str, seconds: float, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.3)
    return value


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))  # Ray's socket names leave no room for a longer path.
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32) + "\n")  # As `openssl rand -hex 32 > FILE` writes it.
    cluster = Deployed(folder, token)
    try:
        cluster.start("head")
        cluster.wait_until_healthy("head")
        cluster.start("rollout")
        cluster.wait_until_healthy("rollout")
        yield cluster
    finally:
        cluster.close()


def test_a_head_without_a_token_does_not_start(tmp_path: Path) -> None:
    environment = Deployed(tmp_path, tmp_path / "missing").environment
    done = subprocess.run(
        ["ray", "start", "--head", "--block"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "RAY_AUTH_TOKEN_PATH" in done.stdout + done.stderr


def test_health_needs_the_right_token(deployed: Deployed) -> None:
    assert deployed.healthy("head")
    wrong = deployed.folder / "wrong"
    wrong.write_text("0" * 64)
    assert not deployed.healthy("head", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert not deployed.healthy("head", RAY_AUTH_MODE="disabled")


def test_the_head_computes_nothing_and_the_worker_what_the_file_says(deployed: Deployed) -> None:
    headers = {"Authorization": f"Bearer {deployed.token_file.read_text().strip()}"}

    def cpus() -> dict[bool, float]:
        answer = httpx.get(f"{deployed.url('dashboard-port')}/api/v0/nodes?detail=1", headers=headers).json()
        rows = answer["data"]["result"]["result"]
        return {row["is_head_node"]: row["resources_total"].get("CPU", 0) for row in rows if row["state"] == "ALIVE"}

    assert wait_for("both nodes", 20, lambda: len(found := cpus()) == 2 and found) == {True: 0, False: 2}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)])
def test_ray_answers_nobody_without_the_token(deployed: Deployed, token: str | None, status: int) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    for path in ("/api/prometheus/sd", "/api/jobs/", "/nodes?view=summary"):
        assert httpx.get(deployed.url("dashboard-port") + path, headers=headers).status_code == status, path


def scraped(deployed: Deployed) -> dict[str, tuple[float, dict[str, str]]]:
    """Our series, as Prometheus gets them: asks the head which nodes there are, then each of them."""
    ((config,),) = [document["scrape_configs"] for document in documents(ROOT / "deploy/prometheus/prometheus.yml")]
    url = config["http_sd_configs"][0]["url"].replace("http://head:8265", deployed.url("dashboard-port"))
    token = deployed.token_file.read_text().strip()  # So does Prometheus with a credentials_file.
    (group,) = httpx.get(url, headers={"Authorization": f"Bearer {token}"}).raise_for_status().json()
    found: dict[str, tuple[float, dict[str, str]]] = {}
    for target in group["targets"]:
        try:
            text = httpx.get(f"http://{target}/metrics").raise_for_status().text
        except httpx.ConnectError:  # A target that is not up yet; Prometheus tries again too.
            continue
        families = text_string_to_metric_families(text)
        found |= {s.name: (s.value, s.labels) for f in families for s in f.samples if "rollcast" in s.name}
    return found


def test_figures_reach_prometheus_and_stay_while_the_run_lives(deployed: Deployed) -> None:
    """Ray forgets a gauge that nobody sets for two report intervals, and a step may take longer."""
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        env={**deployed.environment, "RAY_ADDRESS": f"127.0.0.1:{deployed.nodes['head'].ports['port']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        try:
            assert driver.stdout.readline() == "published\n"
            wait_for("the figures", 30, lambda: "ray_rollcast_eval" in scraped(deployed))
            time.sleep(4 * REPORT_MS / 1000)
            found = scraped(deployed)
            assert {name: value for name, (value, _) in found.items()} == {
                "ray_rollcast_step": 4,
                "ray_rollcast_reward_mean": 0.25,
                "ray_rollcast_eval": 0.5,
            }
            labels = found["ray_rollcast_eval"][1]
            assert labels.items() >= {"run": "deployed", "env": "QA-v0", "metric": "f1"}.items()
            driver.stdin.write("\n")
            driver.stdin.flush()
            assert driver.stdout.readline() == "closed\n"
            wait_for("the figures to end", 30, lambda: not scraped(deployed))
        finally:
            driver.kill()


def figures_of_two_workers(seen: dict[str, Any]) -> dict[str, Any] | None:
    """Once both have started: the learner does not wait for the second."""
    return seen if seen.get("ray_rollcast_fleet_workers", (0,))[0] == 2 else None


@pytest.mark.soak
def test_the_cluster_trains_and_its_figures_are_seen(deployed: Deployed, tiny_bf16: str, tmp_path: Path) -> None:
    """The job's command of deploy/kuberay/rayjob.yaml, on the nodes of the compose file."""
    deployed.start("learner")
    deployed.wait_until_healthy("learner")
    (job,) = documents(ROOT / "deploy/kuberay/rayjob.yaml")
    python, *words = shlex.split(job["spec"]["entrypoint"])
    config = str(ROOT / "deploy" / "configs" / "cluster-scripted.toml")
    words = [config if word.startswith("/opt/rollcast/") else word for word in words]
    words += ["--model.path", tiny_bf16, "--run.dir", str(tmp_path), "--run.steps", "40"]
    environment = {**deployed.environment, "RAY_ADDRESS": f"127.0.0.1:{deployed.nodes['head'].ports['port']}"}
    assert python == "python"
    with (tmp_path / "train.log").open("w") as log:
        run = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
    try:
        found = wait_for("figures of a step", 180, lambda: figures_of_two_workers(scraped(deployed)))
        assert "ray_rollcast_reward_mean" in found
        assert {labels["run"] for _, labels in found.values()} == {"cluster-scripted"}
        assert run.wait(300) == 0, (tmp_path / "train.log").read_text()
    finally:
        end(run.pid)
    assert metrics.read(tmp_path / "cluster-scripted" / "metrics.jsonl")[-1]["step"] == 40


def test_a_node_that_goes_is_no_longer_asked_for_figures(deployed: Deployed) -> None:
    """The last test here: it ends the worker as Docker does, with SIGTERM."""
    token = deployed.token_file.read_text().strip()

    def ports() -> set[int]:
        url = f"{deployed.url('dashboard-port')}/api/prometheus/sd"
        (group,) = httpx.get(url, headers={"Authorization": f"Bearer {token}"}).raise_for_status().json()
        return {int(target.rpartition(":")[2]) for target in group["targets"]}

    worker = deployed.nodes["rollout"]
    port = worker.ports["metrics-export-port"]
    wait_for("the worker among the targets", 20, lambda: port in ports())
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) is not None
    wait_for("the worker to be gone", 40, lambda: port not in ports())
    assert deployed.healthy("head")
