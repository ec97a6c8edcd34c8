"""What is shipped with a job, how a run is found among jobs, and what is told of it. No cluster is needed here."""

import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from rollcast import cli, doctor_cluster, jobs
from rollcast.config import RunConfig
from rollcast.errors import ConfigError, UsageError
from rollcast.job_verbs import refuse_local_paths
from rollcast.jobs import EXCLUDED, STOP_WAIT, STOP_WAIT_S, Shipment, address_from, exit_code, job_of, run_of
from rollcast.plan import Process
from rollcast.preflight import Node, NodeReport, device_problems, refuse
from rollcast.rundir import RunDir
from rollcast.submitted import CODE, SOURCES, digest_of, imported

ROOT = Path(__file__).resolve().parents[2]


def details(**changes: object) -> JobDetails:
    known: dict[str, object] = {
        "type": JobType.SUBMISSION,
        "submission_id": "mine-1",
        "status": JobStatus.SUCCEEDED,
        "entrypoint": "python3 -m rollcast train a.toml --run mine --run.dir /data",
        "start_time": 1500,
        "driver_exit_code": 0,
    }
    return JobDetails(**(known | changes))


# ---- what is shipped


def test_the_packages_that_run_here_are_shipped_with_their_digest(tmp_path: Path) -> None:
    made = Shipment(tmp_path, {"pip": ["x"], "env_vars": {"A": "1"}, "excludes": ["/big"]}, "/opt/python").environment()
    assert [Path(module).name for module in made["py_modules"]] == [*SOURCES]
    assert made["env_vars"] == {
        "A": "1",
        STOP_WAIT: str(STOP_WAIT_S),
        "ROLLCAST_PYTHON": "/opt/python",
        CODE: digest_of(imported()),
    }
    assert made["working_dir"] == str(tmp_path) and made["pip"] == ["x"]
    assert {"/.git", "/models", "/runs", "/big"} <= set(made["excludes"])
    assert "working_dir" not in Shipment(None).environment()


def test_the_file_for_rays_own_command_says_the_same() -> None:
    found = jobs.read_runtime_env(ROOT / "deploy" / "runtime_env.yaml")
    assert tuple(found["excludes"]) == EXCLUDED
    assert found["env_vars"] == {"PYTHONPATH": ":".join(("services", "learners", "envs")), STOP_WAIT: str(STOP_WAIT_S)}


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "text"])
def test_a_runtime_env_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"env\.yaml"):
        jobs.read_runtime_env(tmp_path / "env.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        jobs.read_runtime_env(tmp_path / "none.yaml")


def config(model: str, run_dir: str) -> RunConfig:
    run = {"name": "mine", "steps": 1, "dir": run_dir}
    return RunConfig.model_validate({"run": run, "model": {"path": model}, "env": [{"id": "rollcast/QA-v0"}]})


def test_folders_of_this_machine_are_refused() -> None:
    for model in ("/data/model", "org/name", "~/model"):
        refuse_local_paths(config(model, "/data/runs"))
    with pytest.raises(UsageError, match="would not outlive the job"):
        refuse_local_paths(config("/data/model", "runs"))
    for model in ("models/smollm2-135m-instruct", "./model", "model"):
        with pytest.raises(UsageError, match="is a folder of this machine"):
            refuse_local_paths(config(model, "/data/runs"))


# ---- runs among jobs


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("python3 -m rollcast train a/b.toml", "b"),
        ("python -m rollcast train a.toml --run mine --restarts 3", "mine"),
        ("/opt/python -m rollcast sft a.toml --run.name=warm", "warm"),
        ("rollcast train a.toml --run=mine", "mine"),
        ("python3 -m rollcast status mine", None),
        ("python3 train.py a.toml", None),
        ("echo 'unclosed", None),
    ],
)
def test_a_run_is_known_by_the_command_that_starts_it(command: str, run: str | None) -> None:
    found = job_of(details(entrypoint=command))
    assert (found.run if found is not None else None) == run
    assert run_of(command.split()) == run


def test_what_a_job_says_of_itself_comes_first() -> None:
    said = {jobs.RUN: "named", jobs.RUN_DIR: "/elsewhere", jobs.INTERPRETER: "/opt/python"}
    found = job_of(details(metadata=said, runtime_env={"env_vars": {STOP_WAIT: "600"}}))
    assert found is not None
    assert (found.run, found.run_dir, found.python, found.started) == ("named", "/elsewhere", "/opt/python", 1.5)
    assert found.saves_when_stopped and found.over
    plain = job_of(details())
    assert plain is not None and (plain.run_dir, plain.python) == ("/data", "python3")
    assert not plain.saves_when_stopped
    assert job_of(details(submission_id=None)) is None, "a driver that was not submitted"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 0)],
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    found = job_of(details(status=JobStatus(status), driver_exit_code=code))
    assert found is not None and exit_code(found) == expected


def test_rays_own_words_in_a_log_are_left_out() -> None:
    log = "INFO Runtime env is setting up.\nRunning entrypoint for job mine-1: python3 -m rollcast\nstep 1\nstep 2\n"
    assert jobs.said_by_command("mine-1", log) == "step 1\nstep 2\n"
    assert jobs.said_by_command("mine-1", "it never began\n") == "it never began\n"


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
        ({"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_API_SERVER_ADDRESS": "https://ray.example"}, "https://ray.example"),
    ],
)
def test_where_jobs_go_without_an_address(environ: dict[str, str], address: str) -> None:
    assert address_from(environ) == address


def test_the_refusal_in_the_documentation_is_the_one_that_is_told() -> None:
    processes = [Process("learner", 1, 1, 1, ""), Process("rollout worker", 2, 1, 1, "")]
    with pytest.raises(ConfigError) as caught:
        refuse(device_problems(processes, [Node("10.0.0.1", 8, 2)]))
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [f"{caught.value}\n"]


# ---- logs of this machine


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that goes on: its owner is this process's parent, which lives as long as the test."""
    folder = RunDir(tmp_path / "runs" / "mine")
    folder.create()
    owner = psutil.Process(os.getppid())
    record = {"name": "mine", "pid": owner.pid, "process_started": owner.create_time(), "host": socket.gethostname()}
    folder.run_json.write_text(json.dumps(record))
    (folder.logs / "trainer.log").write_text("step 1\n")
    return folder


def logs(run: RunDir, *words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["logs", "mine", "--run.dir", str(run.path.parent), *words])
    assert not caught.value.code


def test_logs_are_read_from_the_run_folder(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    logs(run)
    assert capsys.readouterr().out == "step 1\n"
    (run.logs / "engine.log").write_text("ready\n")
    logs(run)
    assert capsys.readouterr().out == "==> engine.log\nready\n==> trainer.log\nstep 1\n"


def test_logs_are_followed_until_the_run_ends(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def go_on() -> None:
        for step in (2, 3):
            time.sleep(0.4)
            with (run.logs / "trainer.log").open("a") as log:
                log.write(f"step {step}\n")
        run.run_json.write_text(run.run_json.read_text().replace('"pid": ', '"pid": 9'))

    thread = threading.Thread(target=go_on)
    thread.start()
    logs(run, "--follow")
    thread.join()
    assert capsys.readouterr().out == "step 1\nstep 2\nstep 3\n"


# ---- doctor


def test_doctor_judges_what_the_nodes_say() -> None:
    here = NodeReport("here", python="3.11.7", ray="2.60.0", code="a" * 64, free_shared_memory=8 << 30)
    nodes = [Node("10.0.0.1", 4, 0), Node("10.0.0.2", 8, 1)]
    well = doctor_cluster.judge(nodes, [here], here)
    assert [(it.name, it.state) for it in well] == [
        ("nodes", "ok"),
        ("nodes agree", "ok"),
        ("shared memory of nodes", "ok"),
    ]
    other = NodeReport(
        "10.0.0.2",
        python="3.12.0",
        ray="2.60.0",
        code="a" * 64,
        leftovers=("/dev/shm/rollcast-x",),
        free_shared_memory=1,
    )
    ill = [*doctor_cluster.judge(nodes, [here, other, NodeReport("10.0.0.3", silent="no answer")], here)]
    assert [it.state for it in ill] == ["ok", "fail", "fail", "warn", "warn"]
    assert "10.0.0.3: no answer" in ill[1].found and "10.0.0.2 has 3.12.0" in ill[2].found
    assert "/dev/shm/rollcast-x" in ill[4].found and all(it.do_this for it in ill[1:])


def test_doctor_says_when_a_cluster_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (found,) = doctor_cluster.examine("127.0.0.1:1", limit_s=2)
    assert found.state == "fail" and "127.0.0.1:1 cannot be asked" in found.found


def test_yaml_is_read_without_making_objects(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(UsageError, match="cannot be read"):
        jobs.read_runtime_env(tmp_path / "env.yaml")
