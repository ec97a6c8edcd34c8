"""Faults: each test shows that the fault happened, that nothing was lost or trained twice, and that the run went on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rollcast import checkpoint, metrics
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import RunFailed
from rollcast.run import Run
from rollcast.rundir import RunDir
from rollcast.train import train
from run_checks import assert_nothing_lost, beside, wait_for

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


def config_for(folder: Path, model: str, *overrides: str) -> RunConfig:
    return load_config(SCRIPTED, [f"--model.path={model}", f"--run.dir={folder}", "--eval.every=0", *overrides])


def run_with(config: RunConfig, fault: Callable[[Run], None]) -> tuple[RunDir, int]:
    """Runs until `fault`, which strikes beside it once the first step is done, has seen enough. Returns the steps."""

    def strike(run: Run) -> None:
        wait_for(lambda: run.step >= 1, 60)
        fault(run)

    run = beside(config, strike)
    return run.folder, run.step


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_its_leases_return(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    def fault(run: Run) -> None:
        pid = run.fleet.pids()[0]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(pid), 10)
        wait_for(lambda: run.fleet.restarts == 1 and run.fleet.ready() == 2, 90)
        assert run.fleet.workers == [1, 2], "worker 0 is gone for good"
        step = run.step
        wait_for(lambda: run.step >= step + 3, 60)

    endless = ("--rollout.workers=2", "--run.steps=100000", "--run.name=kill")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *endless), fault)
    assert_nothing_lost(folder, steps, 2)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
def test_a_worker_whose_engine_died_is_replaced(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    def fault(run: Run) -> None:
        worker = psutil.Process(run.fleet.pids()[0])
        core = next(p for p in worker.children(recursive=True) if "EngineCore" in p.name() + " ".join(p.cmdline()))
        core.kill()
        wait_for(lambda: not worker.is_running(), 30)
        wait_for(lambda: run.fleet.restarts == 1 and run.fleet.ready() == 1, 180)
        step = run.step
        wait_for(lambda: run.step >= step + 2, 60)

    endless = ("--rollout.engine=vllm", "--rollout.max_model_len=384", "--run.steps=100000", "--run.name=engine")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *endless), fault)
    assert_nothing_lost(folder, steps, 2)
    assert not list(Path("/dev/shm").glob("rollcast-engine-*"))


@pytest.mark.ray
def test_a_late_result_is_refused(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    folder = RunDir(tmp_path / "late")

    def fault(run: Run) -> None:
        wait_for(lambda: run.fleet.ready() == 2, 60)  # A step may have been made before the second one had started.
        pid = run.fleet.pids()[1]
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 10)
        wait_for(lambda: run.ledger.leased_to(1) > 0, 10)
        wait_for(lambda: run.ledger.leased_to(1) == 0, 20)
        step = run.step
        wait_for(lambda: run.step >= step + 2, 60)
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: run.ledger.refused > 0, 20)

    endless = ("--rollout.workers=2", "--rollout.lease_s=3", "--run.steps=100000", "--run.name=late")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *endless), fault)
    events = assert_nothing_lost(folder, steps, 2)
    assert events["refused"] >= 1 and events["return"] >= 1


# ---- dead learners


BUSY = "the learner"
"""What the trainer waits for during a learning step, as its status says."""


def waits_for(run: Run, activity: str) -> bool:
    return bool(json.loads(run.progress.status_file.read_text())["waiting_for"] == activity)


def learners_of(run: Run, count: int = 1) -> list[psutil.Process]:
    """The processes of its learners, each on its own."""
    learners = [psutil.Process(pid) for pid in run.learners.pids]
    assert len(learners) == count and os.getpid() not in run.learners.pids
    return learners


def kill_in_a_step(run: Run, learner: psutil.Process) -> None:
    """Kills it in the middle of a learning step."""
    wait_for(lambda: waits_for(run, BUSY), 60)
    time.sleep(0.2)
    learner.kill()
    wait_for(lambda: not learner.is_running(), 10)


def wait_for_restart(run: Run, number: int) -> None:
    """The death must be noticed soon; how long new learners take to start is another matter."""
    wait_for(lambda: waits_for(run, "the learner to start") or run.learner_restarts == number, 15)
    wait_for(lambda: run.learner_restarts == number, 120)


def assert_recovered(folder: RunDir, steps: int, restarts: int) -> Counter[str]:
    """Nothing lost, no number that means two policies, every row there once, and nothing left in shared memory."""
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == list(range(steps + 1)), "rows after the checkpoint were made again"
    assert rows[-1]["learner/restarts"] == restarts
    versions = [row["policy_version"] for row in rows]
    assert versions == sorted(set(versions)) and versions[-1] <= folder.high_water_mark()
    assert not list(Path("/dev/shm").glob(f"rollcast-{folder.path.name}-*"))
    return assert_nothing_lost(folder, steps, 2)


LONG_STEPS = ("--learner.epochs=20", "--run.steps=100000")
"""Long enough to be killed in the middle."""


@pytest.mark.ray
def test_a_learner_killed_in_a_step_is_replaced_from_the_newest_checkpoint(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[psutil.Process] = []

    def fault(run: Run) -> None:
        wait_for(lambda: (run.folder.checkpoints / "step_2").exists(), 60)
        workers, announced = run.fleet.pids(), run.folder.high_water_mark()
        seen.extend(learners_of(run))
        kill_in_a_step(run, seen[0])
        wait_for_restart(run, 1)
        seen.extend(learners_of(run))
        left = {path.name.split("-")[0] for path in Path(run.store.folder).glob("v*.safetensors")}
        assert min(int(version[1:]) for version in left) > announced, "what the dead learner had published is gone"
        step = run.step
        wait_for(lambda: run.step >= step + 2, 60)
        assert run.fleet.pids() == workers and run.fleet.restarts == 0, "the workers are those of before"

    one = ("--checkpoint.every=2", "--learner.num_learners=1", "--run.name=lost")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *LONG_STEPS, *one), fault)
    events = assert_recovered(folder, steps, restarts=1)
    assert events["rollback"] == 2, "one as the run started, one as it went back"
    wait_for(lambda: len({p.pid for p in seen}) == 2 and not any(p.is_running() for p in seen), 20)
    told = " ".join(capsys.readouterr().out.split())
    assert "a learner died in step" in told and "resuming from" in told and "Traceback" not in told


@pytest.mark.soak
@pytest.mark.ray
def test_before_the_first_checkpoint_a_run_begins_again_and_the_third_death_ends_it(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, killed = RunDir(tmp_path / "again"), []

    def fault(run: Run) -> None:
        for death in range(1, 4):
            killed.extend(learners_of(run))
            kill_in_a_step(run, killed[-1])
            if death < 3:
                wait_for_restart(run, death)
                wait_for(lambda: run.step >= 1, 60)
                assert metrics.read(folder.metrics)[0]["learner/restarts"] == death, "the row of step 0 is a new one"

    never = ("--checkpoint.every=100000", "--learner.num_learners=1", "--run.name=again")
    with pytest.raises(RunFailed, match="died 3 times without a new checkpoint") as failed:
        run_with(config_for(tmp_path, tiny_bf16, *LONG_STEPS, *never), fault)
    assert failed.value.exit_code == 1 and "microbatch_tokens" in failed.value.fix
    assert len({learner.pid for learner in killed}) == 3 and not any(learner.is_running() for learner in killed)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("the run begins again with the model") == 2
    events = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "rollback"] == [0, 0, 0]
    assert not list(folder.checkpoints.glob("step_*")) and not list(Path("/dev/shm").glob("rollcast-again-*"))


@pytest.mark.ray
@pytest.mark.soak
def test_one_of_two_learners_killed_in_a_step_takes_the_other_with_it(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    def fault(run: Run) -> None:
        wait_for(lambda: (run.folder.checkpoints / "step_2").exists(), 60)
        survivor, victim = learners_of(run, 2)
        kill_in_a_step(run, victim)
        wait_for(lambda: not survivor.is_running(), 20)  # It may have waited for ever in an all-reduce.
        wait_for_restart(run, 1)
        step = run.step
        wait_for(lambda: run.step >= step + 2, 60)

    two = ("--checkpoint.every=2", "--learner.num_learners=2", "--run.name=two")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *LONG_STEPS, *two), fault)
    assert_recovered(folder, steps, restarts=1)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_learners_killed_at_random_moments(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    """In a step, while it publishes, saves or has nothing to do: an evaluation is in flight now and then."""
    draw, deaths = random.Random(0), 8

    def fault(run: Run) -> None:
        for death in range(1, deaths + 1):
            saved = run._saved_step
            wait_for(lambda saved=saved: run._saved_step > saved, 120)
            time.sleep(draw.uniform(0, 1.5))
            (learner,) = learners_of(run)
            learner.kill()
            wait_for(lambda learner=learner: not learner.is_running(), 10)
            wait_for(lambda death=death: run.learner_restarts == death, 120)

    more = ("--run.steps=100000", "--checkpoint.every=2", "--eval.every=3", "--learner.num_learners=1")
    folder, steps = run_with(config_for(tmp_path, tiny_bf16, *more, "--run.name=random"), fault)
    assert_recovered(folder, steps, restarts=deaths)


@pytest.mark.soak
def test_a_warm_start_outlives_its_learner(tmp_path: Path, tiny_bf16: str) -> None:
    """`rollcast sft`, as a command: told on the terminal, without a traceback."""
    folder = RunDir(tmp_path / "warm")
    words = ["sft", str(SCRIPTED), "--model.path", tiny_bf16, "--run.dir", str(tmp_path), "--run.name", "warm"]
    more = ["--learner.num_learners", "1", "--learner.epochs", "20", "--run.steps", "12", "--checkpoint.every", "2"]
    trainer = started(tmp_path, [sys.executable, "-m", "rollcast", *words, *more])
    wait_for(lambda: (folder.checkpoints / "step_2").exists(), 120)
    (learner,) = [p for p in of_this_run(tmp_path) if "_WrappedExecutable" in " ".join(p.cmdline())]
    learner.kill()
    output, _ = trainer.communicate(timeout=180)
    assert trainer.returncode == 0, output
    assert "a learner died in step" in output and "Traceback" not in output
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == list(range(13)) and rows[-1]["learner/restarts"] == 1
    wait_for(lambda: not of_this_run(tmp_path), 30)


def command(folder: Path, model: str, *more: str) -> list[str]:
    words = ["train", str(SCRIPTED), "--model.path", model, "--run.dir", str(folder), "--eval.every", "0"]
    return [sys.executable, "-m", "rollcast", *words, *more]


def of_this_run(folder: Path) -> list[psutil.Process]:
    """Processes that carry the run's folder in their environment: trainer, Ray and actors alike."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ROLLCAST_TEST_RUN") == str(folder) and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def start(folder: Path, model: str, *more: str) -> "subprocess.Popen[str]":
    return started(folder, command(folder, model, *more))


def started(folder: Path, words: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "ROLLCAST_TEST_RUN": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.soak
def test_a_killed_trainer_resumes_above_all_earlier_versions(tmp_path: Path, tiny_bf16: str) -> None:
    folder = RunDir(tmp_path / "killed")
    trainer = start(tmp_path, tiny_bf16, "--run.steps", "100000", "--checkpoint.every", "2", "--run.name", "killed")
    wait_for(lambda: (folder.checkpoints / "step_4").exists(), 120)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not of_this_run(tmp_path), 30)
    announced = folder.high_water_mark()
    kept = checkpoint.newest(folder.checkpoints, print)
    assert kept is not None and announced >= kept.trainer["policy_version"]

    goal = kept.step + 4
    again = start(tmp_path, tiny_bf16, "--run.steps", str(goal), "--checkpoint.every", "2", "--run.name", "killed")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert f"step {kept.step}" in output
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == list(range(goal + 1)), "rows after the checkpoint were made again"
    fresh = [row["policy_version"] for row in rows if row["step"] > kept.step]
    assert min(fresh) > announced, "no number means two policies"
    wait_for(lambda: not of_this_run(tmp_path), 30)
    assert not list(Path("/dev/shm").glob("rollcast-killed-*")), "the resumed run sweeps what was left"


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.soak), (signal.SIGINT, 130)]
)
def test_asked_to_stop_it_saves_and_exits(tmp_path: Path, tiny_bf16: str, number: int, code: int) -> None:
    folder = RunDir(tmp_path / "asked")
    trainer = start(tmp_path, tiny_bf16, "--run.steps", "100000", "--checkpoint.every", "1000", "--run.name", "asked")
    wait_for(lambda: len(metrics.read(folder.metrics)) > 3, 120)
    asked = time.monotonic()
    trainer.send_signal(number)
    output, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == code, output
    assert time.monotonic() - asked < 30
    assert "Traceback" not in output
    kept = checkpoint.newest(folder.checkpoints, print)
    assert kept is not None and kept.step == metrics.read(folder.metrics)[-1]["step"]
    wait_for(lambda: not of_this_run(tmp_path), 30)
    assert not list(Path("/dev/shm").glob("rollcast-asked-*"))


@pytest.mark.soak
def test_asked_to_stop_while_it_starts_it_leaves_nothing_behind(tmp_path: Path, tiny_bf16: str) -> None:
    folder = RunDir(tmp_path / "early")
    trainer = start(tmp_path, tiny_bf16, "--run.name", "early", "--rollout.workers", "2")
    wait_for(lambda: list(Path("/dev/shm").glob("rollcast-early-*")), 120)
    trainer.send_signal(signal.SIGTERM)
    output, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, output
    assert "stopping" in output and "Traceback" not in output
    assert not metrics.read(folder.metrics) and not list(folder.checkpoints.glob("step_*")), "no step was begun"
    wait_for(lambda: not of_this_run(tmp_path), 30)
    assert not list(Path("/dev/shm").glob("rollcast-early-*"))


@pytest.mark.ray
def test_a_corrupt_newest_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, tiny_bf16, "--checkpoint.every=2", "--run.name=corrupt")
    folder = RunDir(tmp_path / "corrupt")
    train(config, folder.path)
    victim = folder.checkpoints / "step_4" / "policy.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    longer = config.model_copy(update={"run": config.run.model_copy(update={"steps": 6})})
    train(longer, folder.path)
    output = capsys.readouterr().out
    assert "step_4 is not used: policy.safetensors differs from its digest" in " ".join(output.split())
    assert "step 2" in output
    assert [row["step"] for row in metrics.read(folder.metrics)] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.soak
@pytest.mark.ray
def test_a_few_bad_episodes_are_counted_and_many_stop_the_run(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    sometimes = ("--env.0.id=faulty_envs:faulty/Sometimes-v0", "--run.steps=6", "--rollout.max_error_share=0.9")
    folder = RunDir(tmp_path / "some")
    train(config_for(tmp_path, tiny_bf16, *sometimes, "--env.0.kwargs.p=0.3", "--run.name=some"), folder.path)
    last = metrics.read(folder.metrics)[-1]
    assert last["step"] == 6
    assert last["ledger/failed"] * 4 >= last["dropped/error"] > 0

    always = config_for(
        tmp_path, tiny_bf16, "--env.0.id=faulty_envs:faulty/Sometimes-v0", "--env.0.kwargs.p=1.0", "--run.name=all"
    )
    with pytest.raises(RunFailed, match="The first failure was"):
        train(always, tmp_path / "all")
