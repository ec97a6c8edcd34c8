"""The gate before the live policy's routes: an ASGI middleware, and how an app's errors become OpenAI's.

Owns: the order of checks of a request (key, scope, rate, size, JSON, turn) and the answer to what does not pass. Does
not know Serve, engines, nor what routes do; handlers see the caller as `request.state.caller` and book what they used
with `request.state.caller.spend(tokens)`.

Without keys it answers only requests made to this machine by its own name, from no other site: a page of the web,
opened in a browser here, can neither read nor steer the policy.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rollcast.live.json_body import read_json
from rollcast.live.keys import ANYONE, Key, Keys, scope_of
from rollcast.live.limits import ClientLeft, Doorkeeper, Leaving, Limits
from rollcast.live.openai_errors import ApiError, from_validation, no_key

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WORK = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes that take an engine's time: they wait for a turn. All others are answered at once, also under load."""
UNREADABLE = "unsupported_media_type"
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Gate:
    """Lets through what has a right to be answered. Without `keys` every caller on this machine has all rights."""

    def __init__(self, app: App, keys: Keys | None, limits: Limits, work: frozenset[str] = WORK) -> None:
        self.app = app
        self.keys = keys
        self.doorkeeper = Doorkeeper(limits)
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except ClientLeft:
            return
        except ApiError as error:
            if started:
                raise
            await refuse(error, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        needed = scope_of(scope["method"], path)
        if needed is None:
            await self.app(scope, receive, send)
            return
        key = self._key_of(scope)
        if not key.allows(needed):
            raise ApiError(
                403, f"{path} needs a key of scope {needed}; this one is of scope {key.scope}", None, "scope"
            )
        caller = self.doorkeeper.caller(key.id, key.requests_per_s, key.concurrent)
        scope.setdefault("state", {}).update(caller=caller, key=key)
        leaving = until_left(receive)
        with self.doorkeeper.admit(caller):
            if scope["method"] in WITH_BODY:
                receive = await self._checked_body(scope, receive)
            if path in self.work:
                async with self.doorkeeper.turn(leaving):
                    await self.app(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    def _key_of(self, scope: Scope) -> Key:
        if self.keys is None:
            refuse_strangers(scope)
            return ANYONE
        sent = headers_of(scope, b"authorization")
        if not sent:
            raise no_key("this request has no key")
        kind, _, presented = sent[0].partition(b" ")
        if len(sent) > 1 or kind.lower() != b"bearer":
            raise no_key("this request's header Authorization is not of the form 'Bearer KEY'")
        key = self.keys.find(presented.strip())
        if key is None:
            raise no_key("there is no such key")
        return key

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        refuse_headers(scope, self.doorkeeper.limits.body_bytes)
        body = await read_body(receive, self.doorkeeper.limits)
        if body:
            if media_type(scope) != b"application/json":
                raise ApiError(
                    415, "the body has to be JSON: send 'Content-Type: application/json'", "body", UNREADABLE
                )
            read_json(body)
        return replayed(body, receive)


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The body, as long as it is not too large (413) or too slow (408)."""
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(limits.body_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise too_large(limits.body_bytes)
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, f"the body did not come in within {limits.body_s:g} s", "body", "body_timeout") from None
    return bytes(body)


def until_left(receive: Receive) -> Leaving:
    """Of a client whose request is whole: it has nothing more to say."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return left


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body once, and then what comes after it: that the client left."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def too_large(most: int) -> ApiError:
    """413."""
    return ApiError(413, f"the body has more than {most} bytes", "body", "request_too_large")


def refuse_headers(scope: Scope, most: int) -> None:
    """What the headers say about the body is enough to refuse it."""
    if any(encoding.lower() != b"identity" for encoding in headers_of(scope, b"content-encoding")):
        raise ApiError(415, "the body has to be sent as it is: without Content-Encoding", "body", UNREADABLE)
    for length in headers_of(scope, b"content-length"):
        if not length.isdigit() or len(length) > 18:
            raise ApiError(400, "the header Content-Length is no length", "body", "invalid_value")
        if int(length) > most:
            raise too_large(most)


def refuse_strangers(scope: Scope) -> None:
    """403 unless the request names this machine as a loopback address, and comes from no page of another site."""
    hosts = headers_of(scope, b"host")
    if len(hosts) != 1 or not is_loopback(hosts[0]):
        raise ApiError(403, "without keys this server answers this machine only, as localhost", None, "host")
    for origin in headers_of(scope, b"origin"):
        if urlsplit(origin).netloc != hosts[0]:
            raise ApiError(403, "without keys this server answers no page of another site", None, "origin")


def is_loopback(host: bytes) -> bool:
    """Whether a header Host names this machine: `localhost`, `127.x.x.x` or `[::1]`, with any port."""
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:  # No address, or no ASCII.
        return False


def route_path(scope: Scope) -> str:
    """The path as the app's router sees it: below the prefix at which the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path


def headers_of(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [bytes(value) for header, value in scope["headers"] if header.lower() == name]


def media_type(scope: Scope) -> bytes:
    """The body's type, without parameters."""
    sent = headers_of(scope, b"content-type")
    return sent[0].partition(b";")[0].strip().lower() if len(sent) == 1 else b""


async def refuse(error: ApiError, send: Send) -> None:
    """Answers with the error object."""
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    headers.append((b"content-length", str(len(error.content)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.content, "more_body": False})


def guard(app: "FastAPI", keys: Keys | None, limits: Limits) -> None:
    """Puts the gate before `app`, and makes every error of it OpenAI's. Call it where the app is to run."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    def answer(error: ApiError) -> "Response":
        return Response(error.content, error.status, error.headers)

    async def own(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, ApiError)
        return answer(error)

    async def invalid(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, RequestValidationError)
        return answer(from_validation(error.errors()))

    async def unrouted(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        refusal = answer(
            ApiError(error.status_code, f"{where}: {error.detail}", None, CODES.get(error.status_code, "refused"))
        )
        refusal.headers.update(error.headers or {})
        return refusal

    async def unexpected(request: "Request", error: Exception) -> "Response":
        return answer(ApiError(500, "an error of this server, not of the request; its log has the details"))

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(Exception, unexpected)
    app.add_middleware(Gate, keys=keys, limits=limits)


CODES = {404: "not_found", 405: "method_not_allowed"}
