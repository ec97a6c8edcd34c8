"""Rewards behind a URL, against a real server on this machine that answers as OpenAI and vLLM do, well and badly."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rollcast_envs.errors import DataError
from rollcast_envs.remote_rewards import KINDS, build
from rollcast_envs.reward_pool import Outcome, RewardCall

CALL = RewardCall("What is the capital of France?", "Paris, {question}", ["Paris", "Lutetia"], {"document": "A map."})
PATIENT = {"timeout_s": 30.0, "retries": 0}

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Notes what it was asked, and answers as the test says."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body), dict(self.headers)))
        self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1](self)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test reads `asked`."""

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # The default of 5 refuses some of those who come at once.

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.answers: list[Answer] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests are about."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def says(reply: Any, status: int = 200) -> Answer:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return lambda handler: handler.say(status, body)


def chat(text: Any) -> Answer:
    return says({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def pooled(data: Any) -> Answer:
    return says({"object": "list", "data": [{"index": 0, "object": "pooling", "data": data}]})


def classified(label: Any, probs: Any) -> Answer:
    return says({"data": [{"index": 0, "label": label, "probs": probs, "num_classes": 2}]})


def ask(
    server: Server, kind: str, *answers: Answer, timeout_s: float = 30.0, retries: int = 0, **options: Any
) -> Outcome:
    server.answers = list(answers)
    reward = build(kind, {"url": server.url, "model": "tiny", **options})
    return reward.start(CALL, timeout_s, retries)()


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("8", 0.8),
        ("I give it 7.5 out of 10.", 0.75),
        ("8/10", 0.8),
        ('{"score": 3}', 0.3),
        ('```json\n{"why": "2 mistakes", "score": "6"}\n```', 0.6),
        ("<think>At first 2, but then 9.</think>\n\n10", 1.0),
        ("0", 0.0),
    ],
)
def test_a_judges_grade_is_the_number_it_says(server: Server, said: str, value: float) -> None:
    assert ask(server, "judge", chat(said)).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Good!", "answered without a number: Good!"),
        ("", "answered without a number"),
        (None, "answered without text"),
        ("11", "the grade 11, which is not from 0 to 10"),
        ("-3", "the grade -3"),
        ("9" * 400, "the grade 99999999999999999999, which is not from 0 to 10"),
        ('{"score": 1000}', "the grade 1000"),
    ],
)
def test_a_judge_that_gives_no_grade_has_failed(server: Server, said: Any, words: str) -> None:
    outcome = ask(server, "judge", chat(said), retries=3)
    assert outcome.value is None and words in str(outcome.error)
    assert len(server.asked) == 1


def test_a_judge_is_asked_with_question_answer_and_references(server: Server) -> None:
    ask(server, "judge", chat("5"), parameters={"max_tokens": 8, "model": "another"}, scale=5.0)
    path, body, _ = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 8)
    (message,) = body["messages"]
    assert message["role"] == "user" and "from 0 (worthless) to 5 (perfect)" in message["content"]
    assert "What is the capital of France?" in message["content"] and "Paris\nLutetia" in message["content"]
    assert "Paris, {question}" in message["content"]  # What is filled in is not filled in again.


def test_a_prompt_of_ones_own_may_use_fields_and_braces(server: Server) -> None:
    prompt = 'Of {document} {"score": 1} {unknown}: {answer}'
    assert ask(server, "judge", chat("2"), prompt=prompt, scale=4, parameters={"temperature": 0.5}).value == 0.5
    _, body, _ = server.asked[0]
    assert body["messages"][0]["content"] == 'Of A map. {"score": 1} {unknown}: Paris, {question}'
    assert body["temperature"] == 0.5


@pytest.mark.parametrize(
    ("data", "options", "value"),
    [
        ([1.5], {}, 1.5),
        ([-2, 0.5], {}, 0.5),
        ([[0.1], [0.7]], {}, 0.7),
        ([0.0], {"sigmoid": True}, 0.5),
        ([-1000.0], {"sigmoid": True}, 0.0),
    ],
)
def test_a_reward_models_score_is_the_last_number_pooled(
    server: Server, data: Any, options: dict[str, Any], value: float
) -> None:
    assert ask(server, "reward_model", pooled(data), **options).value == value
    assert server.asked[0][0] == "/v1/pooling"
    assert server.asked[0][1]["messages"] == [
        {"role": "user", "content": CALL.question},
        {"role": "assistant", "content": CALL.answer},
    ]


def test_a_reward_model_may_read_plain_text(server: Server) -> None:
    ask(server, "reward_model", pooled([1.0]), chat=False, prompt="Q {question} A {answer}")
    assert server.asked[0][1] == {"model": "tiny", "input": f"Q {CALL.question} A {CALL.answer}"}


@pytest.mark.parametrize("data", [[], "base64", [["a"]], [[0.1, 0.9]], [None], [True], {}, None, [10**400]])
def test_a_reward_model_without_one_number_has_failed(server: Server, data: Any) -> None:
    assert ask(server, "reward_model", pooled(data)).value is None


def test_a_classifiers_value_is_the_probability_of_the_label(server: Server) -> None:
    toxic = {"label": "toxic", "labels": ["fine", "toxic"]}
    assert ask(server, "classifier", classified("fine", [0.75, 0.25]), **toxic).value == 0.25
    assert ask(server, "classifier", classified("LABEL_0", [0.75, 0.25]), label=0).value == 0.75
    assert ask(server, "classifier", classified(None, [0.25])).value is None
    assert server.asked[0][:2] == ("/v1/classify", {"model": "tiny", "input": CALL.answer})


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (classified("toxic", [0.75, 0.25]), "calls class 0 'toxic', and labels calls it 'fine'"),
        (classified("fine", [0.5, 0.3, 0.2]), "knows 3 classes"),
        (classified("fine", [1.5, -0.5]), "without a list of probabilities"),
        (classified("fine", "high"), "without a list of probabilities"),
        (says({"data": []}), "answered without data.0.probs"),
        (says([]), "answered without data.0.probs"),
        (says({"data": [[1]]}), "answered without data.0.probs"),
    ],
)
def test_a_classifier_of_another_shape_has_failed(server: Server, reply: Answer, words: str) -> None:
    outcome = ask(server, "classifier", reply, label="toxic", labels=["fine", "toxic"])
    assert outcome.value is None and words in str(outcome.error)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says(b"<html>busy</html>"), "answered what is not JSON: <html>busy</html>"),
        (says(b""), "answered what is not JSON: nothing"),
        (says(b"[" * 100_000), "answered what is not JSON"),
        (says(b"\xff\xfe"), "answered what is not JSON"),
        (says({"error": {"message": "no model tiny"}}, 404), 'answered 404: {"error": {"message": "no model tiny"}}'),
        (says({"choices": []}), "answered without choices.0.message.content"),
        (says(b"x" * 2_000_000), "answered with more than 1000000 bytes"),
        (lambda handler: handler.say(307, b"", Location="http://127.0.0.1:9/"), "redirects are not followed"),
    ],
)
def test_a_reply_of_the_wrong_kind_is_told_and_not_asked_for_again(server: Server, reply: Answer, words: str) -> None:
    outcome = ask(server, "judge", reply, retries=2)
    assert outcome.value is None and not outcome.timed_out
    assert words in str(outcome.error) and f"{server.url}/chat/completions " in str(outcome.error)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    outcome = ask(server, "judge", says({}, status), says({}, status), chat("4"), retries=2)
    assert (outcome.value, outcome.retries) == (0.4, 2)
    server.asked.clear()
    outcome = ask(server, "judge", says({}, status), chat("4"))
    assert outcome.value is None and f"answered {status}" in str(outcome.error)


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def hangs(handler: Handler) -> None:
    time.sleep(3)


def drips(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def drips_headers(handler: Handler) -> None:
    for _ in range(40):
        handler.wfile.write(b"H")
        time.sleep(0.1)


def test_a_connection_that_breaks_is_tried_again(server: Server) -> None:
    assert ask(server, "judge", hangs_up, chat("4"), retries=1).value == 0.4
    server.asked.clear()
    assert "could not be asked: RemoteProtocolError" in str(ask(server, "judge", hangs_up).error)


@pytest.mark.parametrize("slow", [hangs, drips, drips_headers])
def test_a_server_that_is_slow_in_any_way_runs_out_of_time(server: Server, slow: Answer) -> None:
    began = time.monotonic()
    outcome = ask(server, "judge", slow, timeout_s=0.5)
    assert outcome.value is None and outcome.timed_out and "within" in str(outcome.error)
    assert time.monotonic() - began < 2.5


def test_nobody_listening_is_a_failure(server: Server) -> None:
    nobody = build("judge", {"url": "http://127.0.0.1:9", "model": "tiny"})
    outcome = nobody.start(CALL, 10.0, 1)()
    assert "could not be asked: ConnectError" in str(outcome.error) and outcome.retries == 1


def test_the_key_comes_from_a_file_and_is_never_told(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-secret\n")
    assert ask(server, "judge", chat("4"), key_file=str(file)).value == 0.4
    assert server.asked[0][2]["Authorization"] == "Bearer sk-secret"
    outcome = ask(server, "judge", says(b"bad key sk-secret", 401), key_file=str(file))
    assert "answered 401: bad key [key]" in str(outcome.error)
    for bad in ("", "two\nlines", "schl\u00fcssel"):
        file.write_text(bad, encoding="utf-8")
        outcome = ask(server, "judge", chat("4"), key_file=str(file))
        assert "one line of printable ASCII" in str(outcome.error) and "lines" not in str(outcome.error)
    assert "FileNotFoundError" in str(ask(server, "judge", chat("4"), key_file=str(tmp_path / "none")).error)


def test_many_may_ask_at_once(server: Server) -> None:
    def slowly(handler: Handler) -> None:
        time.sleep(0.3)
        chat("3")(handler)

    server.answers = [slowly]
    reward = build("judge", {"url": server.url, "model": "tiny"})
    began = time.monotonic()
    waiting = [reward.start(CALL, 30.0, 0) for _ in range(30)]
    outcomes = [wait() for wait in waiting]
    assert {(outcome.value, outcome.error) for outcome in outcomes} == {(0.3, None)}
    assert time.monotonic() - began < 6  # One after the other it would be 9 s.


def test_what_is_no_unicode_can_be_asked_about(server: Server) -> None:
    server.answers = [chat("3")]
    reward = build("judge", {"url": server.url, "model": "tiny"})
    assert reward.start(RewardCall("\ud800", "日本 🙂", [], {}), 30.0, 0)().value == 0.3
    assert "日本 🙂" in server.asked[0][1]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("judge", {"model": "m"}, "option 'url': it is None. Do this: give a string"),
        ("judge", {"url": "http://h"}, "option 'model'"),
        ("judge", {"url": "h:80", "model": "m"}, "http://host:port/path"),
        ("judge", {"url": "file:///etc/passwd", "model": "m"}, "http://host:port/path"),
        ("judge", {"url": "http://me:secret@h", "model": "m"}, "a key belongs in key_file"),
        ("judge", {"url": "http://h?key=1", "model": "m"}, "a key belongs in key_file"),
        ("judge", {"api_key": "x"}, "keys do not belong in a configuration"),
        ("judge", {"label": 1}, "judge does not know it"),
        ("judge", {"url": "http://h", "model": "m", "prompt": "no place"}, r"a text with \{answer\} in it"),
        ("judge", {"url": "http://h", "model": "m", "scale": 0}, "a positive number"),
        ("judge", {"url": "http://h", "model": "m", "scale": True}, "a number"),
        ("judge", {"url": "http://h", "model": "m", "parameters": 1}, "a table"),
        ("reward_model", {"url": "http://h", "model": "m", "sigmoid": 1}, "true or false"),
        ("classifier", {"url": "http://h", "model": "m", "label": "toxic"}, "a name that is in the list labels"),
        ("classifier", {"url": "http://h", "model": "m", "label": -1}, "the number of a class"),
        ("classifier", {"url": "http://h", "model": "m", "labels": "toxic"}, "a list of names"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        build(kind, options)
    assert "secret" not in str(refused.value)


def test_every_kind_is_documented() -> None:
    assert set(KINDS) == {"judge", "reward_model", "classifier"}
    assert all("POST {url}" in str(kind.__doc__) for kind in KINDS.values())
