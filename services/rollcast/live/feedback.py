"""What people say of the live policy's answers: the request and its receipt, and the answer as it was served.

Owns: the models of `/v1/feedback`, the record of a served answer, and why feedback is refused. Does not know where
either is kept (`feedback_store.py`), HTTP, or what is learned from it (`rollcast.feedback_data`).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rollcast.live.answers import Told
from rollcast.live.openai_errors import ApiError, refused
from rollcast.live.protocol import Asked
from rollcast_learners.types import VersionSpan

MAX_EDIT = 100_000
"""Characters of an edited answer."""

AnswerId = Annotated[str, Field(min_length=1, max_length=200)]
Thumb = Literal["up", "down"]


@dataclass(frozen=True, eq=False)
class ServedAnswer:
    """One answer as it left the engine. Replica -> writer. P prompt tokens, A answer tokens."""

    id: str
    """`answer_id` of the response's `id`: of further choices (`n` > 1) `id/1`, `id/2`, ..."""
    time: float
    """Epoch seconds at its end."""
    key: str
    """Name of the API key that asked, never the key; "" where none is needed."""
    prompt: list[dict[str, Any]] | str
    """The messages of a chat, or the text to complete."""
    text: str
    """What was answered."""
    prompt_ids_P: NDArray[np.int32]
    answer_ids_A: NDArray[np.int32]
    logprobs_A: NDArray[np.float32]
    """Of the distribution sampled from, with temperature applied."""
    spans: tuple[VersionSpan, ...]
    """Which policy version said which answer tokens; offsets into the answer."""
    temperature: float
    finish_reason: str


class FeedbackRequest(Asked):
    """The body of `POST /v1/feedback`: what somebody says of one answer; at least one of the four."""

    answer: AnswerId
    """The `id` of the answer; of choice N of several, `id/N`."""
    thumb: Thumb | None = None
    """`up` or `down`."""
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    """From 0, useless, to 1, perfect."""
    preferred_to: AnswerId | None = None
    """Another answer to the same prompt, which this one is better than."""
    edit: Annotated[str, Field(min_length=1, max_length=MAX_EDIT)] | None = None
    """What the answer should have been."""

    @model_validator(mode="after")
    def _says_something(self) -> "FeedbackRequest":
        if not self.said:
            raise refused("", "give at least one of thumb, score, preferred_to and edit")
        if self.preferred_to == self.answer:
            raise refused("preferred_to", "it names the answer itself; name the other one")
        if self.edit is not None and ("\0" in self.edit or not self.edit.strip()):
            raise refused("edit", "it is blank, or holds a NUL character; give the answer as it should be")
        return self

    @property
    def said(self) -> dict[str, Any]:
        """What is said, by kind."""
        return self.model_dump(exclude={"answer"}, exclude_none=True)


class FeedbackReceipt(Told):
    """The answer of `POST /v1/feedback`: what is kept on this answer now."""

    object: Literal["feedback"] = "feedback"
    answer: str
    policy_version: int
    """The version that said the answer's last token; -1 for an empty answer."""
    thumb: Thumb | None = None
    score: float | None = None
    edit: str | None = None
    preferred_to: tuple[str, ...] = ()
    """All answers that this one was preferred to."""
    replaced: tuple[str, ...] = ()
    """The kinds of feedback that this request put in place of earlier ones."""


def answer_id(response: str, choice: int) -> str:
    """The id of one answer of a response, as feedback names it."""
    return response if choice == 0 else f"{response}/{choice}"


def unknown_answer(param: str, answer: str) -> ApiError:
    """404: there is no such answer, or it is not the asker's. Which of the two is not told."""
    why = f"{param}: there is no answer {answer!r} of this key; answers are kept for a time only"
    return ApiError(404, why, param, "answer_not_found")


def not_comparable(answer: str, other: str) -> ApiError:
    """400: a preference between answers to different questions."""
    why = f"preferred_to: {answer!r} and {other!r} answer different prompts; only answers to the same one are compared"
    return ApiError(400, why, "preferred_to", "different_prompts")


def unavailable(why: str) -> ApiError:
    """503: the database does not take it now."""
    return ApiError(503, f"feedback cannot be kept at the moment: {why}", None, "feedback_unavailable", 5.0)
