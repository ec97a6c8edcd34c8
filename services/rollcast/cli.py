"""The command `rollcast`: words in, exit codes out.

Owns: verbs, options, help, how an error is shown, exit codes (0 done, 1 failed, 2 usage or configuration,
3 diverged, 130 Ctrl-C). Does not know what a verb does: each imports its part only when it is called, so that
help is instant.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from rollcast.errors import RollcastError, UsageError

OVERRIDES = "rollcast.overrides"
OVERRIDE = re.compile(r"--[A-Za-z_]\w*\.[^=]+(=.*)?", re.DOTALL)

app = typer.Typer(
    help="Reinforcement learning of language models as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class WithOverrides(TyperCommand):
    """A verb that takes `--section.key value` for any setting, before or after its other words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[OVERRIDES], rest = take_overrides(args)
        return super().parse_args(ctx, rest)


def take_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts dotted options (as `--section.key=value`) from the other words; `--` ends options."""
    overrides: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            others += [word, *rest]
        elif not (match := OVERRIDE.fullmatch(word)):
            others.append(word)
        else:
            overrides.append(word if match[1] else f"{word}={_value_of(word, rest)}")
    return overrides, others


def _value_of(word: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None or value.startswith("--"):
        why = "nothing follows it" if value is None else f"{value!r} follows it"
        raise UsageError(f"{word} has no value", why, f"write {word} VALUE or {word}=VALUE")
    return value


@app.callback()
def rollcast() -> None:
    """Reinforcement learning of language models as a service.

    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 diverged, 130 Ctrl-C.
    """


@app.command(
    cls=WithOverrides,
    epilog="Example: rollcast train deploy/configs/demo.toml --run first --learner.learning_rate 1e-5",
)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run (docs/config.md).")],
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and of its folder.")] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Go on from the newest checkpoint, from none, or from this one."),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")] = False,
) -> None:
    """Train a policy, or resume its training, here or on the cluster that RAY_ADDRESS names.

    Any setting can be given as --section.key VALUE.
    """
    from rollcast.config import load_config
    from rollcast.plan import make_plan, render, run_directory

    if as_json and not dry_run:
        raise UsageError("--json prints nothing here", "only the plan is printed as JSON", "add --dry-run")
    _refuse_missing_checkpoint(resume)
    settings = load_config(config, _overrides(context, run))
    plan = make_plan(settings)
    if dry_run:
        typer.echo(json.dumps(asdict(plan), indent=2) if as_json else render(plan))
        return
    from rollcast.train import train as start

    start(settings, run_directory(settings), resume)


@app.command(cls=WithOverrides, epilog="Example: rollcast demo --seed 1 --run second")
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Where all chance starts from.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Learner steps.")] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and of its folder.")] = None,
) -> None:
    """Watch a small instruct model learn to answer questions, in about ten minutes on two CPU cores.

    Any setting of deploy/configs/demo.toml can be given as --section.key VALUE.
    """
    from rollcast.demo import demo as start

    start(seed, steps, run, _overrides(context))


def _overrides(context: typer.Context, run: str | None = None) -> list[str]:
    """The command line's settings; `--run NAME` is short for `--run.name NAME`."""
    overrides: list[str] = list(context.meta[OVERRIDES])
    return [*overrides, f"--run.name={run}"] if run is not None else overrides


def _refuse_missing_checkpoint(resume: str) -> None:
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UsageError(
            f"--resume {resume}: there is no such checkpoint",
            "it is neither auto nor never nor a folder",
            "name a folder such as runs/NAME/checkpoints/step_10, or leave the option out",
        )


def show(error: RollcastError) -> None:
    """Prints what / why / do this to stderr; in colour only where a person looks at it."""
    text = Text()
    text.append(f"{error.what}\n", style="bold red")
    text.append("why: ", style="bold").append(f"{error.why}\n")
    text.append("do this: ", style="bold").append(error.fix)
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; anything but a `RollcastError` is a bug and keeps its traceback."""
    try:
        app(args=arguments)
    except RollcastError as error:
        show(error)
        sys.exit(error.exit_code)
