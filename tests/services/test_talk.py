"""Talking to the live policy: one question, a chat in the terminal, the page in a browser."""

import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

import browser
from rollcast.chat_screen import Chat
from rollcast.cli import main
from rollcast.errors import RunFailed, UsageError
from rollcast.live.feedback_store import Kept, read
from rollcast.live.feedback_tables import open_to_read
from rollcast.live.keys import Keyring, make_key
from rollcast.talk import KEY, Answered, PolicyClient
from talking_server import Talker, talking

LOOK_AT = os.environ.get("ROLLCAST_SCREENSHOTS")
"""Folder for pictures of the page, for people to look at."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Talker]]:
    with talking(tmp_path) as found:
        yield found


def kept(talker: Talker) -> list[Kept]:
    return list(read(open_to_read(talker.database)))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    return int(left.value.code or 0)


def test_an_answer_comes_in_pieces_with_its_versions(server: tuple[str, Talker]) -> None:
    url, _ = server
    policy = PolicyClient(f"{url}/v1/")
    *pieces, answered = policy.ask([{"role": "user", "content": "Capital of Peru?"}])
    assert pieces == ["Li", "ma", " <b>of</b> course"]
    assert isinstance(answered, Answered) and answered.text == "Lima <b>of</b> course"
    assert answered.versions == (6, 7) and answered.policy_version == 7 and answered.finish_reason == "stop"
    assert policy.feedback(answered.id, thumb="up")["thumb"] == "up"
    assert policy.policy()["resident"] == {"latest": 7, "best": 5}


def test_one_question_from_the_command_line(server: tuple[str, Talker], capsys: pytest.CaptureFixture[str]) -> None:
    url, talker = server
    assert call("query", url, "Capital of Peru?", "--system", "Be brief.", "--temperature", "0") == 0
    told = capsys.readouterr()
    assert told.out == "Lima <b>of</b> course\n" and "policy version 7, answer chatcmpl-" in told.err
    assert talker.asked[0].turns == [("system", "Be brief."), ("user", "Capital of Peru?")]
    assert talker.asked[0].temperature == 0
    assert call("query", url, "Capital of Peru?", "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy_versions"] == [[6, 0, 1], [7, 1, 3]]


def test_what_would_steer_the_terminal_is_spelt_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with talking(tmp_path, words=["\x1b[2J", "two\nlines"]) as (url, _):
        assert call("query", url, "Hello") == 0
    assert capsys.readouterr().out == "\\x1b[2Jtwo\nlines\n"


@pytest.mark.parametrize(
    ("url", "words", "code", "why"),
    [
        ("http://127.0.0.1:1", [], 1, "Nobody answers at http://127.0.0.1:1"),
        ("ftp://here", [], 2, "is no address of a served policy"),
        ("http://", [], 2, "is no address of a served policy"),
        (None, ["--model", "policy@3"], 2, "resident are"),
    ],
)
def test_what_cannot_be_had_is_told(
    url: str | None,
    words: list[str],
    code: int,
    why: str,
    server: tuple[str, Talker],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("query", url or server[0], "Hello", *words) == code
    assert why in capsys.readouterr().err


def test_a_refusal_and_a_broken_stream_are_told(server: tuple[str, Talker]) -> None:
    policy = PolicyClient(server[0])
    with pytest.raises(RunFailed, match="the engine is being restarted"):
        list(policy.ask([{"role": "user", "content": "fail"}]))
    with pytest.raises(RunFailed, match="the engine died"):
        list(policy.ask([{"role": "user", "content": "break"}]))
    with pytest.raises(UsageError, match="no answer 'nope'"):
        policy.feedback("nope", thumb="up")


def test_a_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = make_key("alice", "user")
    with talking(tmp_path, Keyring([key])) as (url, talker):
        with pytest.raises(UsageError, match=KEY):
            PolicyClient(url).policy()
        monkeypatch.setenv(KEY, secret)
        *_, answered = PolicyClient(url).ask([{"role": "user", "content": "Hello"}])
        assert isinstance(answered, Answered)
        PolicyClient(url).feedback(answered.id, score=0.5)
        other, elsewhere = make_key("bob", "user")
        assert other.id != key.id
        with pytest.raises(UsageError):
            PolicyClient(url, elsewhere).feedback(answered.id, score=0.0)
        assert [(one.answer.key, one.score) for one in kept(talker)] == [(key.id, 0.5)]


# ---- the terminal


def test_a_chat_with_feedback(server: tuple[str, Talker]) -> None:
    url, talker = server
    console = Console(record=True, width=200, file=StringIO())
    lines = iter(
        ["/good", "", "Capital of Peru?", "/good", "/edit Lima", "/again", "/better", "/score 0.25", "/score high",
         "And of Chile?", "/worse", "/model policy@9", "Hello", "/model policy@best", "/system Be brief.", "/nope",
         "/help", "Hello", "/quit", "never"]
    )  # fmt: skip
    chat = Chat(PolicyClient(url), console)
    chat.run(lambda: next(lines))
    assert next(lines) == "never"
    shown = console.export_text()
    for said in (
        "there is no answer yet", "Lima <b>of</b> course", "policy versions 6 to 7", "noted: thumb up",
        "noted: edit Lima", "the last answer is the better one", "noted: score 0.25", "a number from 0 to 1",
        "no two answers to one question", "there is no model 'policy@9' here", "there is no command /nope",
        "what the last answer should have been",
    ):  # fmt: skip
        assert said in shown, said
    turns = [asked.turns for asked in talker.asked]
    assert turns[0] == turns[1] == [("user", "Capital of Peru?")]
    assert [role for role, _ in turns[2]] == ["user", "assistant", "user"]
    assert turns[-1] == [("system", "Be brief."), ("user", "Hello")] and talker.asked[-1].model == "policy@best"
    first, second, *_ = kept(talker)
    assert (first.thumb, first.edit, second.score) == ("up", "Lima", 0.25)
    assert second.preferred_to == (first.answer.id,)


class Impatient(Console):
    """A terminal at which somebody presses Ctrl-C while the fifth piece is printed."""

    printed = 0

    def print(self, *words: Any, **options: Any) -> None:
        self.printed += 1
        if self.printed == 5:
            raise KeyboardInterrupt
        super().print(*words, **options)


def test_ctrl_c_cuts_the_answer_and_the_chat_goes_on(tmp_path: Path) -> None:
    with talking(tmp_path, words=["word "] * 1000, seconds_per_word=0.01) as (url, talker):
        console = Impatient(record=True, width=200, file=StringIO())
        chat = Chat(PolicyClient(url), console)
        assert chat.handle("Talk.")
        assert chat.turns == [] and "cut off" in console.export_text()
        with httpx.Client(trust_env=False) as client:
            for _ in range(500):
                if talker.cut:
                    break
                client.get(f"{url}/v1/policy")
        assert talker.cut == 1, "the server heard that nobody listens"


# ---- the page


def test_the_page_runs_nothing_but_its_own(server: tuple[str, Talker]) -> None:
    with httpx.Client(trust_env=False) as client:
        response = client.get(server[0])
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert "http" not in response.text.replace("http://www.w3.org/2000/svg", ""), "nothing comes from elsewhere"
    assert len(response.content) < 30_000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if why := browser.why_not():
        pytest.skip(why)
    with browser.opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


def picture(page: browser.Page, name: str) -> None:
    if LOOK_AT:
        page.screenshot(Path(LOOK_AT) / f"{name}.png")


def test_a_person_asks_and_judges_in_the_browser(page: browser.Page, server: tuple[str, Talker]) -> None:
    url, talker = server
    page.go(url)
    page.until("document.querySelector('#served').textContent === 'policy version 7'")
    assert page.run("return document.activeElement.id") == "question"
    page.type("#question", f"Capital of Peru?{browser.ENTER}")
    page.until("document.querySelector('.below')")
    assert page.text(".policy p") == "Lima <b>of</b> course", "as text, never as HTML"
    assert "policy versions 6, 7" in page.text(".below")
    page.click(".below .down")
    page.until("document.querySelector('.below .down').getAttribute('aria-pressed') === 'true'")
    page.click(".below button:last-child")
    page.run("document.querySelector('.policy textarea').value = ''")
    page.type(".policy textarea", "Lima")
    picture(page, "light")
    page.click(".policy .first")
    page.until("!document.querySelector('.policy textarea')")
    assert page.text("#said") == "Thank you: noted."
    (one,) = kept(talker)
    assert (one.thumb, one.edit, one.answer.text) == ("down", "Lima", "Lima <b>of</b> course")

    page.type("#question", f"fail{browser.ENTER}")
    page.until("document.querySelector('#said').className === 'wrong'")
    assert "being restarted" in page.text("#said")
    page.type("#question", f"And of Chile?{browser.ENTER}")
    page.until("document.querySelectorAll('.below').length === 2")
    assert [role for role, _ in talker.asked[-1].turns] == ["user", "assistant", "user"], "without what failed"
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    picture(page, "dark")
    page.devtools("Emulation.setEmulatedMedia", features=[])
    assert not [line for line in page.log() if "503" not in line], "no policy was violated, nothing was not found"


def test_the_browser_stops_an_answer(page: browser.Page, tmp_path: Path) -> None:
    with talking(tmp_path, words=["word "] * 1000, seconds_per_word=0.02) as (url, talker):
        page.go(url)
        page.type("#question", f"Talk.{browser.ENTER}")
        page.until("document.querySelector('.policy p')?.textContent.length > 20")
        page.click("#stop")
        page.until("document.querySelector('#said').textContent === 'stopped'")
        page.until("document.querySelector('#send').disabled === false")
        with httpx.Client(trust_env=False) as client:
            for _ in range(500):
                if talker.cut:
                    break
                client.get(f"{url}/v1/policy")
        assert talker.cut == 1


def test_every_control_of_the_page_has_a_name(page: browser.Page, server: tuple[str, Talker]) -> None:
    page.go(server[0])
    page.run("document.querySelector('details').open = true")
    page.type("#question", f"Hello{browser.ENTER}")
    page.until("document.querySelector('.below')")
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((control) =>"
        " !(control.getAttribute('aria-label') || control.textContent.trim() || control.labels?.length))"
        ".map((control) => control.outerHTML)"
    )
    assert unnamed == []
    assert page.run("return document.documentElement.lang") == "en"
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
