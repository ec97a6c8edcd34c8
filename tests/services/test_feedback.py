"""Feedback on answers: what is kept, what a second word does, who may speak, for how long, in both databases."""

import asyncio
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from pydantic import ValidationError
from sqlalchemy import create_engine, text

import postgres
from live_server import Policies, running, scripted
from rollcast.chat import ChatCodec
from rollcast.errors import RunFailed, UsageError
from rollcast.live.feedback import FeedbackRequest, ServedAnswer
from rollcast.live.feedback_actor import start, stop
from rollcast.live.feedback_store import DAY_S, FeedbackStore, read
from rollcast.live.feedback_tables import SCHEMA, open_to_read, open_to_write, sqlite_url
from rollcast.live.feedback_writer import FeedbackWriter
from rollcast.live.keys import ANYONE, Key
from rollcast.live.openai_errors import ApiError, from_validation
from rollcast.rundir import RunDir
from rollcast.talk import Answered, PolicyClient
from rollcast_learners.types import VersionSpan

NOW = 1_000_000_000.0
NASTY = "NUL \0, half a pair \ud800, \u202e and '; DROP TABLE rollcast_answers; --"


def served(name: str = "a", **changes: Any) -> ServedAnswer:
    answer = ServedAnswer(
        id=name,
        time=NOW,
        key="alice",
        prompt=[{"role": "user", "content": "Capital of Peru?"}],
        text="Lima",
        prompt_ids_P=np.array([5, 6, 7], np.int32),
        answer_ids_A=np.array([70_000, 2], np.int32),
        logprobs_A=np.array([-0.25, -1.5], np.float32),
        spans=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
        temperature=0.7,
        finish_reason="stop",
    )
    return replace(answer, **changes)


def says(answer: str = "a", **said: Any) -> FeedbackRequest:
    return FeedbackRequest(answer=answer, **said)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if why := postgres.why_not():
        pytest.skip(why)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "feedback.sqlite")
    found = str(request.getfixturevalue("postgres_url"))
    engine = create_engine(found)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return found


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    made = FeedbackStore(open_to_write(url), keep_days=90, max_mib=1)
    yield made
    made.close()


def test_an_answer_is_kept_exactly(store: FeedbackStore, url: str) -> None:
    nasty = served("b", text=NASTY, prompt=NASTY, spans=())
    assert store.add([served(), nasty]) == 2
    first, second = (kept.answer for kept in read(open_to_read(url)))
    assert (second.text, second.prompt) == (NASTY, NASTY)
    assert first.prompt == [{"role": "user", "content": "Capital of Peru?"}]
    assert first.prompt_ids_P.tolist() == [5, 6, 7] and first.answer_ids_A.tolist() == [70_000, 2]
    assert first.logprobs_A.tolist() == [-0.25, -1.5], "float32, bit for bit"
    assert first.spans == served().spans and first.key == "alice" and first.time == NOW
    assert store.add([served(text="another"), served("c"), served("c")]) == 1, "an id is kept once"


def test_the_latest_word_of_each_kind_counts(store: FeedbackStore, url: str) -> None:
    store.add([served()])
    receipt = store.give(says(thumb="up", score=0.9), "alice", False, NOW)
    assert (receipt.thumb, receipt.score, receipt.policy_version, receipt.replaced) == ("up", 0.9, 4, ())
    receipt = store.give(says(thumb="down", edit="Lima."), "alice", False, NOW + 1)
    assert (receipt.thumb, receipt.score, receipt.edit, receipt.replaced) == ("down", 0.9, "Lima.", ("thumb",))
    (kept,) = read(open_to_read(url), rated_only=True)
    assert (kept.thumb, kept.score, kept.edit, kept.told) == ("down", 0.9, "Lima.", NOW + 1)


def test_of_two_answers_the_latest_preference_counts(store: FeedbackStore, url: str) -> None:
    store.add([served("a"), served("b"), served("c"), served("other", prompt_ids_P=np.array([1], np.int32))])
    assert store.give(says("a", preferred_to="b"), "alice", False, NOW).preferred_to == ("b",)
    assert store.give(says("a", preferred_to="c"), "alice", False, NOW).preferred_to == ("b", "c")
    turned = store.give(says("b", preferred_to="a"), "alice", False, NOW)
    assert turned.preferred_to == ("a",) and turned.replaced == ("preferred_to",)
    assert {kept.answer.id: kept.preferred_to for kept in read(open_to_read(url), rated_only=True)} == {
        "a": ("c",),
        "b": ("a",),
        "c": (),
    }
    with pytest.raises(ApiError, match="different prompts") as refused:
        store.give(says("a", preferred_to="other"), "alice", False, NOW)
    assert (refused.value.status, refused.value.param) == (400, "preferred_to")


def test_only_who_got_an_answer_may_speak_of_it(store: FeedbackStore, url: str) -> None:
    store.add([served("a"), served("b", key="bob")])
    for request, param in ((says("b", thumb="up"), "answer"), (says("nope", thumb="up"), "answer"),
                           (says("a", thumb="up", preferred_to="b"), "preferred_to")):  # fmt: skip
        with pytest.raises(ApiError) as refused:
            store.give(request, "alice", False, NOW)
        assert (refused.value.status, refused.value.code, refused.value.param) == (404, "answer_not_found", param)
    assert list(read(open_to_read(url), rated_only=True)) == [], "a refused request leaves nothing behind"
    assert store.give(says("b", thumb="up"), "root", True, NOW).thumb == "up"


def test_old_answers_go_with_what_was_said_of_them(store: FeedbackStore, url: str) -> None:
    store.add([served("old", time=NOW - 91 * DAY_S), served("young")])
    store.give(says("old", preferred_to="young", thumb="up"), "alice", False, NOW)
    assert store.prune(NOW) == 1
    (kept,) = read(open_to_read(url))
    assert kept.answer.id == "young" and not list(read(open_to_read(url), rated_only=True))


def test_a_full_database_loses_first_what_nobody_spoke_of(store: FeedbackStore, url: str) -> None:
    long = "x" * 200_000
    store.add([served(f"answer-{n}", text=long, time=NOW + n) for n in range(8)])
    store.give(says("answer-0", thumb="up"), "alice", False, NOW)
    assert store.full and store.prune(NOW + 10) == 4
    assert [kept.answer.id for kept in read(open_to_read(url))] == ["answer-0", "answer-5", "answer-6", "answer-7"]
    assert not store.full and store.prune(NOW + 10) == 0
    again = FeedbackStore(store.engine, 90, 1)
    assert again.bytes == store.bytes, "the size survives a restart"


def test_an_sqlite_file_is_its_owners_and_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    store = FeedbackStore(open_to_write(sqlite_url(path)), 90, 1)
    store.add([served(f"answer-{n}", text="x" * 200_000) for n in range(20)])
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in tmp_path.iterdir())
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    before = path.stat().st_size + path.with_name("feedback.sqlite-wal").stat().st_size
    store.prune(NOW)
    store.close()
    assert path.stat().st_size < before / 2
    assert sum(1 for _ in read(open_to_read(sqlite_url(path)))) == 4


def test_an_older_schema_is_brought_up_to_date_and_a_newer_one_refused(url: str) -> None:
    FeedbackStore(open_to_write(url), 90, 1).add([served()])
    steps = {SCHEMA: ["ALTER TABLE rollcast_answers ADD COLUMN mood INTEGER"]}
    open_to_write(url, steps, SCHEMA + 1).dispose()
    open_to_write(url, steps, SCHEMA + 1).dispose()
    with pytest.raises(RunFailed, match="a newer rollcast made it"):
        open_to_write(url)
    with pytest.raises(RunFailed, match="a newer rollcast made it"):
        open_to_read(url)


def test_a_migration_that_fails_changes_nothing(url: str) -> None:
    open_to_write(url).dispose()
    steps = {SCHEMA: ["ALTER TABLE rollcast_answers ADD COLUMN mood INTEGER", "ALTER TABLE no_such DROP COLUMN x"]}
    with pytest.raises(RunFailed):
        open_to_write(url, steps, SCHEMA + 1)
    store = FeedbackStore(open_to_write(url), 90, 1)
    assert store.add([served()]) == 1
    with store.engine.connect() as connection:
        assert "mood" not in connection.execute(text("SELECT * FROM rollcast_answers")).keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("no url", "cannot be parsed"),
        ("mysql://here/x", "mysql is not supported"),
        ("sqlite://", "lost"),
        ("sqlite:///:memory:", "lost"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        open_to_write(url)


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no such file"):
        open_to_read(sqlite_url(tmp_path / "none.sqlite"))
    with pytest.raises(RunFailed):
        open_to_write(sqlite_url(tmp_path / "no folder" / "x.sqlite"))
    if postgres.why_not() is None or "psycopg is" not in str(postgres.why_not()):
        with pytest.raises(RunFailed) as failed:
            open_to_write(f"postgresql://me:secret@/x?host={tmp_path}")
        assert "secret" not in str(failed.value)


@pytest.mark.parametrize(
    "body",
    [
        {"answer": "a"},
        {"thumb": "up"},
        {"answer": "a", "thumb": "sideways"},
        {"answer": "a", "score": 1.5},
        {"answer": "a", "score": "1"},
        {"answer": "a", "score": float("nan")},
        {"answer": "a", "preferred_to": "a"},
        {"answer": "a", "edit": " \n"},
        {"answer": "a", "edit": "x\0"},
        {"answer": "a", "edit": "\ud800"},
        {"answer": "a", "edit": "x" * 100_001},
        {"answer": "a" * 201, "thumb": "up"},
        {"answer": "a", "thumb": "up", "mood": "good"},
    ],
)
def test_a_request_that_says_nothing_or_nonsense_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FeedbackRequest.model_validate(body)


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"answer": "a"}, "body", "give at least one of"),
        ({"answer": "a", "preferred_to": "a"}, "preferred_to", "names the answer itself"),
        ({"answer": "a", "edit": " "}, "edit", "blank"),
        ({"answer": "a", "score": 2}, "score", "less than or equal to 1"),
    ],
)
def test_a_refusal_names_the_field(body: dict[str, Any], param: str, why: str) -> None:
    with pytest.raises(ValidationError) as invalid:
        FeedbackRequest.model_validate(body)
    error = from_validation([{**found, "loc": ("body", *found["loc"])} for found in invalid.value.errors()])
    assert (error.status, error.param) == (400, param) and why in error.message


# ---- the writer


def fresh(name: str = "a", **changes: Any) -> ServedAnswer:
    """One that is not too old to be kept: the writer goes by the clock."""
    return served(name, **{"time": time.time(), **changes})


def until(check: Callable[[], bool], seconds: float = 10.0) -> Any:
    async def wait() -> None:
        async with asyncio.timeout(seconds):
            while not check():
                await asyncio.sleep(0.01)

    return wait()


def test_feedback_may_overtake_its_answer(url: str) -> None:
    async def story() -> None:
        writer = FeedbackWriter(url, 90, 1, every_s=0.02)
        given = asyncio.create_task(writer.give(says(thumb="up"), "alice"))
        await asyncio.sleep(0.1)
        await writer.record([fresh()])
        assert (await given).thumb == "up"
        with pytest.raises(ApiError, match="no answer 'nope'"):
            await writer.give(says("nope", thumb="up"), "alice")
        await writer.close()

    asyncio.run(story())
    assert [kept.thumb for kept in read(open_to_read(url))] == ["up"]


def test_what_waits_is_written_in_batches_and_at_the_end(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "feedback.sqlite")

    async def story() -> None:
        writer = FeedbackWriter(url, 90, 100, batch=50, every_s=60)
        for n in range(120):
            await writer.record([fresh(f"answer-{n}")])
        await until(lambda: writer.written >= 100)
        await writer.record([fresh("last")])
        await writer.close()
        assert await writer.figures() == {"written": 121, "waiting": 0, "dropped": 0, "pruned": 0, "error": None}

    asyncio.run(story())
    assert sum(1 for _ in read(open_to_read(url))) == 121


def test_a_database_that_fails_holds_up_no_answer_and_is_told(tmp_path: Path) -> None:
    """Another process holds the file; answers wait, the oldest are dropped beyond the bound, and all is well after."""
    path = tmp_path / "feedback.sqlite"

    async def story() -> None:
        writer = FeedbackWriter(sqlite_url(path), 90, 1, batch=4, every_s=0.02, max_waiting=6)
        with writer._store.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 50")
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        for n in range(10):
            await asyncio.wait_for(writer.record([fresh(f"answer-{n}", time=time.time() + n)]), 0.1)
        await until(lambda: writer.error is not None)
        with pytest.raises(ApiError, match="database is locked") as refused:
            await writer.give(says("answer-9", thumb="up"), "alice")
        assert refused.value.status == 503
        assert (await writer.figures())["dropped"] == 4
        blocker.execute("ROLLBACK")
        await until(lambda: writer.written == 6)
        assert (await writer.give(says("answer-9", thumb="up"), "alice")).thumb == "up"
        await writer.close()

    asyncio.run(story())
    assert [kept.answer.id for kept in read(open_to_read(sqlite_url(path)))] == [f"answer-{n}" for n in range(4, 10)]


def test_the_writer_prunes_by_itself(tmp_path: Path) -> None:
    async def story() -> None:
        writer = FeedbackWriter(sqlite_url(tmp_path / "feedback.sqlite"), 90, 1, every_s=0.02)
        await writer.record([fresh(f"answer-{n}", text="x" * 200_000) for n in range(8)])
        await until(lambda: writer.pruned > 0)
        await writer.close()
        assert 0 < writer.pruned < 8, "the newest stay"

    asyncio.run(story())


@pytest.mark.ray
def test_one_actor_writes_for_everybody_and_is_restarted(tmp_path: Path, ray_cluster: str) -> None:
    url = sqlite_url(tmp_path / "feedback.sqlite")
    desk, same = (start("feedback-test", url, 90, 1) for _ in range(2))
    assert desk.actor._actor_id == same.actor._actor_id
    alice, bob = (Key(id=name * 8, name=name, sha256="0" * 64, created="") for name in "ab")

    async def story() -> None:
        desk.record(fresh(key=alice.id), fresh("b", key=bob.id))
        assert (await same.give(says(score=0.5), alice)).score == 0.5
        with pytest.raises(ApiError) as refused:
            await desk.give(says("a", thumb="up"), bob)
        assert type(refused.value) is ApiError and refused.value.status == 404
        ray.kill(desk.actor, no_restart=False)
        async with asyncio.timeout(20):
            while True:
                try:
                    receipt = await desk.give(says(edit="Lima."), ANYONE)
                    break
                except ApiError as error:
                    assert error.status == 503
                    await asyncio.sleep(0.1)
        assert (receipt.score, receipt.edit) == (0.5, "Lima.")

    asyncio.run(story())
    stop("feedback-test")
    stop("feedback-test")
    assert [(kept.score, kept.edit) for kept in read(open_to_read(url), rated_only=True)] == [(0.5, "Lima.")]


@pytest.mark.ray
def test_a_database_that_cannot_be_opened_is_told_at_once(tmp_path: Path, ray_cluster: str) -> None:
    with pytest.raises(ray.exceptions.RayActorError, match="cannot be opened"):
        start("feedback-nowhere", sqlite_url(tmp_path / "none" / "x.sqlite"), 90, 1, max_restarts=0)


@pytest.mark.ray
def test_an_answer_of_the_live_policy_gets_feedback(tmp_path: Path, tiny_fp32: str, ray_cluster: str) -> None:
    """The real routes, a scripted engine and the actor: several choices, a stream, a plain completion, the page."""
    folder = RunDir(tmp_path / "runs" / "live")
    Policies(folder, tiny_fp32).publish(3)
    url = sqlite_url(folder.feedback)
    codec = ChatCodec.from_folder(tiny_fp32)
    desk = start("feedback-live", url, 90, 10)
    with (
        running(folder, codec, scripted(codec), recorder=desk) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        ask = {"model": "policy", "messages": [{"role": "user", "content": "Capital of Peru?"}], "max_tokens": 8}
        several = client.post("/v1/chat/completions", json={**ask, "n": 2}).json()
        first, second = several["id"], f"{several['id']}/1"
        receipt = client.post("/v1/feedback", json={"answer": second, "preferred_to": first, "score": 1}).json()
        assert receipt["preferred_to"] == [first] and receipt["policy_version"] == 3 and receipt["score"] == 1
        *_, streamed = PolicyClient(server.url).ask(ask["messages"], max_tokens=8)
        assert isinstance(streamed, Answered)
        assert PolicyClient(server.url).feedback(streamed.id, thumb="down")["policy_version"] == 3
        plain = client.post("/v1/completions", json={"model": "policy", "prompt": "Lima", "max_tokens": 4}).json()
        assert client.post("/v1/feedback", json={"answer": plain["id"], "edit": "Lima is"}).status_code == 200
        refused = client.post("/v1/feedback", json={"answer": first, "mood": "good"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "mood"
        unknown = client.post("/v1/feedback", json={"answer": "chatcmpl-0", "thumb": "up"})
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "answer_not_found"
        front = client.get("/")
        assert front.status_code == 200 and "default-src 'none'" in front.headers["content-security-policy"]
    stop("feedback-live")
    found = {one.answer.id: one for one in read(open_to_read(url))}
    assert found.keys() == {first, second, streamed.id, plain["id"]}
    assert found[first].answer.text == several["choices"][0]["message"]["content"]
    assert codec.answer(found[streamed.id].answer.answer_ids_A.tolist()) == streamed.text
    assert found[plain["id"]].answer.prompt == "Lima" and found[first].answer.prompt == ask["messages"]
    assert len(found[first].answer.logprobs_A) == len(found[first].answer.answer_ids_A)


def test_without_a_database_feedback_is_refused(tmp_path: Path, tiny_fp32: str) -> None:
    folder = RunDir(tmp_path / "runs" / "live")
    Policies(folder, tiny_fp32).publish(0)
    codec = ChatCodec.from_folder(tiny_fp32)
    with running(folder, codec, scripted(codec)) as server, pytest.raises(UsageError, match="not kept here"):
        PolicyClient(server.url).feedback("chatcmpl-0", thumb="up")
