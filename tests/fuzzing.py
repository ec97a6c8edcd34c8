"""Random requests against the live policy's HTTP API, for whichever server is asked.

Owns: what is thrown (mutations of good requests, broken JSON, and what schemathesis makes of the app's own OpenAPI
schema) and what must come back: an answer, or an OpenAI error object below 500. Does not know the server.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from live_app import Asking, assert_refused, chat, complete

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OPERATIONS = ("/v1/policy/promote", "/v1/policy/rollback", "/v1/policy/canary", "/v1/fleet", "/v1/feedback")

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            *(
                "",
                " ",
                "\0",
                "\n",
                "\ufdd0",
                "\ufffe",
                "\U0010ffff",
                "\u202e",
                "e\u0301" * 9,
                "👩‍👩‍👧",
                "東京",
                "x" * 3_000,
            ),
            *("<|im_start|>", "<|im_end|>\n<|im_start|>system\n", "＜|im_start|＞", "</s>", "<|endoftext|>", "[INST]"),
            *("policy", "policy@best", "policy@latest", "policy@7", "policy@-1", "../../etc/passwd", "{{ 7*7 }}"),
            *("user", "system", "assistant", "tool", "text", "up", "'; DROP TABLE answers; --", "NaN", "0.7", "true"),
        ]
    ),
)
HALVES = st.sampled_from(["\ud800", "x\udfff", "\udc00\ud800"])
NUMBERS = st.one_of(
    st.integers(-2, 22),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(-0.5, 2.5),
    st.sampled_from([0, -0.0, 1.0, 1e-320, 1e308, 2**31, 2**63, -(2**63), 2**64, 10**400]),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, HALVES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "max_tokens", "stream", "user"),
        *("max_completion_tokens", "logprobs", "top_logprobs", "stream_options", "tools", "response_format", "echo"),
        *("logit_bias", "suffix", "best_of", "metadata", "workers", "version", "run", "share", "answer", "score"),
        *("thumb", "edit", "preferred_to", "extra_body", "prompt_embeds", "cache_salt", "vllm_xargs"),
    ]
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 8),
    "stop": st.one_of(st.text(min_size=1, max_size=9), st.lists(st.text(min_size=1, max_size=9), max_size=4)),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "max_tokens": st.integers(1, 16),
    "stream": st.booleans(),
    "user": TEXTS.filter(lambda text: len(text) <= 256),
    "model": st.sampled_from(["policy", "policy@latest", "policy@best"]),
}
"""What is answered, each by itself and all together."""
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool", "x"]), "content": TEXTS}
        ),
        st.fixed_dictionaries({"role": TEXTS, "content": VALUES}),
        VALUES,
    ),
    max_size=4,
)


@st.composite
def bodies(draw: st.DrawFn, base: dict[str, Any]) -> bytes:
    """A good request, now and then with some fields changed, and with its bytes changed."""
    asked = dict(base)
    if base:
        asked |= draw(st.fixed_dictionaries({}, optional=GOOD))
    if "messages" in base and draw(st.integers(0, 3)) == 0:
        asked["messages"] = draw(MESSAGES)
    if draw(st.integers(0, 3)):
        asked |= draw(st.dictionaries(FIELDS, st.one_of(VALUES, NUMBERS, TEXTS), max_size=3))
    body = json.dumps(asked).encode()
    if draw(st.integers(0, 5)) == 0:
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 10)))
        junk = st.sampled_from(
            [b"", b'"', b"{", b"]", b",", b"NaN", b"\\u0000", b"\\ud800", b"\xff", b"1e999", b"[" * 99]
        )
        body = body[:start] + draw(st.one_of(junk, st.binary(max_size=5))) + body[end:]
    return body


REQUESTS = st.one_of(
    st.tuples(st.just("POST"), st.just(CHAT), bodies(chat())),
    st.tuples(st.just("POST"), st.just(COMPLETIONS), bodies(complete())),
    st.tuples(st.sampled_from(["POST", "PUT"]), st.sampled_from(OPERATIONS), bodies({})),
)


def judge(response: httpx.Response, counts: Counter[int]) -> None:
    """Below 500, and an error object where it is not an answer; a stream may not hold an error."""
    counts[response.status_code] += 1
    if response.status_code == 200:
        stream = response.headers["content-type"].startswith("text/event-stream")
        assert not stream or (response.text.endswith("data: [DONE]\n\n") and '{"error"' not in response.text)
        assert stream or response.json() is not None
    else:
        assert_refused(response)
        if response.status_code == 400:
            assert response.json()["error"]["param"], response.text


def throw(asking: Asking, count: int) -> Counter[int]:
    """Sends `count` mutated requests and returns the status codes; raises on the first that is not as it must be."""
    counts: Counter[int] = Counter()

    @_settings(count)
    @given(REQUESTS)
    def one(request: tuple[str, str, bytes]) -> None:
        method, path, body = request
        judge(asking.ask(method, path, body), counts)

    one()
    return counts


def throw_by_schema(asking: Asking, app: FastAPI, count: int) -> Counter[int]:
    """Sends about `count` requests made from the schema of `app`, valid and invalid ones, to all of its operations."""
    counts: Counter[int] = Counter()
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    posts = [operation for operation in operations if operation.body]
    for operation in posts:
        for mode in modes:
            _throw_cases(asking, operation.as_strategy(generation_mode=mode), count // (2 * len(posts)), counts)
    return counts


def _throw_cases(asking: Asking, cases: Any, count: int, counts: Counter[int]) -> None:
    @_settings(count)
    @given(cases, st.sampled_from(["policy", "policy@best", None]))
    def one(case: Any, model: str | None) -> None:
        sent = case.as_transport_kwargs(base_url="http://localhost")
        body = sent.get("json", sent.get("data"))
        if isinstance(body, dict) and "model" in body and model is not None:
            body = body | {"model": model}  # By chance no schema's text names a model that is there.
        path = httpx.URL(sent["url"]).copy_merge_params(sent.get("params") or {}).raw_path.decode("ascii")
        judge(asking.ask(sent["method"], path, body), counts)

    one()


def _settings(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
