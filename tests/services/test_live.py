"""The live policy over HTTP with OpenAI's own client: answers, streams, versions, updates, and clients that leave."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from live_server import ASK, Policies, Server, client_of, expected, generous, running, said, scripted
from rollcast.chat import ChatCodec
from rollcast.errors import UsageError
from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest
from rollcast.live.keys import Key
from rollcast.live.protocol import ChatRequest, CompletionRequest
from rollcast.rundir import RunDir
from rollcast.sampler import Sampler
from rollcast.torch_sampler import TorchSampler
from run_checks import wait_for
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("live") / "model", dtype="float32"))


@pytest.fixture(scope="module")
def codec(model: str) -> ChatCodec:
    return ChatCodec.from_folder(model)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "live")


@pytest.fixture(scope="module")
def paris(tmp_path_factory: pytest.TempPathFactory, model: str, codec: ChatCodec) -> Iterator[Server]:
    """A server that always says the same, under version 3."""
    run = RunDir(tmp_path_factory.mktemp("paris") / "runs" / "live")
    Policies(run, model).publish(3)
    with running(run, codec, scripted(codec, said(codec, "Paris, of course. €"))) as server:
        yield server


def test_a_chat(paris: Server) -> None:
    answer = client_of(paris).chat.completions.create(model="policy", messages=ASK)
    assert answer.choices[0].message.content == "Paris, of course. €" and answer.choices[0].finish_reason == "stop"
    assert answer.model_extra == {"policy_version": 3, "policy_versions": [span(3, 0, 22)]}
    assert answer.usage is not None and answer.usage.completion_tokens == 22 and answer.usage.prompt_tokens > 20


def span(version: int, start: int, end: int, choice: int = 0) -> dict[str, int]:
    return {"version": version, "start": start, "end": end, "choice": choice}


def test_a_plain_completion_with_log_probabilities(paris: Server) -> None:
    answer = client_of(paris).completions.create(model="policy@latest", prompt="The town is", logprobs=1, max_tokens=5)
    assert answer.choices[0].text == "Paris" and answer.choices[0].finish_reason == "length"
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens == list("Paris") and told.text_offset == [0, 1, 2, 3, 4]
    assert told.token_logprobs == [-1.0] * 5 and told.top_logprobs == [{letter: -1.0} for letter in "Paris"]


def test_a_stream_adds_up_and_ends_with_usage_and_spans(paris: Server) -> None:
    chunks = list(
        client_of(paris).chat.completions.create(
            model="policy", messages=ASK, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    *spoken, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == "Paris, of course. €"
    assert spoken[0].choices[0].delta.role == "assistant" and spoken[1].choices[0].delta.role is None
    assert spoken[-1].choices[0].finish_reason == "stop" and len({chunk.id for chunk in chunks}) == 1
    assert spoken[-1].model_extra is not None and spoken[-1].model_extra["policy_versions"] == [span(3, 0, 22)]
    assert not usage.choices and usage.usage is not None and usage.usage.completion_tokens == 22
    assert sum(len(chunk.choices[0].logprobs.content or []) for chunk in spoken if chunk.choices[0].logprobs) == 22


def test_a_plain_stream(paris: Server) -> None:
    chunks = list(client_of(paris).completions.create(model="policy", prompt="The town is", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Paris, of course. €"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(paris: Server, streamed: bool) -> None:
    asked: Any = {"model": "policy", "messages": ASK, "stop": ["course", "nothing"], "stream": streamed}
    answer: Any = client_of(paris).chat.completions.create(**asked)
    if streamed:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
        extra = chunks[-1].model_extra
    else:
        text, reason, extra = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.model_extra
    assert text == "Paris, of " and reason == "stop"
    assert extra["policy_versions"] == [span(3, 0, len("Paris, of course"))]


def test_the_models(paris: Server) -> None:
    client = client_of(paris)
    assert [card.id for card in client.models.list()] == ["policy", "policy@latest", "policy@3"]
    assert client.models.retrieve("policy@3").model_extra == {"policy_version": 3, "max_model_len": 512}


@pytest.mark.parametrize("name", ["policy@best", "policy@2", "gpt-4", "policy@"])
def test_what_is_not_resident_is_refused_with_what_is(paris: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"resident are: policy@latest \(version 3\)") as refused:
        client_of(paris).chat.completions.create(model=name, messages=ASK)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_bad_requests_name_their_field(paris: Server) -> None:
    client = client_of(paris)
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="policy", messages=ASK, temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="policy", prompt="word " * 200)
    assert long.value.code == "context_length_exceeded" and long.value.param == "prompt"


@pytest.mark.parametrize(
    "path",
    ["/docs", "/openapi.json", "/collective_rpc", "/sleep", "/pause", "/update_weights", "/metrics", "/-/routes"],
)
def test_there_is_no_control_route(paris: Server, path: str) -> None:
    assert {httpx.get(paris.url + path).status_code, httpx.post(paris.url + path, json={}).status_code} == {404}


def test_several_answers_have_seeds_of_their_own(run: RunDir, model: str, codec: ChatCodec) -> None:
    Policies(run, model).publish(0)
    with running(run, codec, scripted(codec)) as server:
        asked: Any = {"model": "policy", "messages": ASK, "n": 3, "seed": 5}
        first, again = (client_of(server).chat.completions.create(**asked) for _ in range(2))
        texts = [choice.message.content for choice in first.choices]
        assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
        chunks = list(client_of(server).chat.completions.create(**asked, stream=True))
        streamed = ["", "", ""]
        for chunk in chunks:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == texts


def test_a_real_model_answers_greedily_as_it_does_without_a_server(run: RunDir, model: str, codec: ChatCodec) -> None:
    """And top_p of next to nothing is greedy too."""

    async def start(_: object) -> Sampler:
        return TorchSampler(model, "float32", 512)

    other = str(write_tiny_model(run.path.parent / "other", seed=1, dtype="float32"))
    policies = Policies(run, other)
    policies.publish(1)
    with running(run, codec, start) as server:
        client = client_of(server)
        asked: Any = {"model": "policy", "prompt": "The town", "max_tokens": 12, "logprobs": 2}
        greedy = client.completions.create(**asked, temperature=0)
        narrow = client.completions.create(**asked, temperature=1, top_p=1e-6)
        assert greedy.choices[0].text == narrow.choices[0].text
        told = greedy.choices[0].logprobs
        assert told is not None and told.top_logprobs is not None
        assert all(len(place) <= 2 for place in told.top_logprobs)
        drawn = [client.completions.create(**asked, temperature=2, seed=seed).choices[0].text for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert greedy.choices[0].text == expected(other, codec, "The town", 12)


# ---- updates


def test_updates_in_mid_stream_leave_contiguous_spans_and_no_error(run: RunDir, model: str, codec: ChatCodec) -> None:
    """Eight clients stream while a new policy is taken in again and again."""
    policies = Policies(run, model)
    policies.publish(0)
    long = said(codec, "x" * 150)
    with running(run, codec, scripted(codec, long, seconds_per_token=0.004, seconds_to_load=0.02)) as server:
        stop = threading.Event()
        told: list[list[dict[str, int]]] = []
        failures: list[BaseException] = []

        def talk() -> None:
            client = client_of(server)
            try:
                while not stop.is_set():
                    chunks = list(client.chat.completions.create(model="policy", messages=ASK, stream=True))
                    extra = chunks[-1].model_extra or {}
                    assert extra["policy_version"] == extra["policy_versions"][-1]["version"]
                    told.append(extra["policy_versions"])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=talk, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for version in range(1, 9):
            time.sleep(0.25)
            policies.publish(version)
            wait_for(lambda version=version: server.replica.resident["latest"] == version)
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures and len(told) >= 16
    assert all(spans[0]["start"] == 0 and spans[-1]["end"] == 151 for spans in told)
    assert all(a["end"] == b["start"] and a["version"] < b["version"] for spans in told for a, b in pairwise(spans))
    assert sum(len(spans) > 1 for spans in told) >= 8, "updates did fall into answers"
    assert {one["version"] for spans in told for one in spans} >= set(range(1, 8))


def test_a_damaged_policy_is_refused_and_the_old_one_answers_on(run: RunDir, model: str, codec: ChatCodec) -> None:
    policies = Policies(run, model)
    policies.publish(0)
    with running(run, codec, scripted(codec)) as server:
        good = policies.publish(1)
        wait_for(lambda: server.replica.resident == {"latest": 1})
        (damaged,) = [(run.weights / "v1" / name) for name in good.segments]
        folder = run.weights / "v2"
        folder.mkdir()
        (folder / damaged.name.replace("v1", "v2")).write_bytes(damaged.read_bytes()[:-100])
        text = (run.weights / "v1" / "manifest.json").read_text().replace('"version": 1', '"version": 2')
        (folder / "manifest.json").write_text(text)
        wait_for(lambda: server.replica.counts.refusals)
        assert client_of(server).chat.completions.create(model="policy@1", messages=ASK).choices
        assert "version 2" in httpx.get(f"{server.url}/v1/policy").json()["refused"]


# ---- best, canary, promote, rollback


def test_best_stays_while_latest_goes_on(run: RunDir, model: str, codec: ChatCodec) -> None:
    policies = Policies(run, model)
    policies.found_best(policies.publish(1), 0.1)
    with running(run, codec, scripted(codec)) as server:
        client = client_of(server)

        def version_of(name: str) -> int:
            answer = client.chat.completions.create(model=name, messages=ASK)
            return int((answer.model_extra or {})["policy_version"])

        def admin(path: str, **body: Any) -> Any:
            answer = httpx.post(f"{server.url}/v1/policy/{path}", json=body)
            return answer.json()

        assert server.replica.resident == {"latest": 1, "best": 1}
        policies.publish(2)
        wait_for(lambda: server.replica.resident == {"latest": 2, "best": 1, "candidate": 2})
        assert [version_of(f"policy@{name}") for name in ("latest", "best", "1", "2")] == [2, 1, 1, 2]
        third = policies.publish(3)
        policies.found_best(third, 0.2)
        wait_for(lambda: server.replica.resident == {"latest": 3, "best": 3})
        assert version_of("policy@best") == 3
        policies.publish(4)
        wait_for(lambda: server.replica.resident == {"latest": 4, "best": 3, "candidate": 4})

        assert admin("rollback")["best"] == 1 and version_of("policy@best") == 1
        time.sleep(0.7)
        assert version_of("policy@best") == 1, "the gate says the same, and what was rolled back stays so"
        assert admin("promote")["best"] == 4 and version_of("policy@best") == 4
        assert admin("promote", version=9)["error"]["code"] == "no_such_policy"
        policies.publish(5)
        wait_for(lambda: server.replica.resident == {"latest": 5, "best": 4, "candidate": 5})

        assert admin("canary", share=0.3)["canary"] == 0.3
        shares = Counter(version_of("policy@best") for _ in range(200))
        assert set(shares) == {4, 5} and 30 <= shares[5] <= 95
        assert admin("rollback", version=1)["best"] == 1
        kept = json.loads((run.path / "live" / "releases.json").read_text())
        assert kept == {"best": 1, "previous": [], "gate": 3, "canary": 0.3}
        assert (run.path / "live" / "v1").is_dir() and not (run.path / "live" / "v4").exists()
    with running(run, codec, scripted(codec)) as server:
        assert server.replica.resident == {"latest": 5, "best": 1, "candidate": 5}, "a restart changes nothing"
        assert server.replica.releases.canary == 0.3


# ---- load, and clients that leave


def test_a_burst_gets_answers_and_refusals_and_nothing_else(run: RunDir, model: str, codec: ChatCodec) -> None:
    Policies(run, model).publish(0)
    limits = generous(ongoing=4, queued=4)
    engine = scripted(codec, said(codec, "four"), seconds_per_token=0.02)
    with running(run, codec, engine, limits=limits) as server:

        async def burst() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=100)) as client:
                body = {"model": "policy", "messages": ASK}
                return await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for _ in range(80)])

        answers = asyncio.run(burst())
        codes = Counter(answer.status_code for answer in answers)
        assert set(codes) == {200, 429} and codes[200] >= 8
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        assert client_of(server).chat.completions.create(model="policy", messages=ASK).choices, "and it is over"


@pytest.mark.parametrize("streamed", [True, False])
def test_whoever_leaves_frees_the_slot(run: RunDir, model: str, codec: ChatCodec, streamed: bool) -> None:
    Policies(run, model).publish(0)
    engine = scripted(codec, said(codec, "x" * 400), seconds_per_token=0.05)
    with running(run, codec, engine, limits=generous(ongoing=1, queued=0)) as server:
        body = {"model": "policy", "messages": ASK, "stream": streamed}
        with httpx.Client(base_url=server.url, timeout=httpx.Timeout(5, read=0.5)) as client:
            if streamed:
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.iter_lines()  # Held: the stream is closed with it.
                    assert next(lines).startswith("data: ")
                    assert server.replica.counts.answering == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body)
        wait_for(lambda: server.replica.counts.answering == 0, 2.0)
        assert server.replica.counts.cut == 1
        quick = client_of(server).chat.completions.create(model="policy", messages=ASK, max_tokens=1)
        assert quick.choices[0].finish_reason == "length"


def test_whoever_leaves_the_queue_gives_up_the_place(run: RunDir, model: str, codec: ChatCodec) -> None:
    Policies(run, model).publish(0)
    engine = scripted(codec, said(codec, "x" * 400), seconds_per_token=0.05)
    with running(run, codec, engine, limits=generous(ongoing=1, queued=1)) as server:
        body = {"model": "policy", "messages": ASK, "stream": True}
        with httpx.Client(base_url=server.url, timeout=httpx.Timeout(5, read=0.3)) as client:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()  # Held: the stream is closed with it.
                assert next(lines).startswith("data: ")
                for _ in range(3):  # The second would be told that the queue is full.
                    with pytest.raises(httpx.ReadTimeout):
                        client.post("/v1/chat/completions", json=body)
            wait_for(lambda: server.replica.counts.answering == 0, 2.0)
        assert server.replica.counts.cut == 1, "none of the others had a turn"


# ---- the fleet, and what is told


class PaperFleet:
    """A fleet of which only the number of workers is known."""

    def __init__(self) -> None:
        self.workers = 2

    async def status(self) -> dict[str, int]:
        return {"workers": self.workers}

    async def scale(self, workers: int) -> dict[str, int]:
        if workers > 4:
            raise UsageError("The run cannot have so many workers.", "Possible are 0 to 4.", "Ask for fewer.")
        self.workers = workers
        return await self.status()


def test_the_fleet_can_be_seen_and_scaled(run: RunDir, model: str, codec: ChatCodec) -> None:
    Policies(run, model).publish(0)
    with running(run, codec, scripted(codec), fleet=PaperFleet()) as server:
        with httpx.Client(base_url=server.url) as client:
            assert client.put("/v1/fleet", json={"workers": 3}).json() == {"workers": 3}
            assert client.get("/v1/fleet").json() == {"workers": 3}
            refused = client.put("/v1/fleet", json={"workers": 9})
            assert refused.status_code == 409 and "0 to 4" in refused.json()["error"]["message"]
            assert client.put("/v1/fleet", json={"workers": 1, "run": "other"}).status_code == 404
            told = client.get("/v1/policy").json()
        assert told["run"] == "live" and told["policy_version"] == 0 and told["resident"] == {"latest": 0}
        assert told["step"] is None and told["age_s"] >= 0


def test_answers_are_handed_to_whoever_records_them(run: RunDir, model: str, codec: ChatCodec) -> None:
    class Diary:
        def __init__(self) -> None:
            self.records: list[Any] = []

        def answered(self, record: Any, asked: ChatRequest | CompletionRequest, key: Key) -> None:
            self.records.append((record, asked, key))

        async def give(self, request: FeedbackRequest, key: Key) -> FeedbackReceipt:
            raise AssertionError("nobody gives any")

    Policies(run, model).publish(0)
    diary = Diary()
    with running(run, codec, scripted(codec, said(codec, "yes")), recorder=diary) as server:
        answer = client_of(server).chat.completions.create(model="policy", messages=ASK)
        ((record, asked, key),) = diary.records
    assert isinstance(asked, ChatRequest) and key.name == "anyone"
    assert record.id == answer.id and record.answers[0].text == "yes" and record.whole
    assert record.answers[0].token_ids == [*codec.plain("yes"), 258] and record.answers[0].logprobs == [-1.0] * 4
    assert codec.answer(record.prompt_ids[-12:]).endswith("assistant\n")
