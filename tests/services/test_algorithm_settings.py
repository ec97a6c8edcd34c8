"""Algorithms in a configuration: what one brings along, what contradicts it, and the pages that tell of it."""

import re
from pathlib import Path

import pytest

from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import ConfigError
from rollcast_learners.algorithms import ALGORITHMS, AlgorithmName

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
TOML = re.compile(r"^```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
START = '[run]\nsteps = 1\n\n[model]\npath = "tiny"\n\n[[env]]\nid = "rollcast/QA-v0"\n\n'
PAGE_OF = {"dr_grpo": "grpo", "reinforce++_baseline": "reinforce++"}


def loaded(folder: Path, text: str, *words: str) -> RunConfig:
    path = folder / "algorithm.toml"
    path.write_text(START + text, encoding="utf-8")
    return load_config(path, words)


def chosen(folder: Path, name: str, *words: str) -> RunConfig:
    soft = ["--kl.kind=k1", "--kl.coef=0.1"] if name == "soft_q" else []
    return loaded(folder, "", f"--learner.algorithm={name}", *soft, *words)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_brings_its_settings_along_and_what_is_said_stands(name: AlgorithmName, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name]
    learner = chosen(tmp_path, name).learner
    assert {key: getattr(learner, key) for key in algorithm.presets} == dict(algorithm.presets)
    said = chosen(tmp_path, name, "--learner.clip_high=0.7", "--learner.loss_mean=tokens").learner
    assert (said.clip_high, said.loss_mean) == (0.7, "tokens")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resolved_configuration_loads_to_the_same(name: AlgorithmName, tmp_path: Path) -> None:
    config = chosen(tmp_path, name)
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("words", "path", "remedy"),
    [
        (["--learner.algorithm=grpo", "--learner.critic=head"], "learner.critic", 'it is then "none"'),
        (["--learner.algorithm=actor_critic", "--learner.critic=none"], "learner.critic", "leave it out"),
        (["--learner.algorithm=rloo", "--rollout.group_size=1"], "rollout.group_size", "2 or more"),
        (["--learner.algorithm=rloo", "--learner.normalize_advantages=batch"], "learner.normalize_advantages", "leave"),
        (["--learner.algorithm=dapo", "--rollout.group_size=1"], "rollout.group_size", "2 or more"),
        (["--learner.dynamic_sampling=true", "--rollout.group_size=1"], "learner.dynamic_sampling", "group_size"),
        (["--learner.algorithm=soft_q"], "kl.coef", 'kl.kind = "k1"'),
        (["--buffer.correction=token_tis", "--rollout.engine=scripted"], "buffer.correction", "vllm"),
        (
            ["--learner.algorithm=soft_q", "--kl.kind=k1", "--kl.coef=0.1", "--buffer.correction=decoupled"],
            "buffer.correction",
            "none",
        ),
    ],
)
def test_what_contradicts_an_algorithm_is_refused_with_the_remedy(
    words: list[str], path: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "", *words)
    assert f"{path} is refused" in caught.value.what and remedy in caught.value.fix


def test_every_algorithm_has_a_page_that_the_index_names() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    for name, algorithm in ALGORITHMS.items():
        page = PAGES / f"{PAGE_OF.get(name, name)}.md"
        text = page.read_text(encoding="utf-8")
        assert f"| `{name}` |" in index and f"({page.name})" in index
        assert f"`{name}`" in text and "Deviation" in text and "When:" in text and "aper" in text
        number = re.search(r"arXiv (\d+\.\d+)", algorithm.paper)
        assert number is None or f"arxiv.org/abs/{number[1]}" in text


@pytest.mark.parametrize(
    "page",
    [*sorted(PAGES.glob("*.md")), *(PAGES.parent / f"{name}.md" for name in ("adapters", "tune"))],
    ids=lambda page: page.stem,
)
def test_the_examples_of_a_page_load(page: Path, tmp_path: Path) -> None:
    blocks = TOML.findall(page.read_text(encoding="utf-8"))
    assert blocks or page.stem == "README"
    for block in blocks:
        config = loaded(tmp_path, block)
        if page.stem in ALGORITHMS:
            assert PAGE_OF.get(config.learner.algorithm, config.learner.algorithm) == page.stem
