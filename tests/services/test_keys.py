"""API keys: how they are made and kept, who gets in with which, and what a key never does: leave a trace."""

import hmac
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from live_app import GENEROUS, Asking, assert_refused, chat, scripted_app
from rollcast.cli import app as command
from rollcast.cli import main
from rollcast.errors import ConfigError, UsageError
from rollcast.live import keys as keys_module
from rollcast.live.gate import is_loopback, route_path
from rollcast.live.keys import Key, Keyring, KeysFile, add_key, make_key, read_keys, revoke_key, scope_of

CHAT = "/v1/chat/completions"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def new_key(file: Path, name: str = "alice", scope: Any = "user", **limits: Any) -> str:
    key, text = make_key(name, scope, **limits)
    add_key(file, key)
    return text


def test_a_keys_file_is_private_and_holds_no_key(file: Path) -> None:
    texts = [new_key(file), new_key(file, "bob", "admin", requests_per_s=0.5, concurrent=2)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    held = file.read_text()
    assert not any(text in held or text.removeprefix("rc-") in held for text in texts)
    assert [(key.name, key.scope, key.concurrent) for key in read_keys(file)] == [
        ("alice", "user", None),
        ("bob", "admin", 2),
    ]
    ring = KeysFile(file)
    found = [ring.find(text.encode()) for text in texts]
    assert [key.name if key else None for key in found] == ["alice", "bob"]
    assert list(file.parent.iterdir()) == [file], "no part of a write is left"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_keys_file_open_to_others_is_refused(file: Path, mode: int) -> None:
    new_key(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}") as refusal:
        KeysFile(file)
    assert refusal.value.fix == f"chmod 600 {file}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Invalid JSON"),
        ("{}", "valid array"),
        ('[{"id": "00000000"}]', "0.name"),
        ('[{"id": "x", "name": "a", "sha256": "%s", "created": ""}]' % ("0" * 64), "0.id"),
        ('[{"id": "00000000", "name": "a", "sha256": "%s", "created": "", "evil": 1}]' % ("0" * 64), "0.evil"),
    ],
)
def test_a_damaged_keys_file_is_refused(file: Path, content: str, why: str) -> None:
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=why):
        KeysFile(file)


def test_a_missing_keys_file_says_how_to_make_one(file: Path) -> None:
    with pytest.raises(ConfigError, match="rollcast keys add NAME"):
        KeysFile(file)


def test_a_server_notices_what_is_added_and_revoked_within_a_second(file: Path) -> None:
    now = [0.0]
    alice = new_key(file)
    ring = KeysFile(file, lambda: now[0])
    assert ring.find(alice.encode())
    bob = new_key(file, "bob")
    assert ring.find(bob.encode()) is None, "looked at a moment ago"
    now[0] += 1.0
    assert ring.find(bob.encode())
    revoke_key(file, "alice")
    now[0] += 1.0
    assert ring.find(alice.encode()) is None and ring.find(bob.encode())
    file.chmod(0o644)
    now[0] += 1.0
    assert ring.find(bob.encode()) is None, "a file open to others counts for nothing"
    file.chmod(0o600)
    now[0] += 1.0
    assert ring.find(bob.encode())


def test_revoking_by_id_takes_one_and_by_name_all(file: Path) -> None:
    for _ in range(3):
        new_key(file)
    first = read_keys(file)[0]
    assert revoke_key(file, first.id) == [first]
    assert len(revoke_key(file, "alice")) == 2
    assert read_keys(file) == []
    with pytest.raises(UsageError, match="there are: none"):
        revoke_key(file, "alice")


def test_every_digest_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key(f"k{i}", "user") for i in range(5)]
    ring = Keyring([key for key, _ in made])
    compared: list[str] = []

    def counted(one: str, other: str) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    class Counting:
        compare_digest = staticmethod(counted)

    monkeypatch.setattr(keys_module, "hmac", Counting)
    for presented in (made[0][1], made[4][1], "rc-wrong", ""):
        compared.clear()
        ring.find(presented.encode())
        assert compared == [key.sha256 for key, _ in made], "no early exit"


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/healthz", None),
        ("GET", "/", None),
        ("POST", "/healthz", "user"),
        ("POST", "/", "user"),
        ("GET", "/v1/models", "user"),
        ("GET", "/anything", "user"),
        ("GET", "/v1/fleet", "admin"),
        ("PUT", "/v1/fleet", "admin"),
        ("GET", "/v1/fleet/", "admin"),
        ("POST", "/v1/policy/promote", "admin"),
        ("POST", "/v1/policy/rollback", "admin"),
        ("POST", "/v1/policy/canary", "admin"),
        ("GET", "/v1/policy", "user"),
    ],
)
def test_scopes(method: str, path: str, scope: str | None) -> None:
    assert scope_of(method, path) == scope


def test_a_mount_point_hides_no_scope() -> None:
    assert route_path({"path": "/live/v1/fleet", "root_path": "/live"}) == "/v1/fleet"
    assert route_path({"path": "/lively/v1/fleet", "root_path": "/live"}) == "/lively/v1/fleet"


# ---- through the gate


@pytest.fixture
def guarded(file: Path) -> Any:
    user, admin = new_key(file), new_key(file, "root", "admin")
    asking = Asking(scripted_app(KeysFile(file)))
    yield asking, user, admin
    asking.close()


def test_without_a_right_key_nothing_is_answered(guarded: Any) -> None:
    asking, user, _ = guarded
    wrong: list[list[tuple[str, str]]] = [
        [],
        [("Authorization", f"Bearer {user}x")],
        [("Authorization", f"Bearer {user[:-1]}")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer")],
        [("Authorization", user)],
        [("Authorization", f"Basic {user}")],
        [("Authorization", "Bearer \u00ff\u00fe")],
        [("Authorization", f"Bearer {user}"), ("Authorization", f"Bearer {user}")],
        [("X-API-Key", user)],
        [("api-key", user)],
        [("Cookie", f"key={user}")],
    ]
    for headers in wrong:
        sent = [(name, value.encode("latin-1")) for name, value in headers]
        response = asking.ask("POST", CHAT, chat(), sent)
        assert_refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert user not in response.text
    for name in ("key", "api_key", "api-key", "token", "access_token", "Authorization"):
        assert_refused(asking.ask("POST", f"{CHAT}?{name}={user}", chat()), 401)
    for path in ("/v1/models", "/nowhere", "/docs", "/metrics"):
        assert_refused(asking.ask("GET", path), 401)
    assert asking.ask("GET", "/healthz").status_code == 200
    assert asking.ask("POST", CHAT, chat(), [("Authorization", f"bearer {user}")]).status_code == 200


STEERING = [
    ("POST", "/v1/policy/promote", {"version": 5}),
    ("POST", "/v1/policy/rollback", {}),
    ("GET", "/v1/fleet", None),
    ("PUT", "/v1/fleet", {"workers": 2}),
]


@pytest.mark.parametrize(("method", "path", "body"), STEERING)
def test_steering_takes_an_admin_s_key(guarded: Any, method: str, path: str, body: Any) -> None:
    asking, user, admin = guarded
    assert_refused(asking.ask(method, path, body), 401)
    assert_refused(asking.ask(method, path, body, [("Authorization", f"Bearer {user}")]), 403)
    assert asking.ask(method, path, body, [("Authorization", f"Bearer {admin}")]).status_code == 200


def test_a_right_is_asked_before_the_body_is_read(guarded: Any) -> None:
    asking, user, _ = guarded
    huge = b"x" * 2_000_000
    assert_refused(asking.ask("POST", CHAT, huge), 401)
    assert_refused(asking.ask("PUT", "/v1/fleet", huge, [("Authorization", f"Bearer {user}")]), 403)
    assert_refused(asking.ask("POST", CHAT, huge, [("Authorization", f"Bearer {user}")]), 413)


def test_a_key_s_own_limits_count(file: Path) -> None:
    slow = new_key(file, "slow", requests_per_s=0.01)
    fast = new_key(file, "fast")
    limits = GENEROUS.model_copy(update={"requests_per_s": 1.0, "burst": 100})
    asking = Asking(scripted_app(KeysFile(file), limits))
    codes = [asking.ask("POST", CHAT, chat(), [("Authorization", f"Bearer {slow}")]).status_code for _ in range(3)]
    assert codes == [200, 429, 429]
    response = asking.ask("POST", CHAT, chat(), [("Authorization", f"Bearer {slow}")])
    assert_refused(response, 429)
    assert 90 <= int(response.headers["retry-after"]) <= 100
    assert asking.ask("POST", CHAT, chat(), [("Authorization", f"Bearer {fast}")]).status_code == 200
    asking.close()


# ---- without keys


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        (b"localhost", True),
        (b"localhost:8000", True),
        (b"127.0.0.1:8000", True),
        (b"127.8.8.8", True),
        (b"[::1]:8000", True),
        (b"evil.example", False),
        (b"localhost.evil.example", False),
        (b"127.0.0.1.evil.example", False),
        (b"10.0.0.1", False),
        (b"", False),
        (b"\xff", False),
        (b"[::1", False),
    ],
)
def test_only_this_machine_is_loopback(host: bytes, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_without_keys_only_this_machine_is_answered() -> None:
    """A page of another site, opened in a browser here, reaches loopback; it must neither read nor steer."""
    asking = Asking(scripted_app(None))
    assert asking.ask("POST", CHAT, chat(), [("Authorization", "Bearer whatever")]).status_code == 200
    assert asking.ask("POST", "/v1/policy/rollback", {}).status_code == 200
    assert_refused(asking.ask("POST", CHAT, chat(), [("Host", "rebound.example:8000")]), 403)
    assert_refused(asking.ask("POST", "/v1/policy/rollback", {}, [("Origin", "https://evil.example")]), 403)
    assert_refused(asking.ask("POST", "/v1/policy/rollback", {}, [("Origin", "null")]), 403)
    assert asking.ask("POST", CHAT, chat(), [("Origin", "http://localhost")]).status_code == 200
    asking.close()


# ---- the verbs


def test_the_verbs_make_list_and_revoke(file: Path) -> None:
    run = CliRunner()
    made = run.invoke(command, ["keys", "add", "alice", "--scope", "admin", "--rate", "2", "--file", str(file)])
    assert made.exit_code == 0
    key = made.stdout.strip()
    found = KeysFile(file).find(key.encode())
    assert found is not None and (found.name, found.scope, found.requests_per_s) == ("alice", "admin", 2.0)
    listed = run.invoke(command, ["keys", "list", "--file", str(file), "--json"])
    assert [entry["name"] for entry in json.loads(listed.stdout)] == ["alice"]
    assert found.sha256 not in listed.stdout and key not in listed.stdout
    assert "alice" in run.invoke(command, ["keys", "list", "--file", str(file)]).stdout
    assert (
        run.invoke(command, ["keys", "revoke", "alice", "--file", str(file)]).stdout == f"revoked {found.id} of alice\n"
    )
    assert read_keys(file) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list"], "cannot be read"),
        (["revoke", "alice"], "cannot be read"),
        (["add", "two words"], "name it with letters"),
        (["add", ""], "name it with letters"),
        (["add", "x", "--file", "nowhere/keys.json"], "cannot be written"),
    ],
)
def test_a_slip_is_told_in_three_lines(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["keys", *words])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 3


def test_keys_are_made_of_chance(file: Path) -> None:
    assert len({make_key("a", "user")[1] for _ in range(100)}) == 100
    assert all(len(make_key("a", "user")[1]) > 40 for _ in range(3))
    assert isinstance(make_key("a", "user")[0], Key)


def test_a_write_that_fails_leaves_the_keys_as_they_were(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_key(file)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        new_key(file, "bob")
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_one_second_of_guesses_finds_nothing(guarded: Any) -> None:
    asking, _, _ = guarded
    answers = [asking.ask("GET", "/v1/models", None, [("Authorization", f"Bearer rc-{i}")]) for i in range(200)]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1, "all wrong keys are told the same"
