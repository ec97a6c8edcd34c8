"""Refusals as OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`.

Owns: the form of an error over HTTP, the status of each kind, and which field of a request a refusal names. Does not
know routes, keys, limits, nor what is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
LONGEST_MESSAGE = 1_000
LONGEST_PARAM = 200


class ApiError(Exception):
    """A request that is not answered: its status, why in words, the field to blame, and a code for programs.

    `retry_after_s` becomes the header Retry-After, in whole seconds, at least one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        # All five go to `args`, so that the error survives pickling on its way out of a Ray actor.
        super().__init__(status, message, param, code, retry_after_s)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = _printable(self.message, LONGEST_MESSAGE)
        param = None if self.param is None else _printable(self.param, LONGEST_PARAM)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def content(self) -> bytes:
        """The error object as JSON."""
        return json.dumps(self.body).encode()

    @property
    def event(self) -> bytes:
        """The error as an event of a stream that had begun; OpenAI's client raises on it."""
        return b"data: " + self.content + b"\n\n"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {"content-type": "application/json"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, -int(-self.retry_after_s // 1)))
        return headers


def no_key(why: str) -> ApiError:
    """401: no key, or not one of ours. The same words for each wrong key: nothing is told about the right ones."""
    return ApiError(401, f"{why}; send the header 'Authorization: Bearer KEY'", None, "invalid_api_key")


def unknown_model(asked: str, resident: Sequence[str]) -> ApiError:
    """404: a model that is not there; tells which are."""
    there = ", ".join(resident) or "none yet"
    return ApiError(404, f"there is no model {asked!r} here; resident are: {there}", "model", "model_not_found")


def too_long(prompt_tokens: int, context: int, param: str, exact: bool = True) -> ApiError:
    """400: a prompt that leaves no room for an answer; not `exact`: it has at least so many tokens."""
    count = f"{prompt_tokens}" if exact else f"at least {prompt_tokens}"
    why = f"the prompt has {count} tokens; the context of {context} has to hold it and an answer"
    return ApiError(400, f"{param}: {why}", param, "context_length_exceeded")


def refused(param: str, why: str) -> PydanticCustomError:
    """A check of a request's model, in a form that pydantic carries out unharmed; `param` names the field."""
    return PydanticCustomError("rollcast", "{why}", {"param": param, "why": why})


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 from what pydantic or FastAPI found wrong with a request; the first finding names the field."""
    first = errors[0]
    source, *place = first["loc"] or ("body",)
    if source != "body" and source not in ("path", "query", "header", "cookie"):
        place = [source, *place]
    context = first.get("ctx", {})
    inner = context.get("param") if first["type"] == "rollcast" else None
    param = field_name([*place, *([inner] if inner else [])])
    why = _why(first["type"], str(first["msg"]), context)
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(first["type"])
    return ApiError(400, f"{param or 'body'}: {why}{others}", param or "body", code or "invalid_value")


def field_name(place: Sequence[str | int]) -> str:
    """`messages[0].content` from a location of pydantic; names of union members (`<text>`) are left out."""
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not (part.startswith("<") and part.endswith(">")):
            name += f".{part}" if name else part
    return name


def _why(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "is required"
    if kind == "json_invalid":
        return f"not JSON: {context.get('error', message)}"
    return message[:1].lower() + message[1:]


def _printable(text: str, longest: int) -> str:
    """What a client sent may come back in a message: short, and as text that every client can decode."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return text.encode("utf-8", "replace").decode("utf-8")
