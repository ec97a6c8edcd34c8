"""Warm start, rewards of the user, the best policy and early stopping: the whole way, through real Ray."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rollcast import best, metrics, records
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import RunFailed, UsageError
from rollcast.export import export, settings_of
from rollcast.rundir import RunDir
from rollcast.runs import Source
from rollcast.sft import sft
from rollcast.train import train

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


def config_for(folder: Path, model: str, *overrides: str) -> RunConfig:
    return load_config(SCRIPTED, [f"--model.path={model}", f"--run.dir={folder}", *overrides])


def trained(config: RunConfig) -> RunDir:
    folder = RunDir(Path(config.run.dir) / config.run.name)
    train(config, folder.path, "auto")
    return folder


def warmed_up(config: RunConfig) -> RunDir:
    folder = RunDir(Path(config.run.dir) / config.run.name)
    sft(config, folder.path, "auto")
    return folder


@pytest.mark.ray
def test_a_warm_start_learns_and_training_goes_on_from_it(tmp_path: Path, tiny_fp32: str, ray_cluster: str) -> None:
    words = ("--learner.learning_rate=1e-2", "--run.name=warm", "--run.steps=6", "--eval.every=3")
    folder = warmed_up(config_for(tmp_path, tiny_fp32, *words))
    rows = metrics.read(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert rows[-1]["loss/supervised"] < rows[1]["loss/supervised"]
    assert AutoModelForCausalLM.from_pretrained(folder.path / "policy").config.model_type == "llama"

    went_on = trained(config_for(tmp_path, str(folder.path / "policy"), "--run.name=after", "--run.steps=1"))
    assert metrics.read(went_on.metrics)[-1]["step"] == 1


@pytest.mark.ray
def test_a_warm_start_that_was_cut_off_goes_on_as_if_it_had_not(
    tmp_path: Path, tiny_fp32: str, ray_cluster: str
) -> None:
    def losses(folder: RunDir) -> list[float]:
        return [row["loss/supervised"] for row in metrics.read(folder.metrics)[1:]]

    whole = warmed_up(config_for(tmp_path, tiny_fp32, "--run.name=whole", "--learner.learning_rate=1e-3"))
    parts = ("--run.name=parts", "--learner.learning_rate=1e-3")
    warmed_up(config_for(tmp_path, tiny_fp32, *parts, "--run.steps=2"))
    resumed = warmed_up(config_for(tmp_path, tiny_fp32, *parts))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.ray
def test_a_failing_reward_masks_its_sample_and_the_run_goes_on(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    rewards = (
        '[{function="reward_functions:moody", weight=2.0}, {function="reward_functions:trl_length", weight=-0.001},'
        ' {function="repetition", weight=-0.5}]'
    )
    config = config_for(
        tmp_path, tiny_bf16, f"--env.0.rewards={rewards}", "--env.0.name=places", "--rollout.max_error_share=0.9"
    )
    folder = trained(config)
    rows = metrics.read(folder.metrics)
    assert rows[-1]["step"] == 4 and rows[-1]["dropped/error"] > 0, "some were counted, and the run went on"
    played = [record for path in records.files(folder.rollouts) for record in records.read(path)]
    assert all(record["error"] is None for record in played), "never trained on"
    assert len(played) < 4 * 2 * 4, "a masked sample does not take its group with it, and is not replaced"
    for record in played:
        assert set(record["parts"]) == {"f1", "length", "moody", "trl_length", "repetition"}
        assert sum(record["parts"].values()) == pytest.approx(record["reward"])
        answer = record["turns"][-1]["answer"]
        assert record["parts"]["moody"] == pytest.approx(2.0 / (1 + len(answer)))
        assert record["parts"]["trl_length"] == pytest.approx(-0.001 * len(answer))
    assert {"reward_of/places/total", "reward_of/places/moody", "reward_s/moody/max"} <= rows[-1].keys()
    assert "eval/places/f1" in rows[0]


@pytest.mark.ray
def test_dynamic_sampling_replaces_prompts_that_teach_nothing(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    rewards = '--env.0.rewards=[{function="reward_functions:uneven"}]'
    words = (rewards, "--env.0.own_reward_weight=0", "--learner.algorithm=dapo", "--eval.every=0")
    folder = trained(config_for(tmp_path, tiny_bf16, *words))
    rows = metrics.read(folder.metrics)
    assert rows[-1]["step"] == 4 and rows[-1]["dropped/equal"] > 0 and rows[-1]["ledger/failed"] == 0
    played = [record for path in records.files(folder.rollouts) for record in records.read(path)]
    groups = {record["group"]: [r["reward"] for r in played if r["group"] == record["group"]] for record in played}
    assert len(groups) == 4 * 2 and all(len(set(rewards)) > 1 for rewards in groups.values())
    events = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    skipped = {event["group"] for event in events if event["event"] == "skipped"}
    assert len(skipped) * 4 >= rows[-1]["dropped/equal"] and not skipped & set(map(int, groups))


@pytest.mark.soak
@pytest.mark.ray
def test_dynamic_sampling_ends_where_nothing_teaches(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = '--env.0.rewards=[{function="reward_functions:indifferent"}]'
    words = (rewards, "--env.0.own_reward_weight=0", "--learner.algorithm=dapo", "--eval.every=0", "--run.steps=2")
    rows = metrics.read(trained(config_for(tmp_path, tiny_bf16, *words)).metrics)
    assert rows[-1]["step"] == 2 and rows[-1]["dropped/equal"] == 10 * 2 * 4
    assert "dynamic sampling lets them pass" in capsys.readouterr().out


@pytest.mark.ray
def test_a_reward_that_always_fails_ends_the_run_with_its_name(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    config = config_for(tmp_path, tiny_bf16, '--env.0.rewards=[{function="reward_functions:broken"}]', "--eval.every=0")
    with pytest.raises(RunFailed, match=r"reward broken[\s\S]*on holiday"):
        trained(config)


@pytest.mark.ray
def test_the_best_policy_is_kept_and_patience_ends_the_run(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--eval.best_metric=QA-v0/f1", "--eval.patience=1", "--eval.every=1", "--run.steps=9", "--eval.sampled=2")
    folder = trained(config_for(tmp_path, tiny_bf16, *words))
    rows = metrics.read(folder.metrics)
    # The script says the same under every policy, so that nothing is ever better than the first evaluation.
    assert rows[-1]["step"] < 9
    kept = best.read(folder)
    assert kept is not None and (kept["step"], kept["policy_version"]) == (0, 0)
    assert kept["value"] == rows[0]["eval/QA-v0/f1"] and "eval/QA-v0/sampled_f1" in rows[0]
    assert json.loads(folder.signatures.read_text()) == {}

    source, config = Source(folder), settings_of(folder)
    chosen = export(source, tmp_path / "best", None, config, print)
    assert (chosen.step, chosen.policy_version) == (0, 0)
    last = export(source, tmp_path / "last", "last", config, print)
    assert last.step == rows[-1]["step"]
    mine, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (chosen.path, tiny_bf16))
    assert all(mine[name].equal(theirs[name]) for name in theirs), "version 0 is the model that training began from"


def test_a_run_without_a_best_policy_says_so(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create()
    config = config_for(tmp_path, "somewhere")
    with pytest.raises(UsageError, match="no best checkpoint"):
        export(Source(folder), tmp_path / "out", "best", config, print)
