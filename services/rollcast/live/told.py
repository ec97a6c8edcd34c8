"""An answer on its way to the client: whole, or as server-sent events, in OpenAI's form.

Owns: putting several answers to one question together, the two forms (chat and plain), and ending everything when the
client leaves. Does not know routes, keys, or how answers are made.

A client that leaves is noticed by what the server receives from it, not by a failing write: an engine that is slow to
say something would go on for nobody.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import Response

from rollcast.chat import ChatCodec
from rollcast.live.answers import (
    END_OF_STREAM,
    Alternative,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    Span,
    TokenLogprob,
    Usage,
    event,
)
from rollcast.live.gate import until_left
from rollcast.live.openai_errors import ApiError
from rollcast.live.replica import Piece, Replica
from rollcast.live.texts import BROKEN
from rollcast.live.versions import Alias
from rollcast.sampler import Drawing, EngineDied
from rollcast_learners.types import VersionSpan

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass
class Answer:
    """One of the answers to a question, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    version: int = -1
    spans: tuple[VersionSpan, ...] = ()
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.pieces.append(piece)
        self.version, self.finish_reason = piece.version, piece.finish_reason
        self.spans = piece.spans


@dataclass(frozen=True)
class Record:
    """What was asked and answered, to the token. Live policy -> whoever keeps answers, by their id."""

    id: str
    model: str
    created: float
    prompt_ids: tuple[int, ...]
    temperature: float
    answers: tuple[Answer, ...]

    @property
    def whole(self) -> bool:
        """Whether every answer came to its end."""
        return all(answer.finish_reason is not None for answer in self.answers)


@dataclass(frozen=True)
class Question:
    """Everything that decides about the answers."""

    replica: Replica
    alias: Alias
    model: str
    prompt_ids: tuple[int, ...]
    drawing: Drawing
    stops: tuple[str, ...]
    answers: int
    tells_logprobs: bool
    note: Callable[[Record], None]

    def drawing_of(self, number: int) -> Drawing:
        """Answers to one question differ: each has a seed of its own where one is given."""
        drawing = self.drawing
        if drawing.seed is None or number == 0:
            return drawing
        return replace(drawing, seed=drawing.seed + number)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, what it grew by), as they come. Closing it ends every answer."""
        if self.answers == 1:
            async with aclosing(self._one(0)) as only:
                async for piece in only:
                    yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()

        async def fill(number: int) -> None:
            try:
                async with aclosing(self._one(number)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait((number, piece))
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(fill(number)) for number in range(self.answers)]
        try:
            open_ones = len(tasks)
            while open_ones:
                found = await queue.get()
                if found is None:
                    open_ones -= 1
                else:
                    yield found
            await asyncio.gather(*tasks)  # Raises what one of them failed with.
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _one(self, number: int) -> Any:
        return self.replica.answer(self.alias, self.prompt_ids, self.drawing_of(number), self.stops)


class Form(ABC):
    """How answers look: the id, the model that answered, and the version that said the last token."""

    def __init__(self, name: str, codec: ChatCodec) -> None:
        self.id = name
        self.codec = codec
        self.created = int(time.time())

    def head(self, question: Question, version: int) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": question.model, "policy_version": version}

    @abstractmethod
    def whole(self, question: Question, answers: list[Answer], usage: Usage) -> ChatAnswer | CompletionAnswer:
        """All answers at once."""

    @abstractmethod
    def chunk(self, question: Question, number: int, piece: Piece, answer: Answer) -> ChatChunk | CompletionAnswer:
        """One more piece of answer `number`; `answer` is what it has become with it."""

    @abstractmethod
    def usage(self, question: Question, version: int, usage: Usage) -> ChatChunk | CompletionAnswer:
        """The chunk that tells the tokens used."""

    def token(self, number: int) -> str:
        """A token by itself, control tokens by name."""
        text: str = self.codec.tokenizer.decode([number])
        return text


class OfChat(Form):
    """`/v1/chat/completions`."""

    def whole(self, question: Question, answers: list[Answer], usage: Usage) -> ChatAnswer:
        choices = [
            ChatChoice(
                index=number,
                message=ChatMessage(content=answer.text),
                logprobs=self._logprobs(answer.pieces) if question.tells_logprobs else None,
                finish_reason=_reason(answer.finish_reason),
            )
            for number, answer in enumerate(answers)
        ]
        head = self.head(question, answers[-1].version)
        return ChatAnswer(**head, policy_versions=_spans(answers), choices=choices, usage=usage)

    def chunk(self, question: Question, number: int, piece: Piece, answer: Answer) -> ChatChunk:
        first = len(answer.pieces) == 1
        choice = ChatChunkChoice(
            index=number,
            delta=ChatDelta(role="assistant" if first else None, content=piece.text),
            logprobs=self._logprobs([piece]) if question.tells_logprobs else None,
            finish_reason=None if piece.finish_reason is None else _reason(piece.finish_reason),
        )
        told = None if piece.finish_reason is None else _spans_of(piece.spans, number)
        return ChatChunk(**self.head(question, piece.version), policy_versions=told, choices=[choice])

    def usage(self, question: Question, version: int, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.head(question, version), choices=[], usage=usage)

    def _logprobs(self, pieces: list[Piece]) -> ChatLogprobs:
        content = [
            TokenLogprob(
                **self._alternative(token, logprob),
                top_logprobs=[Alternative(**self._alternative(*other)) for other in others],
            )
            for token, logprob, others in _tokens(pieces)
        ]
        return ChatLogprobs(content=content)

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": None if BROKEN in text else list(text.encode())}


class OfCompletion(Form):
    """`/v1/completions`."""

    def whole(self, question: Question, answers: list[Answer], usage: Usage) -> CompletionAnswer:
        choices = [
            CompletionChoice(
                index=number,
                text=answer.text,
                logprobs=self._logprobs(answer.pieces, 0) if question.tells_logprobs else None,
                finish_reason=_reason(answer.finish_reason),
            )
            for number, answer in enumerate(answers)
        ]
        head = self.head(question, answers[-1].version)
        return CompletionAnswer(**head, policy_versions=_spans(answers), choices=choices, usage=usage)

    def chunk(self, question: Question, number: int, piece: Piece, answer: Answer) -> CompletionAnswer:
        before = len(answer.text) - len(piece.text)
        choice = CompletionChoice(
            index=number,
            text=piece.text,
            logprobs=self._logprobs([piece], before) if question.tells_logprobs else None,
            finish_reason=None if piece.finish_reason is None else _reason(piece.finish_reason),
        )
        told = None if piece.finish_reason is None else _spans_of(piece.spans, number)
        return CompletionAnswer(**self.head(question, piece.version), policy_versions=told, choices=[choice])

    def usage(self, question: Question, version: int, usage: Usage) -> CompletionAnswer:
        return CompletionAnswer(**self.head(question, version), choices=[], usage=usage)

    def _logprobs(self, pieces: list[Piece], offset: int) -> CompletionLogprobs:
        tokens, offsets, tops = [], [], []
        for token, _, others in _tokens(pieces):
            tokens.append(self.token(token))
            offsets.append(offset)
            offset += len(tokens[-1])
            tops.append({self.token(other): logprob for other, logprob in others})
        values = [logprob for _, logprob, _ in _tokens(pieces)]
        return CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)


class Whole(Response):
    """All answers in one JSON object, once they are there."""

    def __init__(self, question: Question, form: Form) -> None:
        super().__init__()
        self.question, self.form = question, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = [Answer() for _ in range(self.question.answers)]

        async def collect() -> None:
            async with aclosing(self.question.pieces()) as pieces:  # type: ignore[type-var]
                async for number, piece in pieces:
                    answers[number].add(piece)

        try:
            stayed = await while_there(collect(), receive)
        except EngineDied as error:
            raise lost(error) from error
        finally:
            self.question.note(_record(self.question, self.form, answers))
        if stayed:
            told = self.form.whole(self.question, answers, _usage(self.question, answers))
            await Response(told.model_dump_json(), media_type="application/json")(scope, receive, send)


class Events(Response):
    """The answers as server-sent events, one for each piece."""

    def __init__(self, question: Question, form: Form, wants_usage: bool) -> None:
        super().__init__()
        self.question, self.form, self.wants_usage = question, form, wants_usage
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = [Answer() for _ in range(self.question.answers)]
        try:
            await while_there(self._tell(answers, send), receive)
        except EngineDied as error:
            if not self.begun:
                raise lost(error) from error
            await send({"type": "http.response.body", "body": lost(error).event, "more_body": False})
        finally:
            self.question.note(_record(self.question, self.form, answers))

    async def _tell(self, answers: list[Answer], send: Send) -> None:
        async with aclosing(self.question.pieces()) as pieces:  # type: ignore[type-var]
            async for number, piece in pieces:
                answers[number].add(piece)
                chunk = event(self.form.chunk(self.question, number, piece, answers[number]))
                if not self.begun:
                    self.begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        end = END_OF_STREAM
        if self.wants_usage:
            usage = self.form.usage(self.question, answers[-1].version, _usage(self.question, answers))
            end = event(usage) + end
        await send({"type": "http.response.body", "body": end, "more_body": False})


EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def lost(error: EngineDied) -> ApiError:
    """503: the replica is about to be replaced."""
    return ApiError(503, f"the engine of this replica is lost, and another is started: {error}", None, "engine_lost", 5)


async def while_there(work: Any, receive: Receive) -> bool:
    """Does `work` as long as the client stays; whether it did."""

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(until_left(receive)())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        left.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def _record(question: Question, form: Form, answers: list[Answer]) -> Record:
    temperature = question.drawing.temperature
    return Record(form.id, question.model, time.time(), question.prompt_ids, temperature, tuple(answers))


def _usage(question: Question, answers: list[Answer]) -> Usage:
    return Usage.of(len(question.prompt_ids), sum(len(answer.token_ids) for answer in answers))


def _reason(reason: str | None) -> Any:
    return reason or "stop"


def _spans(answers: list[Answer]) -> list[Span]:
    return [span for number, answer in enumerate(answers) for span in _spans_of(answer.spans, number)]


def _spans_of(spans: tuple[VersionSpan, ...], number: int) -> list[Span]:
    return [Span(version=span.version, start=span.start, end=span.end, choice=number) for span in spans]


def _tokens(pieces: list[Piece]) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    return [
        (token, logprob, piece.alternatives[place] if piece.alternatives else ())
        for piece in pieces
        for place, (token, logprob) in enumerate(zip(piece.token_ids, piece.logprobs, strict=True))
    ]
