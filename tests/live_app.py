"""A live policy without engines: the gate and the models around a tiny FastAPI app that answers by a script.

Owns: the routes of `interfaces.md` with scripted answers, for tests of what stands before them. Does not know Serve.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from json import dumps
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from rollcast.live.answers import (
    END_OF_STREAM,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    ModelCard,
    ModelList,
    Span,
    Usage,
    event,
)
from rollcast.live.gate import guard
from rollcast.live.keys import Keys
from rollcast.live.limits import Limits
from rollcast.live.protocol import (
    ChatRequest,
    CompletionRequest,
    FleetSize,
    Promote,
    Rollback,
    room_for_answer,
    wanted_version,
)

CONTEXT = 512
MOST_NEW = 64
RESIDENT = {"latest": 7, "best": 5}
SAID = "Paris."
GENEROUS = Limits(requests_per_s=1e6, burst=10**6, tokens_per_minute=10**12)


def scripted_app(keys: Keys | None = None, limits: Limits = GENEROUS) -> FastAPI:
    """The app, as the server builds it; every answer is "Paris.", a token a character."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _generating(app)
    _operating(app)
    guard(app, keys, limits)
    return app


def _generating(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        head = _admitted(asked, sum(len(text) for _, text in asked.turns), request)
        if asked.stream:
            return StreamingResponse(_chat_stream(asked, head), media_type="text/event-stream")
        choices = [
            ChatChoice(index=i, message=ChatMessage(content=SAID), finish_reason="stop") for i in range(asked.answers)
        ]
        spans = [Span(version=head["policy_version"], start=0, end=len(SAID), choice=i) for i in range(asked.answers)]
        return ChatAnswer(**head, policy_versions=spans, choices=choices, usage=Usage.of(1, len(SAID)))

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> CompletionAnswer:
        head = _admitted(asked, len(asked.text), request)
        choices = [CompletionChoice(index=i, text=SAID, finish_reason="stop") for i in range(asked.answers)]
        spans = [Span(version=head["policy_version"], start=0, end=len(SAID), choice=i) for i in range(asked.answers)]
        return CompletionAnswer(**head, policy_versions=spans, choices=choices, usage=Usage.of(1, len(SAID)))


def _admitted(asked: ChatRequest | CompletionRequest, prompt_tokens: int, request: Request) -> dict[str, Any]:
    version = wanted_version(asked.model, RESIDENT)
    room_for_answer(asked, prompt_tokens, CONTEXT, MOST_NEW)
    request.state.caller.spend(prompt_tokens + len(SAID) * asked.answers)
    return {
        "id": f"answer-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": f"policy@{version}",
        "policy_version": version,
    }


async def _chat_stream(asked: ChatRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    for index in range(asked.answers):
        first = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=SAID))
        yield event(ChatChunk(**head, choices=[first]))
        last = ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason="stop")
        spans = [Span(version=head["policy_version"], start=0, end=len(SAID), choice=index)]
        yield event(ChatChunk(**head, policy_versions=spans, choices=[last]))
    if asked.wants_usage:
        yield event(ChatChunk(**head, choices=[], usage=Usage.of(1, len(SAID) * asked.answers)))
    yield END_OF_STREAM


def _operating(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/v1/models")
    async def models() -> ModelList:
        cards = [
            ModelCard(id=f"policy@{alias}", created=0, policy_version=version, max_model_len=CONTEXT)
            for alias, version in RESIDENT.items()
        ]
        return ModelList(data=cards)

    @app.get("/v1/policy")
    async def policy() -> dict[str, int]:
        return RESIDENT

    @app.post("/v1/policy/promote")
    async def promote(asked: Promote) -> Promote:
        return asked

    @app.post("/v1/policy/rollback")
    async def rollback(asked: Rollback) -> Rollback:
        return asked

    @app.get("/v1/fleet")
    async def fleet() -> dict[str, int]:
        return {"workers": 1}

    @app.put("/v1/fleet")
    async def scale(asked: FleetSize) -> FleetSize:
        return asked


class Asking:
    """A client of an app in this process, for tests that do not care that the app is asynchronous.

    With `url` it asks a server there instead. `ask` sends `body` as JSON, or as it is when it is bytes.
    """

    def __init__(self, app: FastAPI | None = None, key: str | None = None, url: str = "http://localhost") -> None:
        transport = None if app is None else httpx.ASGITransport(app)
        self.key = key
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(transport=transport, base_url=url, timeout=60, trust_env=False)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Sequence[tuple[str, str]] = (), json: bool = True
    ) -> httpx.Response:
        sent = list(headers)
        if self.key is not None and not any(name.lower() == "authorization" for name, _ in sent):
            sent.append(("Authorization", f"Bearer {self.key}"))
        if json and body is not None and not any(name.lower() == "content-type" for name, _ in sent):
            sent.append(("Content-Type", "application/json"))
        content = body if body is None or isinstance(body, bytes) else dumps(body).encode()
        return self._runner.run(self._client.request(method, path, content=content, headers=sent))

    def run(self, work: Any) -> Any:
        """Awaits it on the client's loop."""
        return self._runner.run(work)

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


def chat(**fields: Any) -> dict[str, Any]:
    """A request that is answered, with `fields` in place of its own."""
    return {"model": "policy", "messages": [{"role": "user", "content": "Capital of France?"}]} | fields


def complete(**fields: Any) -> dict[str, Any]:
    """The same for plain completions."""
    return {"model": "policy", "prompt": "The capital of France is"} | fields


def assert_refused(
    response: httpx.Response, status: int | None = None, param: str | None = None, name: str = ""
) -> None:
    """It is OpenAI's error object and nothing else, below 500; `param` is the field that it has to name."""
    what = f"{name or response.request.url} gave {response.status_code}: {response.text[:500]}"
    told = response.json()
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}, what
    assert 400 <= response.status_code < 500, what
    assert status is None or response.status_code == status, f"{what}; {status} was due"
    assert isinstance(told["error"]["message"], str) and told["error"]["message"], what
    assert isinstance(told["error"]["code"], str), what
    assert param is None or told["error"]["param"] == param, f"{what}; {param} was due"
    assert response.headers["content-type"] == "application/json", what
    assert response.status_code != 429 or int(response.headers["retry-after"]) >= 1, what
