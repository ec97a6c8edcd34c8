"""The plan of a run, against model folders of a few bytes and the machine that runs the test."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rollcast import plan as planning
from rollcast.config import RunConfig
from rollcast.errors import ConfigError
from rollcast.plan import Plan, make_plan, render, run_directory

CONFIG = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
PARAMETERS = 40 * 8 + 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"embedding": np.zeros((40, 8), np.float16), "norm": np.ones(8, np.float16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config(model: Path | str, run_dir: Path, dtype: str = "auto", **sections: dict[str, object]) -> RunConfig:
    """One worker and a learner within the trainer, so that one core is enough for the test."""
    data: dict[str, object] = {
        "run": {"name": "test", "steps": 2, "dir": str(run_dir)},
        "model": {"path": str(model), "dtype": dtype},
        "env": [{"id": "rollcast/QA-v0"}],
    }
    defaults: dict[str, dict[str, object]] = {"rollout": {"engine": "torch"}, "learner": {"num_learners": 0}}
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections}
    return RunConfig.model_validate(data | merged)


def nbytes(plan: Plan, name: str) -> int:
    return sum(need.nbytes for need in plan.needs if name in need.name)


def test_sizes_come_from_the_headers(model: Path, tmp_path: Path) -> None:
    plan = make_plan(config(model, tmp_path))
    assert plan.parameters == PARAMETERS
    assert nbytes(plan, "float32 masters") == 4 * PARAMETERS
    assert nbytes(plan, "Adam moments") == 8 * PARAMETERS
    assert nbytes(plan, "policy to compute with") == 2 * PARAMETERS
    assert nbytes(plan, "published weights") == 2 * 2 * PARAMETERS
    assert nbytes(plan, "KV cache") == 64 * 512 * 2 * 2 * 8 * 2
    assert nbytes(plan, "checkpoints") == 3 * (12 + 2) * PARAMETERS
    assert nbytes(plan, "reference") == 0
    assert plan.samples_per_step == 64
    assert plan.tokens_per_step == 64 * 32


def test_the_estimate_follows_the_settings(model: Path, tmp_path: Path) -> None:
    plan = make_plan(config(model, tmp_path, dtype="float32"))
    assert nbytes(plan, "policy to compute with") == 0
    assert nbytes(plan, "published weights") == 2 * 4 * PARAMETERS
    assert nbytes(make_plan(config(model, tmp_path, kl={"kind": "k3"})), "reference") == 2 * PARAMETERS
    scripted = make_plan(config(model, tmp_path, rollout={"engine": "scripted"}))
    assert nbytes(scripted, "engine weights") == nbytes(scripted, "KV cache") == 0


def test_a_sharded_policy_is_counted_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # A cluster may have the cores that this machine lacks.
    two = {"num_learners": 2}
    whole = make_plan(config(model, tmp_path, learner=two, kl={"kind": "k3"}))
    sharded = make_plan(config(model, tmp_path, learner=two | {"sharding": "fsdp"}, kl={"kind": "k3"}))
    for name in ("float32 masters", "Adam moments", "gradients", "reference"):
        assert nbytes(whole, name) == 2 * nbytes(sharded, name) > 0
    assert nbytes(sharded, "float32 masters") == 4 * PARAMETERS
    assert nbytes(sharded, "policy to compute with") == 0
    assert 0 < nbytes(sharded, "gathered") <= 2 * 2 * PARAMETERS
    assert nbytes(sharded, "activations") == nbytes(whole, "activations")
    assert "sharded" in render(sharded)


def test_it_is_told_with_what_is_free_beside_it(model: Path, tmp_path: Path) -> None:
    text = render(make_plan(config(model, tmp_path)))
    for expected in (
        "2 steps of 64 samples",
        "rollout worker",
        "weight agent",
        "disjoint: 1 CPUs",
        "free here",
    ):
        assert expected in text
    assert str(tmp_path / "test") in text


def test_a_hub_id_is_allowed_without_sizes(tmp_path: Path) -> None:
    plan = make_plan(config("some-org/some-model", tmp_path))
    assert plan.parameters is None
    assert plan.needs == ()
    assert "hub" in plan.warnings[0]
    assert "size unknown" in render(plan)


@pytest.mark.parametrize("path", ["models/none", "/nowhere/at/all", "./a/b", "deploy/none", "none"])
def test_a_missing_model_folder_is_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no model folder"):
        make_plan(config(path, tmp_path))


def test_a_folder_that_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for broken in (
        b"",
        content[:20],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x02" + bytes(7) + b"[]",
    ):
        weights.write_bytes(broken)
        with pytest.raises(ConfigError, match="not a safetensors file"):
            make_plan(config(model, tmp_path))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"holds no .*safetensors"):
        make_plan(config(model, tmp_path))
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        make_plan(config(model, tmp_path))
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        make_plan(config(model, tmp_path))


def test_an_unwritable_run_directory_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_plan(config(model, tmp_path / "file"))
    (tmp_path / "test").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_plan(config(model, tmp_path))


def test_planning_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    make_plan(config(model, tmp_path / "runs"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_few_devices_are_refused_with_the_count(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(config(model, tmp_path, rollout={"engine": "torch", "workers": 4, "gpus_per_worker": 64}))
    assert "asks for 256 GPUs" in str(caught.value)
    assert "4 x rollout worker with 64" in caught.value.why
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="asks for 10001 CPUs"):
        make_plan(config(model, tmp_path, learner={"num_learners": 10, "cpus_per_learner": 1000}))


def test_a_cluster_may_have_what_this_machine_lacks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    plan = make_plan(config(model, tmp_path, rollout={"engine": "torch", "gpus_per_worker": 64}))
    assert "ray://head:10001" in plan.warnings[0]
    assert "gpu memory" in {need.place for need in plan.needs}


def test_shared_memory_must_hold_two_versions(model: Path, tmp_path: Path) -> None:
    huge = {"embedding": {"dtype": "BF16", "shape": [10**9, 10**6], "data_offsets": [0, 0]}}
    header = json.dumps(huge).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    if not planning.SHARED_MEMORY.is_dir():
        pytest.skip("no shared memory as a folder on this system")
    with pytest.raises(ConfigError, match="shared memory is too small"):
        make_plan(config(model, tmp_path))


def test_what_does_not_fit_is_warned_of(model: Path, tmp_path: Path) -> None:
    wide = {"engine": "torch", "concurrency": 10**6, "max_model_len": 10**6}
    plan = make_plan(config(model, tmp_path, rollout=wide))
    assert any(warning.startswith("memory: about") for warning in plan.warnings)
    assert "warning: memory: about" in render(plan)


def test_the_run_directory_is_absolute(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_directory(config(model, Path("here"))) == tmp_path / "here" / "test"
