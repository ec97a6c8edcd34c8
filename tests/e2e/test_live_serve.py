"""The live policy on Ray Serve: two replicas with a real model, killed, updated and left; and a run that is served."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from live_server import ASK, Crowd, Policies, free_port, is_up
from rollcast import metrics
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.control import find
from rollcast.live import app
from rollcast.run import Run
from rollcast.rundir import RunDir
from run_checks import assert_nothing_lost, beside, wait_for
from tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPTED = ROOT / "deploy" / "configs" / "scripted.toml"
GENEROUS = (
    "--serve.limits.requests_per_s=1e6",
    "--serve.limits.burst=1000000",
    "--serve.limits.tokens_per_minute=1000000000",
)


def config_for(folder: Path, model: str, port: int, *overrides: str) -> RunConfig:
    shared = (f"--model.path={model}", f"--run.dir={folder}", f"--serve.port={port}", "--serve.cpus_per_replica=0")
    return load_config(SCRIPTED, [*shared, *GENEROUS, "--eval.every=0", *overrides])


@pytest.fixture(scope="module")
def port(ray_cluster: str) -> Iterator[int]:
    """Where Serve listens for the whole module: a cluster has one address."""
    yield free_port()


class Live:
    """An application of the module, and what can be done to it."""

    def __init__(self, spec: app.LiveSpec, policies: Policies, url: str) -> None:
        self.spec, self.policies, self.url = spec, policies, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)

    def pids(self) -> set[int]:
        """Of the replicas, as far as they answer."""
        from ray import serve

        handle, found = serve.get_app_handle(self.spec.name), set()
        for _ in range(12):
            with suppress(RayActorError):  # Of one that has just died.
                found.add(int(handle.pid.remote().result(timeout_s=20)))
        return found

    def version(self) -> int:
        return int(httpx.get(f"{self.url}/v1/policy").json()["policy_version"])

    def answering(self) -> int:
        return sum({int(httpx.get(f"{self.url}/v1/policy").json()["answering"]) for _ in range(12)})


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_fp32: str, ray_cluster: str, port: int) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    config = config_for(folder, tiny_fp32, port, "--rollout.engine=torch", "--run.name=two", "--serve.min_replicas=2")
    policies = Policies(RunDir(folder / "two"), tiny_fp32)
    policies.publish(0)
    spec = app.spec_of(config, folder / "two", ray_cluster)
    url = app.deploy(spec)
    yield Live(spec, policies, url)
    app.remove(spec)


def greedy(live: Live, name: str = "policy") -> tuple[str, int]:
    answer = live.client.completions.create(model=name, prompt="The town", max_tokens=8, temperature=0)
    return answer.choices[0].text, int((answer.model_extra or {})["policy_version"])


@pytest.mark.ray
def test_openais_client_talks_to_it(live: Live) -> None:
    chunks = list(
        live.client.chat.completions.create(
            model="policy@latest", messages=ASK, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None and 1 <= chunks[-1].usage.completion_tokens <= 6
    assert [card.id for card in live.client.models.list()] == ["policy", "policy@latest", "policy@0"]
    with pytest.raises(openai.NotFoundError, match="resident are: policy@latest"):
        live.client.chat.completions.create(model="policy@7", messages=ASK)
    with pytest.raises(openai.BadRequestError):
        live.client.chat.completions.create(model="policy", messages=[])
    assert httpx.post(f"{live.url}/-/routes").status_code in (200, 404, 405), "Serve's own, which change nothing"
    assert {httpx.post(f"{live.url}/{path}").status_code for path in ("collective_rpc", "sleep", "docs")} == {404}


@pytest.mark.ray
def test_every_replica_takes_in_what_is_published(live: Live, tmp_path: Path) -> None:
    before = greedy(live)
    other = str(write_tiny_model(tmp_path / "other", seed=5, dtype="float32"))
    live.policies.publish(10, other)
    wait_for(lambda: {greedy(live)[1] for _ in range(6)} == {10}, 20)
    texts = {greedy(live)[0] for _ in range(6)}
    assert len(texts) == 1 and texts != {before[0]}


@pytest.mark.ray
def test_whoever_leaves_frees_the_engine(live: Live) -> None:
    body = {"model": "policy", "prompt": "The town", "max_tokens": 480, "stream": True, "temperature": 1}
    with httpx.Client(base_url=live.url, timeout=10) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        wait_for(lambda: live.answering() == 0, 2.0)


@pytest.mark.ray
def test_updates_under_load_and_a_killed_replica(live: Live) -> None:
    """Eight clients; no answer is lost to an update. Then a replica dies: the other answers, and a third comes."""
    with Crowd(live.url, 8) as crowd:
        for version in (11, 12, 13):
            time.sleep(0.7)
            live.policies.publish(version)
            wait_for(lambda version=version: live.version() == version, 30)
        time.sleep(0.5)
        assert set(crowd.codes) == {200}, "no update costs an answer"
        spans_of_all = list(crowd.told)
        wait_for(lambda: len(live.pids()) == 2, 30)  # Under load one may be asked by chance all the time.
        victim = min(live.pids())
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(victim), 10)
        answered = crowd.codes[200]
        wait_for(lambda: crowd.codes[200] > answered + 8, 30)
        live.policies.publish(14)
        wait_for(lambda: len(live.pids() - {victim}) == 2, 90)
    assert all(spans[0]["start"] == 0 for spans in spans_of_all)
    neighbours = [pair for spans in spans_of_all for pair in pairwise(spans)]
    assert neighbours and all(a["end"] == b["start"] and a["version"] < b["version"] for a, b in neighbours)
    wait_for(lambda: {greedy(live)[1] for _ in range(8)} == {14}, 30)
    failed = sum(crowd.codes.values()) - crowd.codes[200]
    assert failed <= 8 and crowd.codes[200] > 20 * failed, crowd.codes


@pytest.mark.ray
def test_a_run_is_served_while_it_trains_and_afterwards(tmp_path: Path, tiny_fp32: str, live: Live, port: int) -> None:
    """In flight from the trainer's store; and on from its folder when it has ended."""
    app.remove(live.spec)
    endless = ("--run.name=trained", "--run.steps=100000", "--serve.enabled=true", "--checkpoint.every=1000")
    config = config_for(tmp_path, tiny_fp32, port, *endless)
    url = f"http://127.0.0.1:{port}"
    seen: list[int] = []

    def watch(_: Run) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        wait_for(lambda: is_up(url), 60)
        first = httpx.get(f"{url}/v1/policy").json()["policy_version"]
        wait_for(lambda: httpx.get(f"{url}/v1/policy").json()["policy_version"] >= first + 3, 60)
        answer = client.chat.completions.create(model="policy", messages=ASK)
        seen.append(int((answer.model_extra or {})["policy_version"]))
        fleet = httpx.get(f"{url}/v1/fleet").json()
        assert fleet["policy_version"] >= seen[0] >= first + 3
        assert httpx.put(f"{url}/v1/fleet", json={"workers": -1}).status_code == 400
        assert httpx.put(f"{url}/v1/fleet", json={"workers": 1}).json()["workers"] == 1

    folder = beside(config, watch).folder
    assert not list(folder.weights.glob(f"v{seen[0]}")), "that one was never on the disk"
    last = max(int(path.name[1:]) for path in folder.weights.glob("v*"))
    wait_for(lambda: httpx.get(f"{url}/v1/policy").json()["policy_version"] == last, 30)
    assert httpx.get(f"{url}/v1/fleet").status_code == 409, "there is no trainer any more"
    app.remove(app.spec_of(config, folder.path, ""))


@pytest.mark.ray
def test_rollout_workers_answer_and_one_of_them_dies(tmp_path: Path, tiny_fp32: str, live: Live, port: int) -> None:
    """`serve.mode = "shared"`: no engine but theirs. What they answer is in no figure of the run."""
    app.remove(live.spec)
    shared = ("--serve.enabled=true", "--serve.mode=shared", "--rollout.engine=torch", "--rollout.workers=2")
    endless = ("--run.name=shared", "--run.steps=100000", "--checkpoint.every=1000")
    config = config_for(tmp_path, tiny_fp32, port, *shared, *endless)
    url = f"http://127.0.0.1:{port}"
    asked: dict[str, Any] = {"model": "policy", "prompt": "The town", "max_tokens": 120, "temperature": 0}

    def told(started: threading.Barrier, answers: list[list[dict[str, int]]]) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        chunks = iter(client.completions.create(**asked, stream=True))
        assert next(chunks).choices[0].text
        started.wait(60)
        answers.append((list(chunks)[-1].model_extra or {})["policy_versions"])

    def watch(run: Run) -> None:
        wait_for(lambda: is_up(url) and run.fleet.ready() == 2, 60)
        first = httpx.get(f"{url}/v1/policy").json()["policy_version"]
        wait_for(lambda: httpx.get(f"{url}/v1/policy").json()["policy_version"] > first, 60)
        assert httpx.post(f"{url}/v1/policy/promote", json={}).status_code == 409, "the newest alone is resident"
        ray.get(find("shared").ask.remote(paused=True))
        wait_for(lambda: run.paused and len({member.version for member in run.fleet.crew()}) == 1, 30)
        started, answers = threading.Barrier(3), []
        readers = [threading.Thread(target=told, args=(started, answers)) for _ in range(2)]
        for reader in readers:
            reader.start()
        started.wait(60)
        ray.get(find("shared").ask.remote(paused=False))
        victim = min(run.fleet.pids().values())
        os.kill(victim, signal.SIGKILL)
        for reader in readers:
            reader.join(60)
        wait_for(lambda: run.fleet.restarts == 1 and not psutil.pid_exists(victim))
        assert len(answers) == 2, "each worker had one of them, and both came to their ends"
        for spans in answers:
            assert spans[0]["start"] == 0 and spans[-1]["end"] == 120
            assert all(a["end"] == b["start"] and a["version"] < b["version"] for a, b in pairwise(spans))

    run = beside(config, watch)
    rows = metrics.read(run.folder.metrics)
    assert_nothing_lost(run.folder, rows[-1]["step"], 2)
    wait_for(lambda: not is_up(url), 20)


@pytest.mark.soak
@pytest.mark.ray
def test_replicas_come_with_the_load(tmp_path: Path, tiny_fp32: str, live: Live, port: int) -> None:
    """Serve adds one while the first is half full; no answer is lost to it."""
    app.remove(live.spec)
    load = ("--serve.max_replicas=2", "--serve.limits.ongoing=4", "--serve.limits.queued=64")
    config = config_for(tmp_path, tiny_fp32, port, "--rollout.engine=torch", "--run.name=grows", *load)
    policies = Policies(RunDir(tmp_path / "grows"), tiny_fp32)
    policies.publish(3)
    grows = Live(app.spec_of(config, tmp_path / "grows", live.spec.namespace), policies, "")
    grows.url = app.deploy(grows.spec)
    assert len(grows.pids()) == 1
    with Crowd(grows.url, 12) as crowd:
        wait_for(lambda: len(grows.pids()) == 2, 180)
        answered = crowd.codes[200]
        wait_for(lambda: crowd.codes[200] > answered + 50, 60)
    app.remove(grows.spec)
    assert set(crowd.codes) == {200} and {span["version"] for spans in crowd.told for span in spans} == {3}


@pytest.mark.soak
def test_the_verb_serves_behind_haproxy(tmp_path: Path, tiny_fp32: str) -> None:
    """In a process and a cluster of its own, as a person types it."""
    folder, port = tmp_path / "runs", free_port()
    config = config_for(folder, tiny_fp32, port, "--rollout.engine=torch", "--run.name=done", "--run.steps=1")
    run = RunDir(folder / "done")
    Policies(run, tiny_fp32).publish(4)
    run.config.write_text(config.to_toml(), encoding="utf-8")
    run.run_json.write_text('{"name": "done", "host": "elsewhere", "pid": 1, "started": 1}', encoding="utf-8")
    environment = os.environ | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in ("services", "learners", "envs")),
    }
    command = [sys.executable, "-m", "rollcast", "serve", "done", "--run.dir", str(folder)]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=tmp_path)
    try:
        wait_for(lambda: "answers at" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        owner = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN"}[port]
        assert "haproxy" in psutil.Process(owner).name()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        answer = client.chat.completions.create(model="policy", messages=ASK, max_tokens=5)
        assert (answer.model_extra or {})["policy_version"] == 4
        body = {"model": "policy", "prompt": "The town", "max_tokens": 480, "stream": True}
        with httpx.Client(base_url=url, timeout=10) as quick:
            with quick.stream("POST", "/v1/completions", json=body) as stream:
                assert next(stream.iter_lines()).startswith("data: ")
            wait_for(lambda: quick.get("/v1/policy").json()["answering"] == 0, 2.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
