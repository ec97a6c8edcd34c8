"""The live policy on a real vLLM engine: streams, what is drawn how, updates, and answers that are cut."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from live_server import ASK, Policies, Server, client_of, expected, running
from rollcast.chat import ChatCodec
from rollcast.rundir import RunDir
from rollcast.sampler import Sampler
from run_checks import wait_for
from tiny_model import write_tiny_model

if TYPE_CHECKING:
    from rollcast.live.versions import Alias

pytestmark = pytest.mark.vllm


class Bench:
    """One replica with its engine, what it serves, and where policies are published."""

    def __init__(self, server: Server, policies: Policies, models: list[str], codec: ChatCodec) -> None:
        self.server, self.policies, self.models, self.codec = server, policies, models, codec
        self.client = client_of(server)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("live-vllm")
    models = [str(write_tiny_model(folder / f"model-{seed}", seed=seed, dtype="float32")) for seed in (0, 1)]
    codec = ChatCodec.from_folder(models[0])
    run = RunDir(folder / "runs" / "live")
    policies = Policies(run, models[0])
    policies.publish(0)

    async def start(alias: "Alias") -> Sampler:
        from rollcast.vllm_sampler import VllmSampler

        settings: Any = {"dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.1}
        return await VllmSampler.start(models[0], -1, record=folder / f"engine-{alias}.json", **settings)

    with running(run, codec, start) as server:
        yield Bench(server, policies, models, codec)


def greedy(bench: Bench) -> str:
    answer = bench.client.completions.create(model="policy", prompt="The town", max_tokens=12, temperature=0)
    return answer.choices[0].text


def test_answers_are_the_models_own(bench: Bench) -> None:
    assert greedy(bench) == expected(bench.models[0], bench.codec, "The town", 12)


def test_a_stream_tells_alternatives_and_a_seed_repeats(bench: Bench) -> None:
    asked: Any = {"model": "policy", "messages": ASK, "max_tokens": 16, "seed": 3, "logprobs": True, "top_logprobs": 2}
    chunks = list(bench.client.chat.completions.create(**asked, stream=True))
    places = [place for c in chunks if c.choices[0].logprobs for place in c.choices[0].logprobs.content or []]
    extra = chunks[-1].model_extra or {}
    assert len(places) == extra["policy_versions"][-1]["end"] and all(len(p.top_logprobs) == 2 for p in places)
    assert all(place.top_logprobs[0].logprob >= place.logprob for place in places)
    whole = bench.client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks)
    narrow = bench.client.completions.create(model="policy", prompt="The town", max_tokens=12, top_p=1e-6)
    assert narrow.choices[0].text == greedy(bench)


def test_a_stop_text_ends_the_answer_in_the_engine_too(bench: Bench) -> None:
    text = greedy(bench)
    stop = next(letter for letter in text[2:] if letter.isprintable() and letter != "\ufffd")
    answer = bench.client.completions.create(
        model="policy", prompt="The town", max_tokens=300, temperature=0, stop=stop
    )
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    wait_for(lambda: bench.server.replica.counts.answering == 0)


def test_updates_fall_into_answers_and_change_them(bench: Bench) -> None:
    """Each answer's spans are contiguous; after an update the answers are the new policy's own."""
    asked: Any = {"model": "policy", "messages": ASK, "max_tokens": 400, "temperature": 1.0, "stream": True}
    streams = [bench.client.chat.completions.create(**asked, seed=seed) for seed in range(4)]
    begun = [next(iter(stream)) for stream in streams]
    bench.policies.publish(1, bench.models[1])
    told = [(list(stream)[-1].model_extra or {})["policy_versions"] for stream in streams]
    assert all(chunk.choices for chunk in begun)
    assert all(spans[0]["start"] == 0 for spans in told)
    assert all(a["end"] == b["start"] and a["version"] < b["version"] for spans in told for a, b in pairwise(spans))
    assert any(len(spans) == 2 for spans in told), "the update fell into one of them"
    wait_for(lambda: bench.server.replica.resident == {"latest": 1})
    assert greedy(bench) == expected(bench.models[1], bench.codec, "The town", 12)


def test_whoever_leaves_ends_the_answer_in_the_engine(bench: Bench) -> None:
    body = {"model": "policy", "messages": ASK, "max_tokens": 450, "stream": True}
    with httpx.stream("POST", f"{bench.server.url}/v1/chat/completions", json=body, timeout=20) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_for(lambda: bench.server.replica.counts.answering == 0, 2.0)
    engine: Any = bench.server.replica._engines["latest"].sampler
    wait_for(lambda: not engine._engine.output_processor.request_states, 2.0)


def test_an_error_before_the_first_token_is_an_answer(bench: Bench) -> None:
    with pytest.raises(openai.BadRequestError, match="context of 512"):
        bench.client.completions.create(model="policy", prompt="word " * 200)
