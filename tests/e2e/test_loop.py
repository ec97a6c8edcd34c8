"""The loop as a person runs it, through real Ray: what it leaves behind, how old its samples are, that it repeats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from rollcast import metrics, records
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.demo import report
from rollcast.export import export
from rollcast.rundir import RunDir
from rollcast.runs import Source
from rollcast.train import train

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


def config_for(folder: Path, model: str, *overrides: str) -> RunConfig:
    return load_config(SCRIPTED, [f"--model.path={model}", f"--run.dir={folder}", *overrides])


def run_it(config: RunConfig, resume: str = "auto") -> RunDir:
    folder = RunDir(Path(config.run.dir) / config.run.name)
    train(config, folder.path, resume)
    return folder


def rollouts(folder: RunDir) -> list[dict[str, Any]]:
    return [record for path in records.files(folder.rollouts) for record in records.read(path)]


@pytest.mark.ray
def test_a_run_leaves_what_the_documentation_says(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    folder = run_it(config_for(tmp_path, tiny_bf16, "--checkpoint.every=2"))
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "eval/QA-v0/f1" in rows[0] and "reward/mean" not in rows[0]
    assert [row["policy_version"] for row in rows] == [0, 1, 2, 3, 4]
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step_2", "step_4"}
    assert [path.name for path in records.files(folder.rollouts)] == [f"step_{n}.jsonl" for n in range(1, 5)]
    assert [path.name for path in records.files(folder.evaluations)] == [f"step_{n}.jsonl" for n in (0, 2, 4)]
    assert json.loads((folder.weights / "high_water.json").read_text())["version"] == 4
    assert (folder.weights / "v4" / "manifest.json").exists()
    assert folder.curve.stat().st_size > 1000
    assert list(folder.tensorboard.glob("events*"))
    assert load_config(folder.config).learner.prompts_per_step == 2
    assert not any(isinstance(value, float) and value != value for row in rows for value in row.values())

    console = Console(record=True, width=120)
    report(load_config(folder.config), folder, console)
    told = console.export_text()
    assert "Held-out questions, greedy answers, 8 asked" in told and "The same questions, before and after" in told
    assert all(kind in told for kind in ("capital", "continent", "currency", "all"))
    assert str(folder.curve) in told and f"rollouts {folder.path}" in told


@pytest.mark.ray
def test_every_group_is_trained_once_and_no_sample_is_older_than_the_bound(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    folder = run_it(config_for(tmp_path, tiny_bf16, "--rollout.workers=2", "--buffer.max_staleness=2"))
    rows = metrics.read(folder.metrics)[1:]
    assert max(row["staleness/max"] for row in rows) <= 2
    assert rows[-1]["dropped/stale"] == 0, "the admission gate alone keeps samples young enough"
    groups = [record["group"] for record in rollouts(folder)]
    assert len(groups) == 4 * 2 * 4
    assert all(groups.count(group) == 4 for group in set(groups)), "the four samples of a group, and no second time"
    events = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    done = [event["group"] for event in events if event["event"] == "done"]
    assert sorted(done) == sorted(map(int, set(groups)))


@pytest.mark.ray
def test_the_same_seed_gives_the_same_run(tmp_path: Path, tiny_fp32: str, ray_cluster: str) -> None:
    """Where nothing is played ahead: no sample is a version old."""

    def figures(name: str) -> tuple[list[dict[str, Any]], str]:
        folder = run_it(config_for(tmp_path, tiny_fp32, "--buffer.max_staleness=0", f"--run.name={name}"))
        read = metrics.read(folder.metrics)
        assert max(row["staleness/max"] for row in read[1:]) == 0 == read[-1]["dropped/stale"]
        told = ("reward", "loss", "kl", "eval", "grad")
        rows = [{key: row[key] for key in row if key.startswith(told)} for row in read]
        manifest = json.loads((folder.weights / "v4" / "manifest.json").read_text())
        return rows, json.dumps([tensor["digest"] for tensor in manifest["tensors"]])

    assert figures("first") == figures("second")


@pytest.mark.soak
@pytest.mark.ray
def test_a_run_with_a_sharded_policy_goes_on_without(tmp_path: Path, tiny_fp32: str, ray_cluster: str) -> None:
    words = ("--rollout.engine=torch", "--rollout.max_new_tokens=4", "--eval.samples=2", "--learner.learning_rate=1e-2")
    shared = ("--learner.num_learners=2", "--learner.sharding=fsdp", "--run.steps=2")
    folder = run_it(config_for(tmp_path, tiny_fp32, *words, *shared))
    assert [row["step"] for row in metrics.read(folder.metrics)] == [0, 1, 2]
    run_it(config_for(tmp_path, tiny_fp32, *words, "--run.steps=3"))
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    gaps = [row["logprob_gap/max"] for row in rows if "logprob_gap/max" in row]
    assert len(gaps) >= 2 and max(gaps) < 1e-3, "the workers had what the learners had"


@pytest.mark.ray
@pytest.mark.vllm
def test_ray_and_vllm_and_rllib_end_to_end(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    config = config_for(
        tmp_path, tiny_bf16, "--rollout.engine=vllm", "--learner.num_learners=1", "--rollout.max_model_len=384"
    )
    folder = run_it(config)
    rows = metrics.read(folder.metrics)
    assert rows[-1]["step"] == 4
    gaps = [row["logprob_gap/mean"] for row in rows if "logprob_gap/mean" in row]
    assert len(gaps) >= 3 and max(gaps) < 0.05
    played = rollouts(folder)
    for record in played:
        stream, turn = record["streams"][0], record["turns"][0]
        sampled = [i for i, trained in enumerate(stream["trained"]) if trained]
        assert sampled == list(range(turn["start"], turn["end"]))
        covered = [i for _, start, end in stream["spans"] for i in range(start, end)]
        assert covered == sampled, "every sampled token belongs to exactly one policy version"
        assert all(stream["logprobs"][i] < 0 for i in sampled)


@pytest.mark.ray
@pytest.mark.parametrize("publish", ["adapter", pytest.param("merged", marks=pytest.mark.soak)])
def test_adapters_are_trained_published_exported_and_measured(
    publish: str, tmp_path: Path, tiny_fp32: str, ray_cluster: str
) -> None:
    words = (
        "--rollout.engine=torch",
        "--model.dtype=float32",
        "--lora.rank=4",
        f"--lora.publish={publish}",
        "--learner.learning_rate=1e-2",
    )
    config = config_for(tmp_path, tiny_fp32, *words, "--run.steps=2", "--rollout.max_new_tokens=4", "--eval.samples=2")
    folder = run_it(config)
    rows = metrics.read(folder.metrics)
    assert rows[-1]["step"] == 2 and max(row.get("logprob_gap/mean", 0.0) for row in rows) < 1e-3
    kept = json.loads((folder.weights / "v2" / "manifest.json").read_text())
    assert kept["kind"] == ("adapter" if publish == "adapter" else "full")

    exported = tmp_path / "exported"
    done = export(Source(folder), exported, None, load_config(folder.config), print)
    assert done.step == 2
    whole = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_fp32), exported / "adapter")
    ids = torch.arange(30)[None] * 5 % 250
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, apart(ids).logits, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(tiny_fp32, dtype=torch.float32)
        assert (whole(ids).logits - base(ids).logits).abs().max() > 1e-3, "and it has learned"

    again = run_it(config_for(tmp_path, tiny_fp32, *words, "--run.steps=3", "--rollout.max_new_tokens=4"))
    assert metrics.read(again.metrics)[-1]["step"] == 3
