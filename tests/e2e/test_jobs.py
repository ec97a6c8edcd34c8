"""Runs submitted from outside to a cluster with a dashboard and a token, by the very commands that docs/jobs.md names.

The cluster is this module's own. An older rollcast lies on its Python path, as a stale wheel in an image would: whoever
imports it ends with exit code 66.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.util.state import list_actors

from job_cluster import JobCluster, free_ports, job_cluster
from rollcast import checkpoint, cli, metrics
from rollcast.jobs import Jobs
from rollcast.rundir import RunDir
from rollcast.submitted import SOURCES as CODE

ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = ROOT / "deploy" / "configs" / "scripted.toml"
SOURCES = os.pathsep.join(str(ROOT / source) for source in ("services", "learners", "envs"))
STALE = 66
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    stale = tmp_path_factory.mktemp("stale")
    for name in ("rollcast", "rollcast_learners", "rollcast_envs"):
        (stale / name).mkdir()
        (stale / name / "__init__.py").write_text(f"raise SystemExit({STALE})\n")
    with job_cluster(environment={"PYTHONPATH": str(stale)}) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a cluster's nodes share: the folder of all runs lies here."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_bf16: str) -> Path:
    """Somebody's folder: a configuration, and what must not be shipped."""
    folder = tmp_path_factory.mktemp("project")
    text = SCRIPTED.read_text().replace("models/smollm2-135m-instruct", tiny_bf16)
    (folder / "tiny.toml").write_text(text.replace("[run]", f'[run]\ndir = "{data}/runs"'))
    for name in (".venv", "models", "runs"):
        (folder / name).mkdir()
        (folder / name / "large.bin").write_bytes(os.urandom(1 << 20))
    return folder


def rollcast(cluster: JobCluster, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """The command, typed outside of the cluster by somebody who has its token."""
    command = [sys.executable, "-m", "rollcast", *words]
    environ = cluster.environment() | {"PYTHONPATH": SOURCES}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def followed(cluster: JobCluster, project: Path) -> "subprocess.CompletedProcess[str]":
    """One run, submitted and seen through to its end."""
    words = ["tiny.toml", "--run", "first", "--run.steps", "2", "--address", cluster.url, "--follow"]
    return rollcast(cluster, project, "submit", *words)


def test_a_submitted_run_is_followed_to_its_end(
    followed: "subprocess.CompletedProcess[str]", data: Path, cluster: JobCluster
) -> None:
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "step    2/2" in followed.stdout and "Running entrypoint" not in followed.stdout
    folder = RunDir(data / "runs" / "first")
    assert metrics.read(folder.metrics)[-1]["step"] == 2
    assert checkpoint.newest(folder.checkpoints, print) is not None
    assert json.loads(folder.run_json.read_text())["address"].endswith(cluster.address.rpartition(":")[2])


def test_it_is_listed_told_and_heard_from_outside(
    followed: "subprocess.CompletedProcess[str]", cluster: JobCluster, project: Path
) -> None:
    at = ("--address", cluster.url)
    (listed,) = json.loads(rollcast(cluster, project, "runs", *at, "--json").stdout)
    assert (listed["run"], listed["status"], listed["exit_code"]) == ("first", "SUCCEEDED", 0)
    told = rollcast(cluster, project, "status", "first", *at, "--json")
    assert told.returncode == 0, told.stdout + told.stderr
    assert (json.loads(told.stdout)["state"], json.loads(told.stdout)["step"]) == ("finished", 2)
    heard = rollcast(cluster, project, "logs", "first", *at)
    assert heard.stdout.strip() == followed.stdout.strip()


def test_its_exit_code_comes_through(cluster: JobCluster, project: Path) -> None:
    """What only the cluster can find out: a run folder that cannot be written there."""
    words = ["tiny.toml", "--run", "unwritable", "--run.dir", "/dev/null/runs", "--address", cluster.url, "--follow"]
    done = rollcast(cluster, project, "submit", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run.dir: '/dev/null/runs/unwritable' cannot be written" in done.stdout and "Traceback" not in done.stdout


def test_a_plain_job_restarts_after_a_crash_and_saves_when_it_is_stopped(
    cluster: JobCluster, data: Path, tiny_bf16: str
) -> None:
    """By Ray's own command, as the house plan has it; the trainer is killed once."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--submission-id", "plain"]
    words += ["--address", cluster.url, "--working-dir", ".", "--runtime-env", "deploy/runtime_env.yaml", "--"]
    words += ["python3", "-m", "rollcast", "train", "deploy/configs/scripted.toml", "--run", "again"]
    words += ["--model.path", tiny_bf16, "--run.dir", str(data / "runs"), "--run.steps", "100000", "--restarts", "2"]
    words += ["--eval.every", "0", "--checkpoint.every", "1"]
    done = subprocess.run(
        words, cwd=ROOT, env=cluster.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunDir(data / "runs" / "again")
    jobs = Jobs(cluster.url)

    def steps() -> int:
        rows = metrics.read(folder.metrics)
        return rows[-1]["step"] if rows else -1

    wait_for(lambda: folder.checkpoints.exists() and steps() >= 2, 120, lambda: jobs.logs("plain"))
    killed, highest, step = json.loads(folder.run_json.read_text()), folder.high_water_mark(), steps()
    os.kill(killed["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(killed["pid"]), 20, lambda: "it lives")
    wait_for(lambda: steps() >= step + 2, 120, lambda: jobs.logs("plain"))
    assert json.loads(folder.run_json.read_text())["pid"] != killed["pid"]
    versions = [row["policy_version"] for row in metrics.read(folder.metrics)]
    assert versions == sorted(set(versions)) and versions[-1] > highest, "versions only grow"

    stopped = rollcast(cluster, ROOT, "stop", "again", "--address", cluster.url)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    job = jobs.info("plain")
    assert (job.status, job.run, job.run_dir) == ("STOPPED", "again", str(data / "runs"))
    said = jobs.logs("plain")
    assert "killed by SIGKILL; it is started again from its newest checkpoint (1 of 2)" in said
    assert said.count("resuming from") == 1 and "stopping: the run saves a checkpoint first" in said
    kept = checkpoint.newest(folder.checkpoints, print)
    assert kept is not None and kept.step == steps()


def test_the_jobs_left_nothing_behind(cluster: JobCluster) -> None:
    """The short form of the soak below, over all that ran in this module."""
    runs = {job.run for job in Jobs(cluster.url).all()}
    assert runs >= {"first", "again"}
    assert_nothing_left(cluster, runs)


# ---- refusals


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a user's mistake: three lines, exit code 2, at once."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "why: " in said and "do this: " in said, said
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learner.num_learners", "1", "--learner.gpus_per_learner", "1"], "it needs 1 GPU, the cluster has 0"),
        (["--rollout.workers", "5"], "it needs 5 CPUs, the cluster has 4"),
        (["--run.dir", "runs"], "run.dir: 'runs' would not outlive the job"),
        (["--model.path", "models"], "model.path: 'models' is a folder of this machine"),
        (["--working-dir", "models"], "tiny.toml is not shipped with the job"),
        (["--working-dir", "nowhere"], "--working-dir nowhere: there is no such folder"),
        (["--runtime-env", "tiny.toml"], "tiny.toml: "),
        (["--learner.epocs", "2"], "learner.epocs"),
    ],
)
def test_what_could_not_work_is_refused_before_anything_starts(
    cluster: JobCluster,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(project)
    before = len(Jobs(cluster.url).all())
    assert said in refused(capsys, "submit", "tiny.toml", "--run", "no", "--address", cluster.url, *words)
    assert len(Jobs(cluster.url).all()) == before


def test_what_it_would_submit_can_be_seen_first(
    cluster: JobCluster, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        cli.main(["submit", "tiny.toml", "--restarts", "3", "--address", cluster.url, "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["words"] == ["train", "tiny.toml", "--restarts", "3"]
    assert [(node["cpus"], node["gpus"]) for node in told["nodes"]] == [(4, 0)]
    assert {Path(module).name for module in told["runtime_env"]["py_modules"]} == {*CODE}


def test_an_unknown_run_is_refused_with_those_there_are(
    followed: object, cluster: JobCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("status", "logs", "stop"):
        assert "first" in refused(capsys, verb, "nobody", "--address", cluster.url)
    assert "The run first does not go on." in refused(capsys, "stop", "first", "--address", cluster.url)


def test_a_cluster_that_is_not_there_or_does_not_let_in(cluster: JobCluster, project: Path) -> None:
    (port,) = free_ports(1)
    nobody = rollcast(cluster, project, "runs", "--address", f"http://127.0.0.1:{port}")
    assert nobody.returncode == 2 and "does not answer" in nobody.stderr and "Traceback" not in nobody.stderr
    environ = cluster.environment() | {"PYTHONPATH": SOURCES, "RAY_AUTH_TOKEN": "0" * 64}
    command = [sys.executable, "-m", "rollcast", "runs", "--address", cluster.url]
    stranger = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert stranger.returncode == 2 and "does not let this user in" in stranger.stderr, stranger.stderr
    assert "Traceback" not in stranger.stderr


def test_nodes_with_another_rollcast_are_refused_by_a_plan(cluster: JobCluster, project: Path) -> None:
    """`train` on a cluster ships nothing: the nodes import what is installed there, here the stale one."""
    environ = cluster.environment() | {"PYTHONPATH": SOURCES, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "rollcast", "train", "tiny.toml", "--dry-run"]
    done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rollcast cannot be run on node" in done.stderr and "Traceback" not in done.stderr


# ---- what is shared


def wait_for(condition: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def assert_nothing_left(cluster: JobCluster, runs: Collection[str]) -> None:
    """No actor, no process that plays or learns, no shared memory of these runs."""

    def left() -> list[str]:
        actors = list_actors(cluster.url, filters=[("state", "!=", "DEAD")])
        found = [f"actor {actor.class_name} {actor.state}" for actor in actors]
        for process in cluster.processes():
            with suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline()).strip()
                if "-m rollcast" in line or (line.startswith("ray::") and line not in RAYS_OWN):
                    found.append(f"process {process.pid} {line}")
        return found + [str(path) for run in runs for path in Path("/dev/shm").glob(f"rollcast-{run}-*")]

    wait_for(lambda: not left(), 30, lambda: str(left()))
