"""Settings as people write them: files, overrides, slips of the finger, and the page that documents them."""

import pickle
from pathlib import Path

import pytest

from rollcast.config import RunConfig
from rollcast.config_file import config_reference, load_config
from rollcast.errors import ConfigError, RollcastError, RunDiverged, RunFailed, UsageError

ROOT = Path(__file__).parents[2]
COMMITTED = sorted([*ROOT.glob("deploy/**/*.toml"), *ROOT.glob("benchmarks/**/*.toml")])
SMALLEST = """
[run]
steps = 3
[model]
path = "org/name"
[[env]]
id = "rollcast/QA-v0"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "first run.toml"
    path.write_text(SMALLEST)
    return path


def refused(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_committed_file_loads(path: Path) -> None:
    assert load_config(path).run.steps > 0


def test_demo_and_peer_play_what_was_promised() -> None:
    for name in ("deploy/configs/demo.toml", "benchmarks/peer.toml"):
        config = load_config(ROOT / name)
        assert config.samples_per_step == 64
        assert config.rollout.group_size == 8
        assert config.rollout.max_new_tokens == 32
        assert config.rollout.engine == "vllm"
        assert config.learner.critic == "head"
    assert load_config(ROOT / "deploy/configs/demo.toml").buffer.max_staleness == 2
    assert load_config(ROOT / "benchmarks/peer.toml").model.dtype == "bfloat16"


def test_the_smallest_file_gets_a_name_and_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.run.name == "first-run"
    assert config.learner.clip_high == 0.28
    assert config.kl.applied_as == "reward"


def test_a_resolved_file_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    overrides = ["--env.0.kwargs.since=2020-01-31", '--env.0.kwargs.kinds=["capital"]', "--kl.kind", "k3"]
    overrides += ["--kl.as", "loss", "--env.1.id=b", "--rollout.engine_args.compilation_config.level=0"]
    config = load_config(file, [*overrides, '--env.0.kwargs.system_prompt="Sé \\"brève\\"\\n"'])
    again = tmp_path / "config.toml"
    again.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(again) == config
    assert "\nas = " in config.to_toml()


def test_overrides_are_toml_literals_or_plain_text(file: Path) -> None:
    words = ["--learner.learning_rate", "1e-4", "--rollout.temperature=1", "--buffer.max_staleness", "0"]
    words += ["--env.0.kwargs.split", "test", "--env.0.kwargs.kinds", "[1, 2]", "--run.name", "2026-01-01"]
    words += ["--tracking.tensorboard=false", "--learner.value_clip=0.2"]
    config = load_config(file, words)
    assert config.learner.learning_rate == 1e-4
    assert config.rollout.temperature == 1.0
    assert config.buffer.max_staleness == 0
    assert config.env[0].kwargs == {"split": "test", "kinds": [1, 2]}
    assert config.run.name == "2026-01-01"
    assert config.tracking.tensorboard is False
    assert config.learner.value_clip == 0.2


def test_nothing_changes_after_loading(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.learner.epochs = 4
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("learner.clipp", "learner.clip_low"),
        ("learner.lr", "learner.learning_rate"),
        ("learner.max_stalenes", "buffer.max_staleness"),
        ("rollout.learning_rate", "learner.learning_rate"),
        ("env.0.idd", "env.0.id"),
        ("kl.applied_as", "kl.as"),
        ("leaner.epochs", "learner"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(file: Path, unknown: str, nearest: str) -> None:
    error = refused(file, f"--{unknown}=1")
    path = unknown if nearest != "learner" else "leaner"
    assert f"{path} is not a known key" in error.what
    assert error.why.endswith(f"the nearest known one is {nearest}")
    assert error.exit_code == 2


@pytest.mark.parametrize(
    "override",
    [
        "rollout.workers=0",
        "rollout.workers=two",
        "rollout.workers=1.5",
        "rollout.workers={min = -1, max = 2}",
        "rollout.workers={min = 1, max = 2, most = 3}",
        "buffer.max_staleness=-1",
        "rollout.temperature=0",
        "rollout.gpus_per_worker=1.5",
        "learner.gpus_per_learner=2.5",
        "learner.learning_rate=nan",
        "learner.gamma=1.1",
        "learner.clip_low=1.1",
        "learner.epochs=true",
        "learner.critic=twin",
        "learner.dual_clip=1.0",
        "learner.algorithm=trpo",
        "buffer.correction_low=1.5",
        "kl.target=0.1",
        "run.steps=2.0",
        "run.name=../elsewhere",
        "kl.coef=0.1",
        "kl.as=penalty",
        "weights.probe_tokens=1",
        "model.dtype=float16",
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_path(file: Path, override: str) -> None:
    error = refused(file, f"--{override}")
    assert override.partition("=")[0] in error.what
    assert error.fix


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("where", ["rollout", "rollout.engine_args", "rollout.engine_args.generation"])
def test_sampling_that_training_cannot_trust_is_refused(file: Path, where: str, key: str) -> None:
    error = refused(file, f"--{where}.{key}=0.9")
    assert f"{where}.{key} is refused" in error.what
    assert "distribution that was sampled from" in error.why
    assert "rollout.temperature" in error.fix


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--learner.minibatches=65"], "learner.minibatches"),
        (["--learner.minibatches=33", "--learner.num_learners=2"], "learner.minibatches"),
        (["--rollout.group_size=1", "--learner.normalize_advantages=group"], "rollout.group_size"),
        (["--learner.critic=none", "--learner.on_length=bootstrap"], "learner.on_length"),
        (["--learner.head=triton"], "learner.head"),
        (["--learner.sharding=fsdp"], "learner.sharding"),
        (["--learner.sharding=fsdp", "--learner.num_learners=0"], "learner.sharding"),
        (["--rollout.max_new_tokens=512"], "rollout.max_new_tokens"),
        (["--rollout.engine=torch", "--rollout.engine_args.enforce_eager=true"], "rollout.engine"),
        (["--rollout.tensor_parallel=2", "--rollout.gpus_per_worker=1"], "rollout.gpus_per_worker"),
        (["--rollout.engine_args.max_model_len=9"], "rollout.engine_args.max_model_len"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(file: Path, words: list[str], path: str) -> None:
    assert f"{path} is refused" in refused(file, *words).what


def test_settings_of_a_critic_do_no_harm_without_one(file: Path) -> None:
    assert load_config(file, ["--learner.critic=none", "--learner.value_coef=0.5"]).learner.critic == "none"


def test_all_slips_are_told_at_once(file: Path) -> None:
    error = refused(file, "--learner.clipp=1", "--rollout.workers=0", "--env.0.idd=x")
    assert "3 things do not fit" in error.what
    for path in ("learner.clipp", "rollout.workers", "env.0.idd"):
        assert path in error.why


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run\nsteps = 1", "line 1"),
        ("[run]\nsteps = \n", "line 2"),
        ("[run]\nsteps = 1\n[[env]]\nid = 'a'", "model is missing"),
        ("[run]\nsteps = 1\n[model]\npath = 'a'", "[[env]] with an id is missing"),
        ("run = 3\n[model]\npath = 'a'\n[[env]]\nid = 'a'", "run is not a section"),
        ("[run]\nsteps = 1\n[model]\npath = 'a'\n[env]\nid = 'a'", "write [[env]]"),
        ("[run]\nsteps = '1'\n[model]\npath = 'a'\n[[env]]\nid = 'a'", "run.steps cannot be '1'"),
    ],
)
def test_a_broken_file_is_told_in_words(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    assert expected in str(refused(path))


def test_workers_are_a_number_or_bounds(file: Path) -> None:
    rollout = load_config(file, ["--rollout.workers.min=0", "--rollout.workers.max=4"]).rollout
    assert rollout.fleet_bounds == (0, 4) and rollout.first_workers == 1
    assert load_config(file, ["--rollout.workers={min = 2, max = 4}"]).rollout.first_workers == 2
    fixed = load_config(file, ["--rollout.workers=3"])
    assert fixed.rollout.fleet_bounds == (3, 3) and fixed.rollout.first_workers == 3
    assert fixed.without_rollouts().rollout.first_workers == 0
    again = load_config(file, ["--rollout.workers={min = 2, max = 4}"])
    file.write_text(again.to_toml())
    assert load_config(file) == again
    assert "above max = 4" in refused(file, "--rollout.workers.min=5").why
    assert "rollout.workers.max is missing" in str(refused(file, "--rollout.workers={min = 1}"))


def test_what_cannot_be_read_is_told_in_words(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.toml").why
    assert "Is a directory" in refused(tmp_path).why
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# \xe9")
    assert "save it as UTF-8" in refused(latin).fix


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--env.3.id=x"], "env is a list of 1"),
        (["--env.id=x"], "--env.0.id VALUE"),
        (["--run.name", "b", "--learner.epochs"], "has no value"),
        (["--run=x"], "write --section.key VALUE"),
        (["--learner.=x"], "write --section.key VALUE"),
        (["--run.steps.x=1"], "run.steps is a value"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(file: Path, words: list[str], expected: str) -> None:
    assert expected in str(refused(file, *words))


def test_the_committed_page_is_the_models_own() -> None:
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == config_reference()


def test_every_setting_says_what_it_means() -> None:
    for line in config_reference().splitlines():
        if line.startswith("| `"):
            assert line.count("|") == 5, line
            assert "None" not in line


def test_errors_carry_their_exit_code_and_survive_pickling() -> None:
    codes = {RollcastError: 1, UsageError: 2, ConfigError: 2, RunFailed: 1, RunDiverged: 3}
    for kind, code in codes.items():
        error = pickle.loads(pickle.dumps(kind("it broke", "it was old", "buy another")))
        assert (type(error), error.exit_code) == (kind, code)
        assert str(error) == "it broke\nwhy: it was old\ndo this: buy another"


def test_a_config_built_in_python_is_checked_alike() -> None:
    data = {"run": {"name": "a", "steps": 1}, "model": {"path": "a"}, "env": [{"id": "b"}]}
    assert RunConfig.model_validate(data).rollout.workers == 1
    with pytest.raises(ValueError, match="distribution that was sampled from"):
        RunConfig.model_validate(data | {"rollout": {"engine_args": {"top_p": 0.5}}})
