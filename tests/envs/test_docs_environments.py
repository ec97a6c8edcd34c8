"""The documentation of environments, held to the code: its examples are written to files, played and loaded.

A fenced block whose info string names a file is that file. Other blocks of Python run in the order of the page, and a
block of text that follows one is what it prints. Blocks of TOML are configurations, or parts of one.
"""

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import typer
from gymnasium.utils.env_checker import check_env

from rollcast.cli import app, take_overrides
from rollcast.config import EnvSection, RunConfig
from rollcast.config_file import load_config
from rollcast.errors import ConfigError
from rollcast.evaluate import creator_of, made_once
from rollcast_envs import reward_pool
from rollcast_envs.splits import SPLITS
from rollcast_envs.text import TextEnv

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("environments", "rewards", "tasks", "evaluation")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NO_RUN_YET = '[run]\nsteps = 1\n\n[model]\npath = "tiny"\n\n'
ANY_ENVIRONMENT = '\n[[env]]\nid = "rollcast/QA-v0"\n'
OTHERS = {"rollcast/ReasoningGym-v0": "reasoning_gym", "rollcast/TextArena-v0": "textarena"}
"""Environments whose package may be absent, and its module."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `file` is "" where it names none."""

    language: str
    file: str
    text: str


def blocks_of(page: str) -> list[Block]:
    found = BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    return [Block(*parts) for parts in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, from which modules are imported; what a page registers is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, registered = set(sys.modules), dict(gymnasium.registry)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]
    gymnasium.registry.clear()
    gymnasium.registry.update(registered)


@pytest.fixture(scope="module", autouse=True)
def pool_is_closed() -> Iterator[None]:
    yield
    reward_pool.shared().close()


def write_files(page: str, folder: Path) -> None:
    for block in blocks_of(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    importlib.invalidate_caches()


def run(script: Path) -> None:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def loaded(block: Block, folder: Path) -> RunConfig:
    """A block that is a configuration or a part of one, as `rollcast train` loads it."""
    text = block.text if "[run]" in block.text else NO_RUN_YET + block.text
    path = folder / "block.toml"
    path.write_text(text if "[[env]]" in text else text + ANY_ENVIRONMENT, encoding="utf-8")
    return load_config(path, ["--model.path", "tiny"])


def sections_of(page: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = (DOCS / f"{page}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return {title: body for title, _, body in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("page", ["environments", "rewards"])
def test_every_snippet_of_python_runs_and_prints_what_the_page_says(
    page: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(page, folder)
    compared = 0
    for number, (block, following) in enumerate(pairwise([*blocks_of(page), Block("", "", "")])):
        if block.language == "python" and not block.file:
            script = folder / f"snippet_{number}.py"
            script.write_text(block.text, encoding="utf-8")
            run(script)
            printed = capsys.readouterr().out
            if following.language == "text":
                assert printed == following.text, f"snippet {number} of {page}"
                compared += 1
    assert compared


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_of_toml_loads_and_its_environments_can_be_made(page: str, folder: Path) -> None:
    write_files(page, folder)
    blocks = [block for block in blocks_of(page) if block.language == "toml" and block.file != "pyproject.toml"]
    found = [env for block in blocks for env in loaded(block, folder).env]
    assert found
    for env in {env.model_dump_json(): env for env in found}.values():
        if importlib.util.find_spec(OTHERS.get(env.id, "json")) is None:
            with pytest.raises(ConfigError, match="cannot be imported"):
                made_once(env, env.kwargs)
        else:
            question, _ = made_once(env, env.kwargs).reset(seed=1)
            assert question


@pytest.mark.parametrize("page", [*PAGES, "files", "jobs", "../README"])
def test_every_command_and_every_file_named_is_there(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or not link or (DOCS / f"{page}.md").parent.joinpath(link).exists(), link
    for block in blocks_of(page):
        for line in block.text.splitlines() if block.language == "sh" else []:
            if line.startswith("rollcast "):
                check_command(shlex.split(line, comments=True)[1:])


def check_command(words: list[str]) -> None:
    """The verb and its options are there; settings and the configuration that it names load."""
    command: Any = typer.main.get_command(app)
    overrides, rest = take_overrides(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options, words
    settings = [word for word in overrides if not word.startswith("--kwargs.")]
    for name in [word for word in rest if word.startswith("deploy/")] or ["deploy/configs/qa.toml"]:
        assert load_config(ROOT / name, settings)


# ---- docs/tasks.md


def test_the_examples_of_tasks_are_what_they_ask(folder: Path) -> None:
    compared = 0
    for block, following in pairwise(blocks_of("tasks")):
        if block.language == "toml" and following.language == "text":
            (env,) = loaded(block, folder).env
            made = made_once(env, {**env.kwargs, "split": "validation"})
            question, info = made.reset(options={"index": 0})
            assert f"{question}\n-> {info['references'][0]}\n" == following.text
            compared += 1
    assert compared >= 6


def test_the_sizes_of_tasks_are_true() -> None:
    rows = re.findall(r"^\| \[`(\S+)`\].*\| (\d+) / (\d+) / (\d+) \|$", (DOCS / "tasks.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for env_id, *sizes in rows:
        made = [made_once(EnvSection(id=env_id), {"split": split}).unwrapped.size for split in SPLITS]
        assert made == [int(size) for size in sizes], env_id


def test_every_argument_of_a_task_is_documented_and_is_one() -> None:
    everybodys = {"split", "data", "fields", "system_prompt", "few_shot"}
    for title, body in sections_of("tasks").items():
        if env_id := re.search(r"^`(rollcast/\S+)`", body, re.MULTILINE):
            table = body.partition("| argument |")[2].partition("\n\n")[0]
            cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
            told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
            takes = inspect.signature(creator_of(env_id[1])).parameters.keys()
            assert told <= takes and takes - told <= everybodys, title


# ---- docs/environments.md


def test_the_entry_point_of_a_package_is_in_the_group_that_runs_read() -> None:
    (block,) = (block for block in blocks_of("environments") if block.file == "pyproject.toml")
    assert tomllib.loads(block.text)["project"]["entry-points"] == {"rollcast.envs": {"convert": "convert"}}


def test_the_example_is_one_file_of_at_most_sixty_lines_that_plays(folder: Path) -> None:
    write_files("environments", folder)
    assert len((folder / "convert.py").read_text(encoding="utf-8").splitlines()) <= 60
    env = gymnasium.make("convert:Convert-v0", tries=2)
    task = env.unwrapped
    assert isinstance(task, TextEnv) and task.size
    check_env(task)
    for seed in range(50):
        question, info = env.reset(seed=seed)
        assert (question, info) == env.reset(seed=seed)
        assert env.step(info["references"][0])[1:4] == (1.0 - 0.001 * len(info["references"][0]), True, False)
    for answer in ("", "no number", "-1", "9" * 400, "1,000,000.5"):
        env.reset(options={"index": 3})
        assert env.step(answer)[2:4] == (False, False)
        assert env.step(answer)[2:4] == (True, False)


def test_the_examples_splits_are_apart_and_each_index_is_its_own_task(folder: Path) -> None:
    write_files("environments", folder)
    asked: dict[str, set[str]] = {}
    for split in SPLITS:
        env = gymnasium.make("convert:Convert-v0", split=split)
        task = env.unwrapped
        assert isinstance(task, TextEnv) and task.size
        asked[split] = {env.reset(options={"index": index})[0] for index in range(task.size)}
        assert len(asked[split]) == task.size > 50
    assert len(asked["train"] | asked["validation"] | asked["test"]) == sum(map(len, asked.values()))


def test_a_built_in_part_that_may_be_good_or_bad_needs_its_weight_stated(folder: Path) -> None:
    part = '[[env]]\nid = "rollcast/QA-v0"\n\n[[env.rewards]]\nfunction = "length"\n'
    for text, refused in ((part, True), (f"{part}weight = -0.1\n", False)):
        (env,) = loaded(Block("toml", "", text), folder).env
        if refused:
            with pytest.raises(ConfigError, match="give its weight"):
                made_once(env, env.kwargs)
        else:
            assert made_once(env, env.kwargs).reset(seed=1)[0]
