"""What the live policy says back: OpenAI's answers and chunks, with the policy's version in each.

Owns: the fields of answers, chunks and model lists. Does not know HTTP, engines or tokens.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "abort"]
END_OF_STREAM = b"data: [DONE]\n\n"


class Told(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null")


class Span(Told):
    """Policy `version` sampled the tokens [start, end) of answer number `choice`."""

    version: int
    start: int
    end: int
    choice: int = 0


class Usage(Told):
    """Tokens used, all answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        """With the sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class Alternative(Told):
    """A token that could have stood there; `bytes` are its UTF-8 bytes, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Alternative):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[Alternative] = []


class ChatLogprobs(Told):
    """Log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Told):
    """Log-probabilities of a plain answer's tokens, in columns; `text_offset` counts characters of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(Told):
    """What the policy said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Told):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Versioned(Told):
    """What every answer and every chunk carries."""

    id: str
    """Names the answer, for `/v1/feedback` too."""
    created: int
    """Seconds since 1970."""
    model: str
    policy_version: int
    """The version that sampled the last token."""
    policy_versions: list[Span] | None = None
    """Which version sampled which tokens; in a stream, on the last chunk of each answer."""


class ChatAnswer(Versioned):
    """Answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Told):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionAnswer(Versioned):
    """Answer of `/v1/completions`, and each chunk of its stream: the latter without usage but in the last."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatDelta(Told):
    """What a chunk adds; the role stands in the first one."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Told):
    """What a chunk adds to one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Versioned):
    """One event of a stream of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Told):
    """A name that `model` takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rollcast"
    policy_version: int
    max_model_len: int


class ModelList(Told):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def event(chunk: ChatChunk | CompletionAnswer) -> bytes:
    """A chunk as a server-sent event. JSON holds no bare line break, so that one line is enough."""
    return b"data: " + chunk.model_dump_json().encode() + b"\n\n"
