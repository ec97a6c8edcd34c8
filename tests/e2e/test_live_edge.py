"""The corpus against the live policy where it really lives, behind Ray Serve: never a 500, never a dead replica."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bad_requests import CHAT, COMPLETIONS, CORPUS, FINE, FINE_COMPLETIONS
from fuzzing import throw, throw_by_schema
from live_app import Asking, assert_refused, chat, scripted_app
from live_server import free_port
from rollcast.config_file import load_config
from rollcast.live.keys import add_key, make_key, revoke_key

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
RATES = ["--serve.limits.requests_per_s=1e6", "--serve.limits.burst=1000000", "--serve.limits.concurrent=1000"]
RATES += ["--serve.limits.tokens_per_minute=1000000000"]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_fp32: str, ray_cluster: str
) -> Iterator[tuple[Asking, str, Path, Any]]:
    """(client with an admin's key, a user's key, the keys file, what tells the replica's process id)."""
    from ray import serve

    from rollcast.live.app import DEPLOYMENT, deploy, spec_of

    folder = tmp_path_factory.mktemp("served")
    texts = []
    for name, scope in (("root", "admin"), ("alice", "user")):
        key, text = make_key(name, scope)
        add_key(folder / "keys.json", key)
        texts.append(text)
    overrides = [f"--model.path={tiny_fp32}", f"--run.dir={folder}", f"--serve.port={free_port()}", *RATES]
    overrides += ["--rollout.engine=torch", "--serve.max_new_tokens=8"]  # An engine that computes can overflow too.
    overrides += ["--serve.cpus_per_replica=0.5", f"--serve.keys_file={folder / 'keys.json'}"]
    (folder / "corpus").mkdir()
    spec = spec_of(load_config(SCRIPTED, overrides), folder / "corpus", ray_cluster, version=3)
    serve.shutdown()  # A cluster has one HTTP address, and other tests may have given it theirs.
    url = deploy(spec)
    handle = serve.get_deployment_handle(DEPLOYMENT, spec.name)
    asking = Asking(None, texts[0], url)
    yield asking, texts[1], folder / "keys.json", lambda: handle.pid.remote().result(timeout_s=30)
    asking.close()
    serve.shutdown()


@pytest.mark.ray
def test_bad_and_random_requests_break_nothing(served: tuple[Asking, str, Path, Any]) -> None:
    asking, _, _, pid = served
    before = pid()
    for bad in CORPUS:
        if not bad.path.startswith("/-/"):
            response = asking.ask(bad.method, bad.path, bad.body, bad.headers, json=False)
            assert_refused(response, bad.status, bad.param, bad.name)
    for path, requests in ((CHAT, FINE), (COMPLETIONS, FINE_COMPLETIONS)):
        for asked in requests:
            if asked["model"] != "policy@best":
                assert asking.ask("POST", path, asked).json()["policy_version"] == 3
    counts = throw(asking, 250)
    assert not [status for status in counts if status >= 500] and counts[200] > 10, counts
    assert pid() == before, "the replica is the one of before"


@pytest.mark.ray
@pytest.mark.soak
def test_10000_random_requests_break_nothing(served: tuple[Asking, str, Path, Any]) -> None:
    asking, _, _, pid = served
    before = pid()
    counts = throw(asking, 9_000) + throw_by_schema(asking, scripted_app(), 1_200)
    assert not [status for status in counts if status >= 500] and counts.total() >= 10_000, counts
    assert pid() == before and asking.ask("POST", CHAT, chat()).status_code == 200


@pytest.mark.ray
def test_keys_count_behind_serve_too(served: tuple[Asking, str, Path, Any]) -> None:
    asking, user, file, _ = served
    as_user = [("Authorization", f"Bearer {user}")]
    assert asking.ask("POST", CHAT, chat(), as_user).status_code == 200
    assert_refused(asking.ask("POST", CHAT, chat(), [("Authorization", "Bearer rc-wrong")]), 401)
    assert_refused(asking.ask("POST", f"{CHAT}?api_key={user}", chat(), [("Authorization", "")]), 401)
    for method, path in (("POST", "/v1/policy/promote"), ("POST", "/v1/policy/rollback"), ("PUT", "/v1/fleet")):
        assert_refused(asking.ask(method, path, {}, as_user), 403)
    assert asking.ask("GET", "/healthz", None, [("Authorization", "")]).status_code == 200
    revoke_key(file, "alice")
    asking.run(asyncio.sleep(1.5))
    assert_refused(asking.ask("POST", CHAT, chat(), as_user), 401)


@pytest.mark.ray
def test_no_control_route_answers(served: tuple[Asking, str, Path, Any]) -> None:
    """Serve's own proxy answers two, which tell whether it is well and the name of what it serves, and do nothing."""
    asking, _, _, _ = served
    for path in {bad.path for bad in CORPUS if bad.status == 404 and bad.param is None}:
        for method in ("GET", "POST", "PUT", "DELETE"):
            response = asking.ask(method, path)
            told = response.text if path.startswith("/-/") else ""
            assert response.status_code == 404 or told in ("success", '{"/":"live-corpus"}'), (method, path, told)
    assert asking.ask("POST", CHAT, chat()).status_code == 200
