"""Bad and random requests against the live policy itself: its routes, a replica with a scripted engine, real sockets.

The same corpus as against the edge alone (`test_live_edge.py`); behind Ray Serve it is sent in `e2e/test_live_edge.py`.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bad_requests import CHAT, COMPLETIONS, CORPUS, FINE, FINE_COMPLETIONS
from fuzzing import throw, throw_by_schema
from live_app import Asking, assert_refused, chat
from live_server import GENEROUS, Policies, Server, running, scripted
from rollcast.chat import ChatCodec
from rollcast.live.keys import KeysFile, add_key, make_key, scope_of
from rollcast.rundir import RunDir
from tiny_model import write_tiny_model


class OneWorker:
    """A fleet of as many workers as were asked for last."""

    def __init__(self) -> None:
        self.workers = 1

    async def status(self) -> dict[str, Any]:
        return {"workers": self.workers}

    async def scale(self, workers: int) -> dict[str, Any]:
        self.workers = workers
        return {"workers": workers}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Asking, str]]:
    """Policies 3 (best) and 4 (latest), keys required; the client has an admin's key, the text is a user's."""
    folder = tmp_path_factory.mktemp("corpus")
    codec = ChatCodec.from_folder(model := str(write_tiny_model(folder / "model", dtype="float32")))
    texts = []
    for name, scope in (("root", "admin"), ("alice", "user")):
        key, text = make_key(name, scope)
        add_key(folder / "keys.json", key)
        texts.append(text)
    policies = Policies(RunDir(folder / "runs" / "live"), model)
    policies.found_best(policies.publish(3), 0.5)
    policies.publish(4)
    start, keys = scripted(codec), KeysFile(folder / "keys.json")
    with running(policies.run, codec, start, keys, GENEROUS, OneWorker()) as server:
        asking = Asking(None, texts[0], server.url)
        yield server, asking, texts[1]
        asking.close()


def test_every_bad_request_is_refused_by_name(served: tuple[Server, Asking, str]) -> None:
    server, asking, _ = served
    for bad in CORPUS:
        assert_refused(
            asking.ask(bad.method, bad.path, bad.body, bad.headers, json=False), bad.status, bad.param, bad.name
        )
    assert asking.ask("POST", CHAT, chat()).status_code == 200
    assert server.replica.counts.answering == 0


def test_what_clients_send_is_answered(served: tuple[Server, Asking, str]) -> None:
    _, asking, _ = served
    assert asking.ask("GET", "/v1/policy").json()["resident"] == {"latest": 4, "best": 3, "candidate": 4}
    for path, requests in ((CHAT, FINE), (COMPLETIONS, FINE_COMPLETIONS)):
        for asked in requests:
            response = asking.ask("POST", path, asked)
            assert response.status_code == 200, response.text
            assert response.json()["policy_version"] == (3 if asked["model"] == "policy@best" else 4)


def test_every_route_is_known_to_the_keys(served: tuple[Server, Asking, str]) -> None:
    """A route that is added and forgotten here would be open to every key: say below what it needs."""
    server, asking, user = served
    needs = {
        "user": {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/v1/policy"},
        "admin": {"/v1/policy/promote", "/v1/policy/rollback", "/v1/policy/canary", "/v1/fleet"},
        None: {"/healthz", "/"},
    }
    needs["user"] |= {"/v1/feedback"}
    routes, keys, limits = server._made
    for route in routes.app(keys, limits).routes:
        for method in route.methods:  # type: ignore[attr-defined]
            scope = scope_of(method, route.path)  # type: ignore[attr-defined]
            assert route.path in needs[scope], f"{method} {route.path}"  # type: ignore[attr-defined]
            if scope == "admin":
                asked = asking.ask(method, route.path, {}, [("Authorization", f"Bearer {user}")])  # type: ignore[attr-defined]
                assert_refused(asked, 403)


@pytest.mark.parametrize(
    ("mutated", "by_schema"),
    [pytest.param(900, 110, id="1,000"), pytest.param(9_000, 1_200, id="10,000", marks=pytest.mark.soak)],
)
def test_random_requests_never_break_the_policy(
    served: tuple[Server, Asking, str], mutated: int, by_schema: int
) -> None:
    server, asking, _ = served
    routes, keys, limits = server._made
    counts = throw(asking, mutated) + throw_by_schema(asking, routes.app(keys, limits), by_schema)
    assert counts.total() >= (mutated + by_schema) * 0.9 and counts[200] > mutated / 20, counts
    assert not [status for status in counts if status >= 500]
    assert asking.ask("POST", CHAT, chat()).status_code == 200
    assert server.failure is None and server.replica.counts.answering == 0
