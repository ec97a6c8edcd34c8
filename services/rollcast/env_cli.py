"""What `rollcast env list | check | play` do.

Owns: which environments there are, how they are told, and playing one by hand. Does not know words of the command line
(`cli_env.py`), nor what a check looks for (`env_check.py`).
"""

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, get_args

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator
from rich.console import Console
from rich.text import Text

from rollcast.display import grid, harmless, table
from rollcast.env_check import Limits, Probe, Report, refuse_unknown
from rollcast.env_check import check as checked
from rollcast.environments import EnvironmentFailed, register_environments
from rollcast.errors import RunFailed
from rollcast_envs.errors import DataError
from rollcast_envs.splits import SPLITS

GROUP = "rollcast.envs"
STYLES = {"error": "bold red", "warning": "yellow"}
SIZE_TIMEOUT_S = 60.0
Answers = Callable[[], str | None]
"""The next answer; None when there are no more."""


@dataclass(frozen=True)
class Listed:
    """One environment, without having made it. Registry -> command line."""

    id: str
    summary: str
    arguments: dict[str, str]
    splits: tuple[str, ...]
    sizes: dict[str, int | None] | None = None
    """Tasks by split, None where they are endless; None as a whole where they were not asked for or not found out."""


def known(sizes: bool = False) -> list[Listed]:
    """Every text environment: those of rollcast, and those of packages with the entry point `rollcast.envs`."""
    register_environments()
    roots = {entry.module.partition(".")[0] for entry in entry_points(group=GROUP)}
    specs = [spec for spec in gymnasium.registry.values() if spec.namespace == "rollcast" or _root(spec) in roots]
    return [_listed(spec, sizes) for spec in sorted(specs, key=lambda spec: spec.id)]


def _root(spec: EnvSpec) -> str:
    entry = spec.entry_point
    module = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
    return module.partition(":")[0].partition(".")[0]


def _listed(spec: EnvSpec, sizes: bool) -> Listed:
    entry = spec.entry_point
    creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    parameters = inspect.signature(creator).parameters
    summary = (inspect.getdoc(creator) or "").partition("\n")[0]
    arguments = {name: _default(parameter) for name, parameter in parameters.items()}
    splits = (get_args(parameters["split"].annotation) or SPLITS) if "split" in parameters else ()
    found = asyncio.run(_sizes(spec.id, splits)) if sizes else None
    return Listed(spec.id, summary, arguments, tuple(splits), found)


def _default(parameter: inspect.Parameter) -> str:
    return "(required)" if parameter.default is parameter.empty else repr(parameter.default)


async def _sizes(env_id: str, splits: Sequence[str]) -> dict[str, int | None] | None:
    """By split, or by "" where there are none; None for an environment that cannot be made without arguments."""
    found: dict[str, int | None] = {}
    for split in splits or ("",):
        probe = Probe(env_id, {"split": split} if split else {}, SIZE_TIMEOUT_S)
        try:
            await probe.open()
            found[split] = await probe.size()
        except EnvironmentFailed:
            return None
        finally:
            probe.close()
    return found


def show_list(listed: Sequence[Listed], console: Console) -> None:
    shown = table(console, "environment", "splits", "what it is", "arguments")
    for one in listed:
        shown.add_row(one.id, _splits(one), harmless(one.summary), harmless(", ".join(one.arguments)))
    console.print(shown)


def _splits(one: Listed) -> str:
    if one.sizes is None:
        return ", ".join(one.splits)
    told = {split: "endless" if size is None else f"{size:,}" for split, size in one.sizes.items()}
    return ", ".join(f"{split} {size}".strip() for split, size in told.items())


# ---- check


def check(env_id: str, kwargs: Mapping[str, Any], limits: Limits) -> Report:
    """Raises `UsageError` for an unknown id. What the environment prints goes to standard error."""
    with redirect_stdout(sys.stderr):
        return checked(env_id, kwargs, limits)


def show_report(report: Report, console: Console) -> None:
    for finding in report.findings:
        console.print(Text.assemble((finding.level, STYLES[finding.level]), " ", (finding.name, "bold")))
        shown = grid()
        for label, text in (("  what", finding.what), ("  why", finding.why), ("  do this", finding.do_this)):
            shown.add_row(label, harmless(text))
        console.print(shown)
    errors = sum(finding.level == "error" for finding in report.findings)
    played = f"{report.episodes} episodes, {report.turns} turns"
    if report.rewards:
        played += f", reward {min(report.rewards):g} to {max(report.rewards):g}"
    console.print(f"{report.env_id}: {played}; errors {errors}, warnings {len(report.findings) - errors}")


# ---- play


def answers_of(lines: Iterator[str]) -> Answers:
    """Answers from lines of a file."""

    def answer() -> str | None:
        line = next(lines, None)
        return None if line is None else line.rstrip("\r\n")

    return answer


def typed(console: Console) -> Answers:
    """Answers from a person; Ctrl-D ends them."""

    def answer() -> str | None:
        try:
            return console.input(Text("> ", style="bold green"))
        except EOFError:
            console.print()
            return None

    return answer


@dataclass(frozen=True)
class Place:
    """Where to begin: with a seed, or with a task of the split. Command line -> play."""

    seed: int = 0
    index: int | None = None

    def later(self, episodes: int) -> tuple[int, dict[str, int] | None]:
        """Seed and options of a later episode."""
        options = None if self.index is None else {"index": self.index + episodes}
        return self.seed + episodes, options


def play(
    env_id: str,
    kwargs: Mapping[str, Any],
    place: Place,
    answers: Answers,
    echo: bool,
    timeout_s: float,
    console: Console,
) -> None:
    """Plays one episode after the other until there are no more answers, or no more tasks.

    `echo` repeats each answer, for answers that are not typed. Raises `UsageError` for an unknown id, `RunFailed` for
    an environment that fails.
    """
    register_environments()
    try:
        asyncio.run(_Game(env_id, dict(kwargs), answers, echo, timeout_s, console).play(place))
    except EnvironmentFailed as error:
        refuse_unknown(env_id, error)
        cause = error.__cause__
        if isinstance(cause, DataError):
            raise RunFailed(f"{env_id}: {cause.what}", cause.why, cause.fix) from error
        fix = f"correct what is named, or its arguments (--kwargs.NAME VALUE); `rollcast env check {env_id}` finds more"
        raise RunFailed(str(error), "the environment cannot go on", fix) from error


class _Game:
    """A person, or a file of answers, in place of the policy."""

    def __init__(
        self, env_id: str, kwargs: dict[str, Any], answers: Answers, echo: bool, timeout_s: float, console: Console
    ) -> None:
        self.probe = Probe(env_id, kwargs, timeout_s)
        self.answers, self.echo, self.console = answers, echo, console

    async def play(self, place: Place) -> None:
        try:
            await self._call(self.probe.open())
            size = await self._call(self.probe.size())
            episodes = 0
            while place.index is None or not episodes or size is None or place.index + episodes < size:
                if not await self._episode(*place.later(episodes)):
                    return
                episodes += 1
        finally:
            self.probe.close()

    async def _call(self, work: Any) -> Any:
        with redirect_stdout(sys.stderr):
            return await work

    async def _episode(self, seed: int, options: dict[str, int] | None) -> bool:
        """Whether it came to its end."""
        observation, info = await self._call(self.probe.reset(seed, options))
        name = f"seed {seed}" if options is None else f"index {options['index']}"
        self.console.rule(harmless(f"{info.get('task_id') or self.probe.env_id} ({name})"), align="left")
        if self.probe.system_prompt:
            self._say("system", self.probe.system_prompt)
        for question, reply in self.probe.few_shot:
            self._say("example", f"{question}\n> {reply}")
        self._say(str(info.get("role", "user")), observation)
        total = 0.0
        while (answer := self.answers()) is not None:
            if self.echo:
                self._say("answer", answer)
            result = await self._call(self.probe.step(answer))
            total += result.reward
            self._tell(result.reward, result.info)
            if result.observation:
                self._say(str(result.info.get("role", "user")), result.observation)
            if result.terminated or result.truncated:
                self._end("terminated" if result.terminated else "truncated", total, info | result.info)
                return True
        return False

    def _say(self, role: str, text: str) -> None:
        for number, line in enumerate(text.split("\n")):
            label = f"{role}: " if not number else " " * (len(role) + 2)
            self.console.print(Text.assemble((label, "bold"), harmless(line)))

    def _tell(self, reward: float, info: Mapping[str, Any]) -> None:
        parts = _figures(info.get("rewards", {}))
        self.console.print(Text.assemble(("reward: ", "bold"), f"{reward:g}", harmless(f" ({parts})" if parts else "")))

    def _end(self, how: str, total: float, info: Mapping[str, Any]) -> None:
        shown = grid()
        shown.add_row(how, f"reward {total:g}")
        if metrics := _figures(info.get("metrics", {})):
            shown.add_row("metrics", harmless(metrics))
        if references := info.get("references"):
            shown.add_row("references", harmless("; ".join(references)))
        self.console.print(shown)


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {round(value, 4) if math.isfinite(value) else value:g}" for name, value in figures.items()
    )
