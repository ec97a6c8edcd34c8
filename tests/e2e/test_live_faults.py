"""A run that is served while it trains, and everything in it killed in turn: it answers on, and goes on learning."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from live_run import GROUPS, SLOW, LiveRun
from live_server import Crowd, free_port, is_up
from ray_nodes import ROOT, SOURCES, Nodes, nodes
from rollcast import metrics
from run_checks import assert_nothing_lost, wait_for

GENEROUS = ("requests_per_s=1e6", "burst=1000000", "tokens_per_minute=1000000000")


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes(num_cpus=4) as cluster:
        yield cluster


def killed(cluster: Nodes, title: str) -> psutil.Process:
    victim = cluster.processes(title)[0]
    victim.kill()
    wait_for(lambda: not victim.is_running(), 10)
    return victim


def is_left_served(run: LiveRun, url: str, version: int) -> None:
    """By the training that has ended, and by `rollcast serve --detach`, until somebody takes it off."""

    def told() -> int:
        return int(httpx.get(f"{url}/v1/policy", timeout=30).json()["policy_version"])

    wait_for(lambda: told() == version, 30)
    for last in (False, True):
        code, said = run.asks("serve", "--stop")
        assert code == 0 and "not served any more" in said, said
        wait_for(lambda: not is_up(url), 30)
        code, said = run.asks("serve", "--stop")
        assert code == 2 and "Applications there: none" in said, said
        if not last:
            code, said = run.asks("serve", "--detach")
            assert code == 0 and f"answers at {url}/v1" in said, said
            assert told() == version


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_whatever_is_killed_the_policy_answers_on_and_learns_on(cluster: Nodes, tmp_path: Path, tiny_bf16: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    served = ("--serve.enabled", "true", "--serve.port", str(port), "--serve.min_replicas", "2")
    limits = [f"--serve.{'cpus_per_replica=0' if limit is None else f'limits.{limit}'}" for limit in (None, *GENEROUS)]
    words = (*SLOW, "--env.0.kwargs.seconds", "0.1", "--rollout.workers", "2", "--learner.num_learners", "1")
    started: list[LiveRun] = []

    def start() -> LiveRun:
        every = ("--checkpoint.every", "2")
        started.append(LiveRun(cluster.environment, tmp_path, "served", tiny_bf16, *words, *served, *limits, *every))
        return started[-1]

    def version() -> int:
        return int(httpx.get(f"{url}/v1/policy", timeout=30).json()["policy_version"])

    def grows(above: int, seconds: float = 90) -> None:
        wait_for(lambda: version() > above + 1, seconds)

    def row(name: str) -> float:
        return float(metrics.read(run.folder.metrics)[-1].get(name, 0.0))

    def answers_while(fault: Callable[[], None]) -> int:
        """How many questions got no answer meanwhile."""
        before, answered = sum(crowd.codes.values()) - crowd.codes[200], crowd.codes[200]
        fault()
        grows(version())
        assert crowd.codes[200] > answered
        return sum(crowd.codes.values()) - crowd.codes[200] - before

    run = start()
    try:
        run.waits_until(lambda: is_up(url), 120)
        grows(version())
        with Crowd(url, 4) as crowd:
            assert answers_while(lambda: killed(cluster, "ray::RolloutRunner") and None) == 0
            wait_for(lambda: row("fleet/restarts") == 1 and row("fleet/workers") == 2, 90)
            assert answers_while(lambda: killed(cluster, "ray::_WrappedExecutable") and None) == 0
            wait_for(lambda: row("learner/restarts") == 1, 90)
            lost = answers_while(lambda: killed(cluster, "ray::ServeReplica") and None)
            assert lost <= 4, "those that it was answering"
            wait_for(lambda: len(cluster.processes("ray::ServeReplica")) == 2, 90)

            run.trainer.kill()
            run.trainer.wait()
            last, answered = version(), crowd.codes[200]
            failed = sum(crowd.codes.values()) - crowd.codes[200]
            wait_for(lambda: crowd.codes[200] > answered + 100, 60)
            assert version() == last, "nobody publishes any more"
            run = start()
            grows(last, 180)
            assert sum(crowd.codes.values()) - crowd.codes[200] == failed, crowd.codes
        for spans in crowd.told:
            assert spans[0]["start"] == 0
            assert all(a["end"] == b["start"] and a["version"] < b["version"] for a, b in pairwise(spans))
        code, said = run.asks("stop")
        assert code == 0, said
        assert run.trainer.wait(60) == 0
        rows = metrics.read(run.folder.metrics)
        assert_nothing_lost(run.folder, rows[-1]["step"], GROUPS)
        versions = [each["policy_version"] for each in rows]
        assert versions == sorted(set(versions)), "no number means two policies"
        is_left_served(run, url, rows[-1]["policy_version"])
        print(f"{crowd.codes[200]} answers, {lost} lost with the killed replica; {rows[-1]['step']} steps")
    finally:
        for each in started:
            each.close()


@pytest.mark.soak
def test_a_run_of_this_machine_is_served_while_it_trains_and_when_it_has_ended(tmp_path: Path, tiny_bf16: str) -> None:
    """`rollcast serve RUN` joins the run's own cluster, and goes on with one of its own at the same address."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "serve.log"
    run = LiveRun(alone(), tmp_path, "mine", tiny_bf16, *SLOW, "--env.0.kwargs.seconds", "0.1")
    served = ("--serve.port", str(port), "--serve.cpus_per_replica", "0")
    words = [sys.executable, "-m", "rollcast", "serve", str(run.folder.path), *served]

    def told() -> int:
        return int(httpx.get(f"{url}/v1/policy", timeout=30).json()["policy_version"])

    try:
        run.waits_until(lambda: len(metrics.read(run.folder.metrics)) > 1, 120)
        with log.open("w") as output:
            server = subprocess.Popen(words, env=alone(), stdout=output, stderr=output)
        wait_for(lambda: "answers at" in log.read_text() or server.poll() is not None, 90)
        assert server.poll() is None, log.read_text()
        first = told()
        wait_for(lambda: told() > first + 2, 60)
        code, said = run.asks("stop")
        assert code == 0, said
        last = metrics.read(run.folder.metrics)[-1]["policy_version"]
        wait_for(lambda: log.read_text().count("answers at") == 2, 90)
        assert "is served on from its folder" in log.read_text() and told() == last
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, log.read_text()
    finally:
        run.close()
        server.kill()
        server.wait()


def alone() -> dict[str, str]:
    """The environment of somebody who has no cluster."""
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return others | {"PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in SOURCES)}
