"""Many jobs in a row, and one with a real engine: what the suite shows with two and with the scripted engine."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job_cluster import JobCluster, assert_nothing_left, job_cluster, stale_rollcast, write_config
from rollcast import metrics
from rollcast.rundir import RunDir
from run_checks import wait_for

JOBS = 20
pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    stale = stale_rollcast(tmp_path_factory.mktemp("stale"))
    with job_cluster(environment={"PYTHONPATH": str(stale)}) as started:
        yield started


@pytest.fixture
def project(tmp_path: Path, tiny_bf16: str) -> Path:
    write_config(tmp_path / "tiny.toml", tiny_bf16, tmp_path / "data")
    return tmp_path


def test_twenty_jobs_in_a_row_leave_nothing(cluster: JobCluster, project: Path) -> None:
    processes: list[int] = []
    for number in range(JOBS):
        started = time.monotonic()
        words = ["--run", f"soak-{number}", "--run.steps", "2", "--learner.num_learners", str(number % 2), "--follow"]
        done = cluster.rollcast(project, "submit", "tiny.toml", *words, "--address", cluster.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert metrics.read(RunDir(project / "data" / f"soak-{number}").metrics)[-1]["step"] == 2
        assert_nothing_left(cluster, [f"soak-{number}"])
        processes.append(len(cluster.processes()))
        print(f"job {number}: {time.monotonic() - started:.1f} s, {processes[-1]} processes of the cluster")
    assert_nothing_left(cluster, [f"soak-{number}" for number in range(JOBS)])
    assert max(processes[JOBS // 2 :]) <= max(processes[: JOBS // 2]) + 1, "idle processes of Ray do not grow either"


@pytest.mark.vllm
def test_shipped_code_updates_a_real_engine_without_the_entry_point(cluster: JobCluster, project: Path) -> None:
    """vLLM is told to load no plugin, as where no metadata of rollcast is installed beside the shipped code."""
    (project / "env.yaml").write_text("env_vars: {VLLM_PLUGINS: '', VLLM_CPU_KVCACHE_SPACE: '1'}\n")
    words = ["--run", "engine", "--run.steps", "3", "--rollout.engine", "vllm", "--rollout.max_model_len", "384"]
    words += ["--runtime-env", "env.yaml", "--eval.every", "0", "--address", cluster.url, "--follow"]
    done = cluster.rollcast(project, "submit", "tiny.toml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics.read(RunDir(project / "data" / "engine").metrics)
    assert rows[-1]["step"] == 3 and rows[-1]["sync/load_s"] > 0
    assert_nothing_left(cluster, ["engine"])


def test_a_run_is_scaled_paused_and_resumed_from_outside(cluster: JobCluster, project: Path) -> None:
    """By somebody who sees neither its folder nor its actors: each wish is a small job."""
    words = ["--run", "steered", "--run.steps", "100000", "--eval.every", "0", "--address", cluster.url]
    done = cluster.rollcast(project, "submit", "tiny.toml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunDir(project / "data" / "steered")

    def asks(*words: str) -> str:
        asked = cluster.rollcast(project, *words, "--address", cluster.url)
        assert asked.returncode == 0, asked.stdout + asked.stderr
        return asked.stdout

    def last(name: str) -> float:
        rows = metrics.read(folder.metrics)
        return float(rows[-1].get(name, 0.0)) if rows else -1.0

    wait_for(lambda: last("step") >= 1, 120)
    asks("scale", "steered", "2")
    wait_for(lambda: last("fleet/workers") == 2, 60)
    asks("pause", "steered")
    assert json.loads(asks("status", "steered", "--json"))["waiting_for"] == "to be resumed"
    step = last("step")
    asks("resume", "steered")
    wait_for(lambda: last("step") >= step + 2, 60)
    refused = cluster.rollcast(project, "scale", "steered", "99", "--address", cluster.url)
    assert refused.returncode == 2 and "Possible are 0 to" in " ".join(refused.stderr.split()), refused.stderr
    assert "stopped" in asks("stop", "steered")
    assert_nothing_left(cluster, ["steered"])
