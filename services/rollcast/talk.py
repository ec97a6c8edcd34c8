"""A client of the live policy: questions, streamed answers with their policy versions, feedback.

Owns: HTTP to a served policy, and what is told when it cannot be had. Does not know terminals or the server's insides:
it speaks OpenAI's protocol with rollcast's additions (docs/feedback.md).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rollcast.errors import RollcastError, RunFailed, UsageError

KEY = "ROLLCAST_API_KEY"
"""Environment variable that holds the API key: on the command line everybody could read it."""
CONNECT_S, SILENCE_S = 5.0, 120.0

Message = Mapping[str, str]


@dataclass(frozen=True)
class Answered:
    """An answer, whole."""

    id: str
    text: str
    model: str
    policy_version: int
    policy_versions: tuple[tuple[int, int, int], ...]
    """(version, start, end) over its tokens."""
    finish_reason: str | None

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest version that had a part in it."""
        all_of_them = [version for version, _, _ in self.policy_versions] or [self.policy_version]
        return min(all_of_them), max(all_of_them)


class PolicyClient:
    """A served policy at `url`, with or without `/v1` at its end; `key` is that of the environment if not given."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = _base(url)
        key = os.environ.get(KEY) if key is None else key
        loopback = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            trust_env=not loopback,  # A proxy cannot reach this machine's own address.
        )

    def ask(self, messages: Sequence[Message], model: str = "policy", **sampling: Any) -> Iterator[str | Answered]:
        """The answer piece by piece, and at last all of it. Closing the iterator cuts the answer.

        `sampling` is what OpenAI calls it: `max_tokens`, `temperature`, ... Raises `RollcastError`.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **sampling}
        with self._told(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refused(self.url, response)
            yield from _pieces(response)

    def feedback(self, answer: str, **said: Any) -> dict[str, Any]:
        """Gives feedback on an answer: `thumb`, `score`, `preferred_to` or `edit`. Raises `RollcastError`."""
        return self._json("POST", "/v1/feedback", {"answer": answer, **said})

    def policy(self) -> dict[str, Any]:
        """What is served: version, step, age, and what is resident."""
        return self._json("GET", "/v1/policy", None)

    def close(self) -> None:
        self._client.close()

    def _json(self, method: str, path: str, body: Any) -> dict[str, Any]:
        with self._told():
            response = self._client.request(method, path, json=body)
            if response.status_code != 200:
                raise _refused(self.url, response)
            found = response.json()
        if not isinstance(found, dict):
            raise _no_rollcast(self.url, "it answers something else")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            fix = "Start one with `rollcast serve RUN`, or give the right URL."
            raise RunFailed(f"Nobody answers at {self.url}.", str(error), fix) from error
        except httpx.TimeoutException as error:
            why = f"{type(error).__name__} after {SILENCE_S:g} s"
            raise RunFailed(
                f"{self.url} went silent.", why, "Try again; `rollcast status` tells of the run."
            ) from error
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            raise RunFailed(f"The connection to {self.url} broke.", why, "Try again.") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _no_rollcast(self.url, f"{type(error).__name__}: {error}") from error


def _base(url: str) -> str:
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise UsageError(
            f"{url!r} is no address of a served policy.", "It names no host.", "Write one as http://127.0.0.1:8000."
        )
    return url.rstrip("/").removesuffix("/v1")


def _pieces(response: httpx.Response) -> Iterator[str | Answered]:
    text, reason = "", None
    spans: tuple[tuple[int, int, int], ...] = ()
    last: dict[str, Any] = {}
    for line in response.iter_lines():
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise RunFailed("The answer was cut off.", str(chunk["error"]["message"]), "Ask again.")
        last = chunk
        spans = tuple((s["version"], s["start"], s["end"]) for s in chunk.get("policy_versions") or ()) or spans
        for choice in chunk["choices"]:
            reason = choice.get("finish_reason") or reason
            if piece := choice["delta"].get("content"):
                text += piece
                yield piece
    if not last:
        raise RunFailed("The answer was cut off.", "The stream ended before it began.", "Ask again.")
    yield Answered(last["id"], text, last["model"], int(last["policy_version"]), spans, reason)


def _refused(url: str, response: httpx.Response) -> RollcastError:
    try:
        why = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _no_rollcast(url, f"it answers with status {response.status_code}")
    fixes = {
        401: f"Put your key into the environment variable {KEY}.",
        403: f"Use another key, in the environment variable {KEY}.",
        404: "Name what is there.",
        429: f"Try again in {response.headers.get('retry-after', 'a few')} s.",
        503: "Try again in a few seconds.",
    }
    kind = RunFailed if response.status_code in (429, 500, 503) else UsageError
    return kind(f"{url} refuses (status {response.status_code}).", why, fixes.get(response.status_code, "Change that."))


def _no_rollcast(url: str, why: str) -> RunFailed:
    return RunFailed(f"{url} does not serve a policy of rollcast.", why, "Give the URL that `rollcast serve` prints.")
