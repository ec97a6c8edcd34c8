"""A fleet on a cluster of three nodes, with a token: it grows, shrinks and loses nodes while the run goes on."""

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from live_run import GROUPS, SCRIPTED, SLOW, LiveRun
from live_server import free_port
from net_spaces import why_not
from ray_nodes import Nodes, nodes
from rollcast import checkpoint, metrics, records
from rollcast.rundir import RunDir
from run_checks import assert_nothing_lost
from tiny_model import write_tiny_model

Starts = Callable[..., LiveRun]


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    """A head that holds no worker, and two nodes for two workers each."""
    with nodes(num_cpus=0) as cluster:
        for _ in range(2):
            cluster.add(num_cpus=2)
        yield cluster


@pytest.fixture
def starts(tmp_path: Path, three: Nodes, tiny_bf16: str) -> Iterator[Starts]:
    runs: list[LiveRun] = []

    def start(name: str, *words: str, model: str = tiny_bf16, **more: Any) -> LiveRun:
        runs.append(LiveRun(three.environment, tmp_path, name, model, *SLOW, *words, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def has_trained(run: LiveRun, worker: int) -> bool:
    """Whether a group that this worker played was learned from."""
    player: dict[int, int] = {}
    for event in run.events():
        if event["event"] == "lease":
            player[event["group"]] = event["worker"]
        elif event["event"] == "done" and player.get(event["group"]) == worker:
            return True
    return False


def stops(run: LiveRun) -> None:
    code, said = run.asks("stop")
    assert code == 0 and "ended" in said, said
    assert run.trainer.wait(30) == 0


def is_refused(second: LiveRun, first: LiveRun) -> None:
    """A trainer of the same name whose folder is another one, as on a host without a shared disk."""
    assert second.trainer.wait(90) == 2
    told = " ".join(second.log.read_text().split())
    assert "is being trained already" in told and f"process {first.trainer.pid} on" in told and "--run" in told
    assert not second.folder.run_json.exists() and "Traceback" not in told


def scaled(run: LiveRun, workers: int) -> float:
    """Asks for so many and waits until they are there; seconds until then."""
    begun = time.monotonic()
    assert run.asks("scale", str(workers))[0] == 0
    there = {"workers": workers, "wanted": workers, "draining": 0}
    run.waits_until(lambda: there.items() <= run.status().items(), 60)
    return time.monotonic() - begun


@pytest.mark.ray
def test_scaling_while_it_trains_loses_nothing(starts: Starts, three: Nodes, tmp_path: Path, tiny_bf16: str) -> None:
    run = starts("scaled", "--env.0.kwargs.seconds", "0.4", "--eval.every", "3", "--eval.samples", "8")
    run.waits_until(lambda: run.status().get("workers") == 1, 120)
    (tmp_path / "elsewhere").mkdir()
    second = LiveRun(three.environment, tmp_path / "elsewhere", "scaled", tiny_bf16, *SLOW)
    before = run.goes_on(3)
    took = scaled(run, 4)
    run.waits_until(lambda: all(has_trained(run, worker) for worker in (1, 2, 3)), 60 - took)
    with_four = run.goes_on(3)
    scaled(run, 2)
    run.goes_on(2)
    scaled(run, 3)
    run.goes_on(2)
    assert run.asks("pause")[0] == 0
    run.waits_until(lambda: run.status().get("waiting_for") == "to be resumed", 30)
    assert run.asks("resume")[0] == 0
    run.goes_on(1)
    is_refused(second, run)
    folder, run.folder = run.folder, RunDir(tmp_path / "nobody")
    code, said = run.asks("pause")
    assert code == 2 and "no live run" in said and "live there: scaled" in said, said
    run.folder = folder

    events = Counter(event["event"] for event in run.events())
    assert events["return"] == events["refused"] == events["failed"] == 0, "what leaving workers played was finished"
    stops(run)
    rows = metrics.read(run.folder.metrics)
    assert_nothing_lost(run.folder, rows[-1]["step"], GROUPS)
    assert {1, 2, 3, 4} >= {row["fleet/workers"] for row in rows[1:]} and rows[-1]["fleet/wanted"] == 3
    assert rows[-1]["fleet/restarts"] == 0
    asked = [path for path in records.files(run.folder.evaluations) if len(list(records.read(path))) == 8]
    assert len(asked) == len(list(run.folder.evaluations.iterdir())) >= 3, "every question was answered, each time"

    def waited(some: list[dict[str, Any]]) -> list[float]:
        return [row.get("time/wait_for_rollouts_s", 0.0) for row in some]

    assert max(waited(rows)) <= max(waited(before[1:])) + 10
    assert sorted(waited(with_four))[1] < sorted(waited(before))[1], "four workers play faster than one"
    kept = checkpoint.newest(run.folder.checkpoints, print)
    assert kept is not None and kept.step == rows[-1]["step"]


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that learns to answer in letters within thirty steps."""
    folder = tmp_path_factory.mktemp("speller")
    return str(write_tiny_model(folder / "model", dtype="float32", initializer_range=0.2))


LEARNS = (
    *("--rollout.engine", "torch", "--rollout.max_new_tokens", "8", "--rollout.workers", "3"),
    *("--rollout.group_size", "8", "--rollout.concurrency", "8", "--learner.learning_rate", "3e-3"),
    *("--learner.critic", "none", "--buffer.max_staleness", "1", "--model.dtype", "float32"),
)


def disturbed(run: LiveRun, three: Nodes, steps: int) -> tuple[int, list[float]]:
    """Takes a node of the cluster away, and brings one back, every four steps; how often, and the rewards."""
    taken, there = 0, True
    while (step := len(metrics.read(run.folder.metrics))) < steps:
        if there:
            three.remove(three.added[-1])
            taken += 1
        else:
            three.add(num_cpus=2)
        there = not there
        run.goes_on(min(4, steps + 1 - step), 120)
    if not there:
        three.add(num_cpus=2)
    return taken, [row["reward/mean"] for row in metrics.read(run.folder.metrics)[1:]]


@pytest.mark.ray
def test_a_node_that_comes_and_goes_costs_only_its_leases(starts: Starts, three: Nodes, tiny_bf16: str) -> None:
    """The short form of the next one, which learns."""
    run = starts("nodes", "--rollout.workers", "3", "--env.0.kwargs.seconds", "0.4")
    run.waits_until(lambda: run.status().get("workers") == 3 and len(metrics.read(run.folder.metrics)) > 1, 120)
    taken, _ = disturbed(run, three, 10)
    stops(run)
    rows = metrics.read(run.folder.metrics)
    events = assert_nothing_lost(run.folder, rows[-1]["step"], GROUPS)
    assert rows[-1]["fleet/restarts"] >= taken >= 1
    assert events["return"] > 0 == events["failed"], "its workers played"


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_with_nodes_that_come_and_go_it_learns_as_well_as_without(starts: Starts, three: Nodes, speller: str) -> None:
    steps = 60

    def rewards(run: LiveRun) -> list[float]:
        return [row["reward/mean"] for row in metrics.read(run.folder.metrics)[1:]]

    calm = starts("calm", *LEARNS, "--env.0.kwargs.seconds", "0.3", "--run.steps", str(steps), model=speller)
    assert calm.trainer.wait(300) == 0
    run = starts("stormy", *LEARNS, "--env.0.kwargs.seconds", "0.3", model=speller)
    run.waits_until(lambda: run.status().get("workers") == 3 and len(metrics.read(run.folder.metrics)) > 1, 120)
    taken, found = disturbed(run, three, steps)
    undisturbed = rewards(calm)
    print(f"taken {taken} times; rewards {undisturbed[-10:]} and {found[-10:]}")
    assert taken >= 5
    for last in (10, steps):  # Where it gets to, and on the way.
        assert sum(found[:steps][-last:]) >= 0.9 * sum(undisturbed[-last:])
    stops(run)
    rows = metrics.read(run.folder.metrics)
    events = assert_nothing_lost(run.folder, rows[-1]["step"], GROUPS)
    print(f"{rows[-1]['fleet/restarts']:g} workers replaced, {events['return']} leases returned")
    assert rows[-1]["fleet/restarts"] >= taken and events["return"] > 0 == events["failed"], "their workers played"


DEVICES = """
import json, sys
import ray
from ray import serve
from rollcast.config_file import load_config
from rollcast.live import app
from rollcast.run import Run
from rollcast.session import opened
from pathlib import Path

class Learner:
    def devices(self):
        context = ray.get_runtime_context()
        return [[context.get_node_id(), number] for number in context.get_accelerator_ids()["GPU"]]

config = load_config(sys.argv[1], sys.argv[2:])
ray.init(namespace="rollcast", log_to_driver=False, logging_level="ERROR")
learner = ray.remote(Learner).options(num_cpus=1, num_gpus=1).remote()
devices = ray.get(learner.devices.remote())
with opened(config, Path(config.run.dir) / config.run.name, "never", Run) as run:
    while run.fleet.ready() < 2:
        run._gather("workers")
    workers = [[place.node, number] for place in run.fleet.places.values() for number in place.gpu_ids]
    spec = app.spec_of(config, run.folder.path, "rollcast")
    app.deploy(spec)
    node, given = serve.get_app_handle(spec.name).place.remote().result()
    serve.shutdown()
    replicas = [[node, number] for number in given]
    found = {"workers": workers, "learners": devices, "replicas": replicas, "most": run._most}
    print("found: " + json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.soak
def test_workers_learners_and_replicas_have_devices_of_their_own(tmp_path: Path, three: Nodes, tiny_bf16: str) -> None:
    """Logical ones. In place of the learner an actor asks as it does: torch for CPUs has no NCCL, which a learner's
    process with a GPU sets up."""
    node = three.add(num_cpus=5, num_gpus=4)
    serve = ("--serve.gpus_per_replica", "1", "--serve.port", str(free_port()))
    words = ["--model.path", tiny_bf16, "--run.dir", str(tmp_path), "--eval.every", "0", "--rollout.workers", "2"]
    command = [sys.executable, "-c", DEVICES, str(SCRIPTED), *words, *serve, "--rollout.gpus_per_worker", "1"]
    done = subprocess.run(command, env=three.environment, capture_output=True, text=True, timeout=180, check=False)
    learner = ("--learner.num_learners", "1", "--learner.gpus_per_learner", "1", "--rollout.gpus_per_worker", "1")
    too_many = [sys.executable, "-m", "rollcast", "train", str(SCRIPTED), *words, *learner, "--rollout.workers", "4"]
    refused = subprocess.run(too_many, env=three.environment, capture_output=True, text=True, timeout=180, check=False)
    three.remove(node)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    found = json.loads(line.removeprefix("found: "))
    ids = [tuple(one) for one in found["workers"] + found["learners"] + found["replicas"]]
    assert len(ids) == len(set(ids)) == 4 and len(found["learners"]) == len(found["replicas"]) == 1
    assert found["most"] == 4, "as many as have a GPU, on that node"
    assert refused.returncode == 2 and "it needs 5 GPUs, the cluster has 4" in refused.stderr


TELLS_ITS_LEARNER = """
import sys
from pathlib import Path
from rollcast.config_file import load_config
from rollcast.run import Run
from rollcast.session import opened
from rollcast.train import loop

config = load_config(sys.argv[1], sys.argv[2:])
with opened(config, Path(config.run.dir) / config.run.name, "auto", Run) as run:
    print(f"learner: {run.learners.node()}", flush=True)
    run.see_through(loop)
"""


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(400)
def test_the_learners_node_goes_and_its_workers_play_on(starts: Starts, three: Nodes) -> None:
    """With it go the originals of all policies, and the store's home moves."""
    added = three.add(num_cpus=1)
    words = ("--learner.num_learners", "1", "--checkpoint.every", "2", "--rollout.workers", "2")
    run = starts("home", *words, "--env.0.kwargs.seconds", "0.2", program=("-c", TELLS_ITS_LEARNER))
    run.waits_until(lambda: (run.folder.checkpoints / "step_2").exists(), 120)
    (home,) = [line.split()[1] for line in run.log.read_text().splitlines() if line.startswith("learner: ")]
    workers = {event["worker"] for event in run.events() if event["event"] == "lease"}
    three.remove(home)
    run.waits_until(lambda: metrics.read(run.folder.metrics)[-1].get("learner/restarts") == 1, 150)
    run.goes_on(4)
    rows = metrics.read(run.folder.metrics)
    versions = [row["policy_version"] for row in rows]
    assert [row["step"] for row in rows] == list(range(len(rows))) and versions == sorted(set(versions))
    assert rows[-1]["fleet/workers"] == 2 and rows[-1]["fleet/restarts"] <= 1
    assert workers & {event["worker"] for event in run.events()[-20:] if event["event"] == "lease"}
    stops(run)
    assert_nothing_lost(run.folder, metrics.read(run.folder.metrics)[-1]["step"], GROUPS)
    if home != added:  # As the next test expects it.
        three.remove(added)
        three.add(num_cpus=2)


@pytest.mark.ray
@pytest.mark.soak
def test_a_run_without_an_address_has_a_cluster_of_its_own(three: Nodes, tmp_path: Path, tiny_bf16: str) -> None:
    """Ray by itself would join the one that was started last on this machine."""
    nobody = {name: value for name, value in three.environment.items() if name != "RAY_ADDRESS"}
    run = LiveRun(nobody, tmp_path, "own", tiny_bf16, "--run.steps", "1")
    assert run.trainer.wait(120) == 0, run.log.read_text()
    assert json.loads(run.folder.run_json.read_text())["address"] != three.environment["RAY_ADDRESS"]


@pytest.mark.ray
@pytest.mark.soak
def test_a_node_that_is_cut_off_costs_only_its_leases(tmp_path: Path, tiny_bf16: str) -> None:
    """Hosts of their own in a network. One of them goes on and is not heard of: nobody closes a connection."""
    if (why := why_not()) is not None:
        pytest.skip(why)
    with nodes(apart=True, num_cpus=0) as network, contextlib.ExitStack() as ends:
        _, victim = network.add(num_cpus=1), network.add(num_cpus=1)
        words = ("--env.0.kwargs.seconds", "0.4", "--rollout.workers", "2")
        run = LiveRun(network.environment, tmp_path, "apart", tiny_bf16, *SLOW, *words)
        ends.callback(run.close)
        run.waits_until(lambda: run.status().get("workers") == 2, 120)
        run.waits_until(lambda: has_trained(run, 0) and has_trained(run, 1), 60)
        cut = time.monotonic()
        network.cut(victim)
        run.waits_until(lambda: run.status().get("workers") == 1, 60)
        noticed = time.monotonic() - cut
        run.goes_on(3)
        network.remove(victim)
        network.add(num_cpus=1)
        run.waits_until(lambda: run.status().get("workers") == 2, 90)
        run.goes_on(2)
        stops(run)
        rows = metrics.read(run.folder.metrics)
        events = assert_nothing_lost(run.folder, rows[-1]["step"], GROUPS)
        waited = max(row.get("time/wait_for_rollouts_s", 0.0) for row in rows)
        print(f"noticed after {noticed:.1f} s, {events['return']} leases returned, longest wait {waited:.1f} s")
        assert events["return"] > 0 == events["failed"] and rows[-1]["fleet/restarts"] == 1
