"""A server that speaks the live policy's protocol and knows a few sentences, for tests of who talks to it.

Owns: answers word by word, each under a newer policy version, feedback in a real database, the page. Does not know
engines, Ray or Serve: `rollcast.live` has those.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from rollcast.live.answers import END_OF_STREAM, ChatChunk, ChatChunkChoice, ChatDelta, Span, event
from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest, ServedAnswer
from rollcast.live.feedback_tables import sqlite_url
from rollcast.live.feedback_writer import FeedbackWriter
from rollcast.live.gate import guard
from rollcast.live.keys import Keys
from rollcast.live.limits import Limits
from rollcast.live.openai_errors import ApiError
from rollcast.live.page import page
from rollcast.live.protocol import ChatRequest, wanted_version
from rollcast_learners.types import VersionSpan

RESIDENT = {"latest": 7, "best": 5}


@dataclass
class Talker:
    """What the server says, and what it saw."""

    database: str
    words: list[str] = field(default_factory=lambda: ["Li", "ma", " <b>of</b> course"])
    seconds_per_word: float = 0.0
    asked: list[ChatRequest] = field(default_factory=list)
    cut: int = 0
    """Streams that the client left."""


def app_of(talker: Talker, keys: Keys | None) -> FastAPI:
    app = FastAPI()
    writer = FeedbackWriter(talker.database, 90, 10, every_s=0.05)

    @app.get("/")
    async def front() -> Response:
        content, headers = page()
        return Response(content, headers=headers)

    @app.get("/v1/policy")
    async def policy() -> dict[str, Any]:
        return {"policy_version": 7, "resident": RESIDENT}

    @app.post("/v1/feedback")
    async def feedback(asked: FeedbackRequest, request: Request) -> FeedbackReceipt:
        key = request.state.key
        return await writer.give(asked, key.id, key.allows("admin"))

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> StreamingResponse:
        wanted_version(asked.model, RESIDENT)
        talker.asked.append(asked)
        if asked.turns[-1][1] == "fail":
            raise ApiError(503, "the engine is being restarted", None, "unavailable", 3)
        return StreamingResponse(stream(asked, request), media_type="text/event-stream")

    async def stream(asked: ChatRequest, request: Request) -> AsyncIterator[bytes]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        told = {"id": name, "created": int(time.time()), "model": asked.model}
        versions = (VersionSpan(6, 0, 1), VersionSpan(7, 1, len(talker.words)))
        try:
            for place, word in enumerate(talker.words):
                await asyncio.sleep(talker.seconds_per_word)
                choice = ChatChunkChoice(index=0, delta=ChatDelta(content=word))
                yield event(ChatChunk(**told, policy_version=6 + bool(place), choices=[choice]))
            if asked.turns[-1][1] == "break":
                yield ApiError(503, "the engine died", None, "engine_dead").event
                return
            await writer.record([answer_of(name, asked, talker, request.state.key.id, versions)])
            choice = ChatChunkChoice(index=0, delta=ChatDelta(), finish_reason="stop")
            last = [Span(version=span.version, start=span.start, end=span.end, choice=0) for span in versions]
            yield event(ChatChunk(**told, policy_version=7, policy_versions=last, choices=[choice]))
            yield END_OF_STREAM
        except asyncio.CancelledError:
            talker.cut += 1
            raise

    guard(app, keys, Limits())
    return app


def answer_of(name: str, asked: ChatRequest, talker: Talker, key: str, versions: Any) -> ServedAnswer:
    ids = np.arange(len(talker.words), dtype=np.int32)
    return ServedAnswer(
        id=name,
        time=time.time(),
        key=key,
        prompt=[{"role": role, "content": text} for role, text in asked.turns],
        text="".join(talker.words),
        prompt_ids_P=np.frombuffer(str(asked.turns).encode(), np.uint8).astype(np.int32),
        answer_ids_A=ids,
        logprobs_A=np.full(len(ids), -1.0, np.float32),
        spans=versions,
        temperature=1.0,
        finish_reason="stop",
    )


@contextmanager
def talking(folder: Path, keys: Keys | None = None, **settings: Any) -> Iterator[tuple[str, Talker]]:
    """The server for the time of a block: its URL, and what it saw."""
    talker = Talker(sqlite_url(folder / "feedback.sqlite"), **settings)
    config = uvicorn.Config(app_of(talker, keys), "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", talker
    finally:
        server.should_exit = True
        thread.join(20)
