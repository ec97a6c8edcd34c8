"""What clients of the live policy ask and get: OpenAI's chat and plain completions.

Owns: the fields of requests and answers, their bounds, and what of OpenAI's interface is taken, ignored or refused.
Does not know HTTP, engines, tokenizers, nor which versions are resident.

Requests are strict: a wrong type, an unknown field or a value out of bounds is refused by name. What OpenAI's clients
send and this server cannot honour is refused too, unless it says what happens anyway (`tools: []`, `echo: false`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from rollcast.live.openai_errors import ApiError, refused, too_long, unknown_model

MOST_ANSWERS = 8
MOST_MESSAGES = 1_024
MOST_PARTS = 256
MOST_STOPS = 4
LONGEST_STOP = 64
LONGEST_NAME = 256
COLDEST = 0.01
NARROWEST = 1e-6
MODEL = re.compile(r"policy(?:@(latest|best|candidate|0|[1-9][0-9]{0,17}))?", re.ASCII)

ANYTHING = object()
"""In the tables below: the field is read by nobody, whatever it says."""

Harmless = dict[str, tuple[Any, ...]]

# Fields of OpenAI's interface that this server does not have, and the values that ask for nothing beyond it.
SHARED: Harmless = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "metadata": (ANYTHING,),
    "safety_identifier": (ANYTHING,),
    "prompt_cache_key": (ANYTHING,),
}
OF_CHAT: Harmless = SHARED | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (ANYTHING,),
    "prediction": (),
    "prompt_cache_options": (ANYTHING,),
    "prompt_cache_retention": (ANYTHING,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
OF_COMPLETIONS: Harmless = SHARED | {"best_of": (1,), "echo": (False,), "suffix": ("",)}
# What an answer of ours holds beside its text when a client sends it back as a message.
OF_MESSAGES: Harmless = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


def without_unsupported(asked: Any, table: Harmless) -> Any:
    """`asked` without the fields of `table`. Raises what names a field that asks for more than this server has."""
    if not isinstance(asked, dict):
        return asked
    for name, value in asked.items():
        if name in table and value is not None and not any(_equal(value, harmless) for harmless in table[name]):
            raise refused(name, "this server does not have it; leave it out")
    return {name: value for name, value in asked.items() if name not in table}


def _equal(value: Any, harmless: Any) -> bool:
    same_kind = isinstance(value, bool) == isinstance(harmless, bool)  # In Python 0 == False.
    return harmless is ANYTHING or (same_kind and bool(value == harmless))


class Asked(BaseModel):
    """A part of a request: strict, and without surprises."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TextPart(Asked):
    """A part of a message. Images, sound and files are refused."""

    type: Literal["text"]
    text: str


def _kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


# Tags in angle brackets are left out of the names of fields (`openai_errors.field_name`).
TextOrParts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(max_length=MOST_PARTS), Tag("<list>")],
    Discriminator(_kind),
]
StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=MOST_STOPS), Tag("<list>")],
    Discriminator(_kind),
]
Prompts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(min_length=1, max_length=1), Tag("<list>")],
    Discriminator(_kind),
]


class Message(Asked):
    """One turn of a conversation. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, asked: Any) -> Any:
        return without_unsupported(asked, OF_MESSAGES)

    @property
    def text(self) -> str:
        """What is said; parts are joined without anything between them."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> tuple[str, str]:
        """(role as chat templates know it, text)."""
        return ("system" if self.role == "developer" else self.role), self.text


def _steady(temperature: float) -> float:
    """Below this, sampling is greedy in all but name, and dividing by it overflows in engines."""
    return temperature if temperature >= COLDEST else 0.0


def _not_nothing(top_p: float) -> float:
    """Engines compute in single precision, where a smaller share would be none at all."""
    return max(top_p, NARROWEST)


class StreamOptions(Asked):
    """How an answer is streamed."""

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the tokens used."""
    include_obfuscation: bool | None = None
    """Ignored: chunks are not padded."""


class SamplingRequest(Asked):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(max_length=LONGEST_NAME)]
    """`policy` (the same as `policy@latest`), `policy@best`, or `policy@VERSION` where that version is resident."""
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    """Answers to give; 1 by default."""
    stop: Stops | None = None
    """Texts at which an answer ends; they are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Makes sampling repeatable, as long as the version stays the same."""
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_steady)] | None = None
    """1 by default; 0 is greedy, and so is whatever is below 0.01."""
    top_p: Annotated[float, Field(gt=0, le=1), AfterValidator(_not_nothing)] | None = None
    """Share of the probability to sample from; 1 by default."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of an answer."""
    stream: bool | None = None
    """Whether the answer comes in chunks, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    user: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    """Ignored."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "goes with `stream: true` only")
        return self

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that tells the tokens used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit(self) -> tuple[str, int | None]:
        """(name of the field that limits the answer, its value)."""
        return "max_tokens", self.max_tokens


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer word for `max_tokens`."""
    logprobs: bool | None = None
    """Whether to tell the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to tell at each position; only with `logprobs`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, asked: Any) -> Any:
        return without_unsupported(asked, OF_CHAT)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "goes with `logprobs: true` only")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise refused("max_tokens", "is the old word for `max_completion_tokens`: give one of them")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to tell; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each message, for `ChatCodec.converse`."""
        return [message.turn for message in self.messages]


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Prompts
    """Text to go on from, plain or as a list of one. Token ids are refused: they could spell control tokens."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many of the likeliest tokens to tell at each position, beside the token itself."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, asked: Any) -> Any:
        return without_unsupported(asked, OF_COMPLETIONS)

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to tell; None: no log-probabilities at all."""
        return self.logprobs


class Promote(Asked):
    """`POST /v1/policy/promote`: make a resident version the best one."""

    version: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The version; without it, the candidate."""


class Rollback(Asked):
    """`POST /v1/policy/rollback`: back to the best version before."""

    version: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The version; without it, the one before."""


class FleetSize(Asked):
    """`PUT /v1/fleet`: how many rollout workers a run has."""

    workers: Annotated[int, Field(ge=0, le=100_000)]
    """Rollout workers wanted."""
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """Name of the run; needed only where several runs are served."""


def wanted_version(model: str, resident: Mapping[str, int]) -> int:
    """The version that `model` asks for. `resident`: version by alias, such as `{"latest": 7, "best": 5}`.

    Raises `ApiError` (404) that lists what is resident.
    """
    match = MODEL.fullmatch(model)
    if match is not None:
        asked = match[1] or "latest"
        if asked in resident:
            return resident[asked]
        if asked.isdigit() and int(asked) in resident.values():
            return int(asked)
    names = [f"policy@{alias} (version {version})" for alias, version in resident.items()]
    raise unknown_model(model, names)


def room_for_answer(request: ChatRequest | CompletionRequest, prompt_tokens: int, context: int, most: int) -> int:
    """Most tokens of an answer to `request`: what it asks for, else `most` or what the context leaves.

    Raises `ApiError` (400) when the prompt leaves no room, or more is asked for than there can be.
    """
    prompt_field = "messages" if isinstance(request, ChatRequest) else "prompt"
    left = context - prompt_tokens
    if left < 1:
        raise too_long(prompt_tokens, context, prompt_field)
    name, asked = request.limit
    if asked is None:
        return min(most, left)
    if asked > most:
        raise ApiError(400, f"{name}: {asked} is more than this server gives, {most}", name, "invalid_value")
    if asked > left:
        why = f"{asked} after a prompt of {prompt_tokens} tokens do not fit the context of {context}"
        raise ApiError(400, f"{name}: {why}", name, "context_length_exceeded")
    return asked
