"""docs/http.md, held to the code: its examples are run against a server, its tables against the models."""

import contextlib
import io
import re
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from bad_requests import CORPUS
from live_app import Asking, scripted_app
from rollcast.cli import main
from rollcast.live.keys import read_keys, scope_of
from rollcast.live.limits import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in this process, on a port that the system gave."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(scripted_app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_the_examples_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of Python run in the order of the page; a block of text that follows one is what it prints."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names: dict[str, object] = {}
    printed, shown = "", 0
    for language, text in BLOCK.findall(PAGE):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text.replace("http://127.0.0.1:8000", url), "docs/http.md", "exec"), names)
            printed = output.getvalue()
            assert printed
        elif language == "text":
            assert text == printed
            shown += 1
    assert shown == 1
    names["client"].close()  # type: ignore[attr-defined]


def test_the_words_for_keys_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for language, text in BLOCK.findall(PAGE) if language == "sh" for line in text.splitlines()]
    assert len(lines) == 5
    for line in lines:
        program, *words = shlex.split(line)
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert (program, caught.value.code) == ("rollcast", 0)
    assert [(key.name, key.scope) for key in read_keys(Path("keys.json"))] == [("alice", "user"), ("root", "admin")]


def rows(heading: str) -> list[list[str]]:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_limits_are_the_settings() -> None:
    told = {name.strip("`"): default for name, default, _ in rows("Limits")}
    assert told == {name: f"{field.default:,}" for name, field in Limits.model_fields.items()}


def test_the_codes_are_those_that_are_sent() -> None:
    table = {(int(status), code) for status, codes, _ in rows("Errors") for code in re.findall(r"`(\w+)`", codes)}
    asking = Asking(scripted_app())
    for bad in CORPUS:
        response = asking.ask(bad.method, bad.path, bad.body, bad.headers, json=False)
        assert (response.status_code, response.json()["error"]["code"]) in table, bad.name
    asking.close()


def test_the_routes_need_what_the_page_says() -> None:
    needs = {"nothing": None, "a key": "user", "a key of scope `admin`": "admin"}
    found = [
        (*route.split(), needs[need]) for routes, need, _ in rows("Routes") for route in re.findall("`(.*?)`", routes)
    ]
    assert len(found) == 13
    assert [scope_of(method, path) for method, path, _ in found] == [scope for _, _, scope in found]
