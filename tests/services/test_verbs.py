"""The verbs that look at a run: one tiny run is made by the real command, and told, measured and exported."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollcast import cli, doctor, metrics, records
from rollcast.best import BestPolicy
from rollcast.cluster import compute_dtype
from rollcast.config import EvalSection
from rollcast.export import settings_of
from rollcast.rundir import RunDir
from rollcast.token_view import percent
from rollcast.weights import OWNER, PREFIX

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "files.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_bf16: str) -> Path:
    """Folder of runs with one that has finished: two steps of the scripted loop, by the command itself."""
    folder = tmp_path_factory.mktemp("verbs") / "runs"
    words = ["train", str(ROOT / "deploy" / "configs" / "scripted.toml"), "--model.path", tiny_bf16]
    words += ["--run", "tiny", "--run.dir", str(folder), "--run.steps", "2", "--eval.samples", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "rollcast", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> RunDir:
    """A copy of that run, to spoil."""
    return RunDir(shutil.copytree(base / "tiny", tmp_path / "runs" / "spoilt"))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert call(*words) == 0
    return capsys.readouterr().out


def told_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(told(capsys, *words, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a user's mistake: three lines, exit code 2."""
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert "why: " in captured.err and "do this: " in captured.err and "Traceback" not in captured.err
    return captured.err


# ---- docs/files.md


def documented() -> dict[str, set[str]]:
    """Keys by file, as the page's tables have them."""
    sections: dict[str, set[str]] = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        rows = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
        sections[title.strip("` ")] = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    played = sections["rollouts/step_N.jsonl"]
    sections["evaluations/step_N.jsonl"] = {key for key in played if not key.startswith("learned.")}
    return sections


def keys_of(value: Any, above: str = "") -> Iterator[str]:
    """Dotted paths to everything that is not an object; `[]` stands for each object of a list."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from keys_of(below, f"{above}.{key}" if above else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for below in value:
            yield from keys_of(below, f"{above}[]")
    else:
        yield above


def matches(key: str, pattern: str) -> bool:
    """`<name>` in the page stands for anything; a file name has dots of its own."""
    return re.fullmatch(re.sub(r"<\w+>", ".+", re.escape(pattern)), key) is not None


def written(run: RunDir) -> dict[str, list[Any]]:
    """Objects by file, named as in the page."""
    found: dict[str, list[Any]] = {}
    for path in sorted(run.path.rglob("*.json*")):
        name = re.sub(r"step_\d+", "step_N", str(path.relative_to(run.path)))
        name = re.sub(r"/v\d+/", "/vN/", name)
        text = path.read_text(encoding="utf-8")
        objects = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        found.setdefault(name, []).extend(objects)
    return found


def test_every_file_and_key_is_documented(base: Path) -> None:
    page, files = documented(), written(RunDir(base / "tiny"))
    elsewhere = {"weights/best/best.json", "live/releases.json"}  # With eval.best_metric; by rollcast serve.
    assert files.keys() == page.keys() - elsewhere
    unknown = {
        f"{name}: {key}"
        for name, objects in files.items()
        for key in set(keys_of(objects))
        if not any(matches(key.removeprefix("[]."), pattern) for pattern in page[name])
    }
    assert unknown == set()


def test_nothing_is_documented_that_is_not_written(base: Path) -> None:
    """In the files that always look the same; the others have keys of rarer events."""
    page, files = documented(), written(RunDir(base / "tiny"))
    page["run.json"].remove("from")  # Only of a run that began from another one.
    rare = {"metrics.jsonl", "ledger.jsonl", "signatures.json"}
    for name in files.keys() - rare:
        keys = {key.removeprefix("[].") for key in keys_of(files[name])}
        assert {p for p in page[name] if not any(matches(key, p) for key in keys)} == set(), name


def test_the_record_of_the_best_policy_is_documented(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    policy = BestPolicy(run, EvalSection(best_metric="QA-v0/f1"), 0)
    assert policy.judge(4, 7, {"eval/QA-v0/f1": 0.5}, Path.mkdir)
    found = written(run)
    assert {name: set(keys_of(objects[0])) for name, objects in found.items()} == {
        "weights/best/best.json": documented()["weights/best/best.json"]
    }


def test_documented_metrics_are_in_the_code() -> None:
    folders = (ROOT / "services" / "rollcast", ROOT / "learners" / "rollcast_learners")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py")))
    plain = {key for key in documented()["metrics.jsonl"] if "<" not in key and not key.startswith("ledger/")}
    assert {key for key in plain if f'"{key}"' not in code} == set()


def test_the_page_lists_every_stage() -> None:
    code = (ROOT / "services" / "rollcast" / "run.py").read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    stages = set(re.findall(r'self\.watch\("([^"]+)"\)', code))
    assert len(stages) >= 5
    assert {stage for stage in stages if f"`{stage.replace(' ', '_')}`" not in page} == set()


# ---- status and runs


def test_status_of_a_finished_run(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told_json(capsys, "status", "tiny", "--run.dir", str(base))
    rows = metrics.read(base / "tiny" / "metrics.jsonl")
    assert (found["state"], found["step"], found["total_steps"], found["policy_version"]) == ("finished", 2, 2, 2)
    assert found["fleet"] == {"workers": 1, "wanted": 1, "draining": 0, "restarts": 0}
    assert found["ledger"]["done"] == 4
    reward = found["figures"]["eval/QA-v0/reward"]
    assert (reward["step"], reward["since_step"], reward["now"]) == (2, 0, rows[-1]["eval/QA-v0/reward"])
    assert reward["change"] == pytest.approx(rows[-1]["eval/QA-v0/reward"] - rows[0]["eval/QA-v0/reward"])
    assert found["seconds"]["learn"] == pytest.approx(sum(row.get("time/learn_s", 0.0) for row in rows))


def test_status_is_one_plain_screen(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "status", "--run.dir", str(base))  # No name: the newest.
    assert text.startswith("tiny  finished on ")
    assert "step 2 of 2   policy version 2" in text
    for word in ("reward/mean", "eval/QA-v0/f1", "(+0.000 since step 0)", "staleness", "ledger", "busy", "seconds"):
        assert word in text
    assert "\x1b" not in text
    assert len(text.splitlines()) < 24


def test_a_run_is_running_while_its_process_is(copied: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    import psutil

    other = psutil.Process().parent()
    owner = json.loads(copied.run_json.read_text()) | {"pid": other.pid, "process_started": other.create_time()}
    copied.run_json.write_text(json.dumps(owner))
    assert told_json(capsys, "status", str(copied.path))["state"] == "running"
    copied.run_json.write_text(json.dumps(owner | {"process_started": other.create_time() - 100}))
    assert told_json(capsys, "status", str(copied.path))["state"] == "finished"


def test_a_run_of_another_host_is_known_by_its_last_word(copied: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    copied.run_json.write_text(json.dumps(json.loads(copied.run_json.read_text()) | {"host": "elsewhere"}))
    status = copied.path / "status.json"
    said = json.loads(status.read_text()) | {"total_steps": 9}
    status.write_text(json.dumps(said | {"time": time.time()}))
    assert told_json(capsys, "status", str(copied.path))["state"] == "running"
    status.write_text(json.dumps(said | {"time": time.time() - 600}))
    assert told_json(capsys, "status", str(copied.path))["state"] == "unknown"


def test_status_before_the_first_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has just been claimed: nothing but run.json."""
    run = RunDir(tmp_path / "runs" / "young")
    run.create()
    run.claim("local", "rollcast")
    assert "young" in told(capsys, "status", "--run.dir", str(tmp_path / "runs"))
    assert told_json(capsys, "runs", "--run.dir", str(tmp_path / "runs"))[0]["reward"] is None
    assert "no rollouts yet" in refused(capsys, "rollouts", "young", "--run.dir", str(tmp_path / "runs"))


def test_runs_lists_the_newest_first(copied: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    older = RunDir(shutil.copytree(copied.path, copied.path.with_name("older")))
    older.run_json.write_text(json.dumps(json.loads(older.run_json.read_text()) | {"started": 0.0}))
    rows = told_json(capsys, "runs", "--run.dir", str(copied.path.parent))
    assert [row["name"] for row in rows] == ["spoilt", "older"]
    assert rows[0]["reward"] == metrics.read(copied.metrics)[-1]["reward/mean"]
    assert "finished" in told(capsys, "runs", "--run.dir", str(copied.path.parent))


def test_no_runs_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told_json(capsys, "runs", "--run.dir", str(tmp_path)) == []
    assert "no runs below" in told(capsys, "runs", "--run.dir", str(tmp_path))


@pytest.mark.parametrize("verb", ["status", "rollouts", "export", "eval"])
def test_an_unknown_run_is_told_with_the_known_ones(verb: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [verb, "nope", *(["out"] if verb == "export" else []), "--run.dir", str(base)]
    said = refused(capsys, *words)
    assert "nope" in said and "tiny" in said
    words[-1] = str(base / "none")
    assert str(base / "none") in refused(capsys, *words)


def test_what_is_only_looked_at_takes_no_settings(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--run.steps" in refused(capsys, "status", "tiny", "--run.dir", str(base), "--run.steps", "3")


# ---- rollouts


def test_rollouts_of_the_newest_step(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "rollouts", "tiny", "--run.dir", str(base), "--limit", "3")
    record = next(records.read(base / "tiny" / "rollouts" / "step_2.jsonl"))
    assert "step 2: 3 of 8 samples" in text
    assert record["turns"][0]["observation"] in text
    assert "f1 0.00" in text
    assert len(text.splitlines()) == 5


def test_rollouts_as_json_are_the_records(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "rollouts", str(base / "tiny"), "--step", "1", "--json")
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [{"step": 1, **row} for row in records.read(base / "tiny" / "rollouts" / "step_1.jsonl")]


def test_rollouts_token_by_token(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rollouts", "tiny", "--run.dir", str(base), "--tokens")
    text = told(capsys, *words, "--limit", "1")
    first = next(records.read(base / "tiny" / "rollouts" / "step_2.jsonl"))
    assert f"sample {first['prompt']}: reward {first['reward']:.3f}" in text and "push" in text
    sampled = sum(sum(stream["trained"]) for stream in first["streams"])
    assert len(first["learned"]["push"]) == sampled
    assert all(f" {percent(logprob)} " in text for logprob in first["learned"]["logprobs"])
    page = tmp_path / "tokens.html"
    assert "8 samples of step 1" in told(capsys, *words, "--step", "1", "--page", str(page))
    assert page.read_text(encoding="utf-8").count("<h3>") == 8
    assert "add --tokens" in refused(capsys, *words[:-1], "--page", str(page))
    assert "leave out --follow" in refused(capsys, *words, "--follow")


def test_a_step_without_rollouts_is_told_with_the_others(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "steps 1 to 2" in refused(capsys, "rollouts", "tiny", "--run.dir", str(base), "--step", "7")
    assert "exclude" in refused(capsys, "rollouts", "tiny", "--run.dir", str(base), "--step", "1", "--follow")


def test_what_a_policy_says_cannot_steer_the_terminal(copied: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied.rollouts / "step_2.jsonl"
    record = next(records.read(path))
    record["turns"][0]["answer"] = "\x1b[2J\x1b]0;title\x07[red]x\n\ud800 end"
    path.write_text(json.dumps(record) + "\n")
    text = told(capsys, "rollouts", str(copied.path))
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[2J" in text and "[red]x\\n\\ud800 end" in text


def test_follow_tells_steps_as_they_come_and_ends_with_the_run(
    copied: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    import psutil

    other = psutil.Process().parent()
    ended = copied.run_json.read_text()
    alive = {"pid": other.pid, "process_started": other.create_time()}
    copied.run_json.write_text(json.dumps(json.loads(ended) | alive))
    (copied.rollouts / "step_2.jsonl").rename(copied.path / "later")

    def go_on() -> None:
        time.sleep(1.2)
        os.utime(copied.path / "later")
        (copied.path / "later").rename(copied.rollouts / "step_2.jsonl")
        copied.run_json.write_text(ended)

    writer = threading.Thread(target=go_on)
    writer.start()
    lines = told(capsys, "rollouts", str(copied.path), "--follow", "--json", "--limit", "1").splitlines()
    writer.join()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


# ---- export and eval


def test_export_is_the_trained_policy(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert told_json(capsys, "export", "tiny", str(target), "--run.dir", str(base), "--which", "last") == {
        "path": str(target),
        "run": "tiny",
        "step": 2,
        "policy_version": 2,
    }
    model = AutoModelForCausalLM.from_pretrained(target, use_safetensors=True)
    published = load_file(base / "tiny" / "weights" / "v2" / "v2-0.safetensors")
    masters = load_file(base / "tiny" / "checkpoints" / "step_2" / "policy.safetensors")
    loaded = dict(model.named_parameters())
    computed_in = getattr(torch, compute_dtype(settings_of(RunDir(base / "tiny"))))
    assert loaded.keys() == published.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == computed_in, "the type that this processor computes in"
        assert torch.equal(tensor, published[name]) and torch.equal(tensor, masters[name].to(computed_in))
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert model.generation_config.eos_token_id is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no partial folder is left"


def test_export_of_a_checkpoint_and_of_published_weights(
    base: Path, copied: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "export", str(base / "tiny" / "checkpoints" / "step_2"), str(tmp_path / "a"))
    shutil.rmtree(copied.checkpoints)
    assert "policy version 2" in told(capsys, "export", str(copied.path), str(tmp_path / "b"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_policy_is_not_exported(copied: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (copied.checkpoints / "step_2" / "policy.safetensors", copied.weights / "v2" / "v2-0.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    assert call("export", str(copied.path), str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "checkpoint step_2 is not used: policy.safetensors differs from its digest" in said
    assert "its bytes changed" in said
    assert call("export", str(copied.checkpoints / "step_2"), str(tmp_path / "out")) == 1
    assert not (tmp_path / "out").exists()


def test_what_export_refuses(base: Path, copied: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, full = str(base / "tiny"), tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    assert "holds files" in refused(capsys, "export", run, str(full))
    assert "is a file" in refused(capsys, "export", run, str(full / "mine"))
    assert "cannot be written" in refused(capsys, "export", run, str(full / "mine" / "below"))
    assert "no best checkpoint" in refused(capsys, "export", run, str(tmp_path / "out"), "--which", "best")
    step = str(base / "tiny" / "checkpoints" / "step_2")
    assert "--which" in refused(capsys, "export", step, str(tmp_path / "out"), "--which", "last")
    alone = shutil.copytree(step, tmp_path / "alone")
    assert "not inside a run" in refused(capsys, "export", str(alone), str(tmp_path / "out"))
    assert "model.path" in refused(capsys, "export", run, str(tmp_path / "out"), "--model.path", "/nowhere")
    shutil.rmtree(copied.checkpoints)
    shutil.rmtree(copied.weights)
    assert "saved no policy" in refused(capsys, "export", str(copied.path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_eval_measures_the_policy(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "tiny", "--run.dir", str(base), "--rollout.engine", "torch", "--rollout.max_new_tokens", "4"]
    found = told_json(capsys, *words, "--env", "rollcast/QA-v0", "--split", "test", "--samples", "6")
    assert (found["run"], found["step"], found["policy_version"]) == ("tiny", 2, 2)
    assert (found["split"], found["asked"], found["errors"]) == ("test", 6, 0)
    assert sum(found["counts"].values()) == 6
    assert {"eval/QA-v0/f1", "eval/QA-v0/exact_match", "eval/QA-v0/reward"} <= found["figures"].keys()
    text = told(capsys, *words, "--samples", "2")
    assert "tiny, step 2, policy version 2: split test, greedy answers" in text
    assert re.search(r"all +2 ", text)


def test_what_eval_refuses(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "tiny", "--run.dir", str(base)]
    assert "scripted" in refused(capsys, *words)
    words += ["--rollout.engine", "torch"]
    assert "expected one of train, validation, test" in refused(capsys, *words, "--split", "nope")
    assert "rollcast/QA-v0" in refused(capsys, *words, "--env", "nope/Task-v0")


# ---- doctor


def test_doctor_says_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(doctor, "IMPORTED", ("json",))
    assert call("doctor", "--json") == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["import json"]["state"] == "ok"
    assert found["VLLM_SERVER_DEV_MODE"]["state"] == "fail" and found["VLLM_SERVER_DEV_MODE"]["do_this"]
    assert found["VLLM_ALLOW_INSECURE_SERIALIZATION"]["state"] == "ok"
    assert found["RAY_ADDRESS"]["state"] == "fail"
    assert {"python", "ray", "vllm", "bfloat16", "CPUs", "memory", "shared memory", "leftovers"} <= found.keys()
    assert all(check["do_this"] for check in found.values() if check["state"] != "ok")


def test_doctor_finds_a_broken_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_build.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    found = dict(doctor._imports(("json", "broken_build", "csv"), 60.0, lambda _: None))
    assert [check.state for check in found.values()] == ["ok", "fail", "fail"]
    assert "torchvision::nms" in found["broken_build"].found


def test_a_module_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_build.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    found = dict(doctor._imports(("json", "hanging_build"), 3.0, lambda _: None))
    assert found["json"].state == "ok"
    assert found["hanging_build"].state == "fail" and "more than 3 s" in found["hanging_build"].found


def test_doctor_sweeps_what_a_dead_process_left() -> None:
    folder = Path(f"/dev/shm/{PREFIX}doctor-test-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / OWNER).write_text(json.dumps({"pid": os.getpid(), "started": 0.0}))
        found = doctor._leftovers({}, fix=False)
        assert found.state == "warn" and str(folder) in found.found and "--fix" in found.do_this
        assert folder.exists()
        assert str(folder) in doctor._leftovers({}, fix=True).found
        assert not folder.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("mode", "state"), [(0o600, "ok"), (0o644, "warn"), (0o640, "warn")])
def test_a_token_is_for_its_owner(mode: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    (check,) = doctor._token_file()
    assert check.state == state
    assert "secret" not in check.found
    token.unlink()
    (check,) = doctor._token_file()
    assert check.state == "fail"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)),
        ("head", ("head", None)),
        ("head:x", (None, None)),
    ],
)
def test_addresses_of_clusters(address: str, expected: tuple[str | None, int | None]) -> None:
    assert doctor._host_and_port(address) == expected


# ---- help


@pytest.mark.parametrize(
    "verb", ["status", "runs", "rollouts", "export", "eval", "doctor", "scale", "pause", "resume", "stop"]
)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Example: rollcast {verb}" in told(capsys, verb, "--help")
