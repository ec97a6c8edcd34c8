"""The words `rollcast env list | check | play`.

Owns: their options and help. Does not know what they do (`env_cli.py`), which is imported only when one is called.
"""

import io
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rollcast.errors import UsageError

EnvId = Annotated[
    str, typer.Argument(metavar="ID|MODULE:ID", help="An environment of `rollcast env list`, or of a module.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.01, metavar="SECONDS", help="Deadline of each call of the environment.")
]


def verbs(with_overrides: type[TyperCommand], overrides: str) -> typer.Typer:
    """The verbs; `with_overrides` parts dotted options from other words and puts them in `context.meta[overrides]`."""
    app = typer.Typer(
        help="Text environments: which there are, what is wrong with one, and playing one by hand.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @app.command("list", epilog="Example: rollcast env list --sizes")
    def list_(
        sizes: Annotated[bool, typer.Option("--sizes", help="Make each one, to tell how many tasks it has.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """All text environments: built in, and of installed packages."""
        _list(sizes, as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast env check rollcast/QA-v0 --kwargs.split test")
    def check(
        context: typer.Context,
        env: EnvId,
        episodes: Annotated[int, typer.Option(min=1, metavar="N", help="Episodes to play.")] = 20,
        max_turns: Annotated[int, typer.Option(min=1, metavar="N", help="Turns after which it never ends.")] = 64,
        timeout: Timeout = 30.0,
        as_json: AsJson = False,
    ) -> None:
        """Play an environment as a run would, and name everything wrong with it.

        Its arguments are given as --kwargs.NAME VALUE. Exit code 1 when an error is found; warnings leave it 0.
        """
        _check(env, _kwargs(context.meta[overrides]), (episodes, max_turns, timeout), as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast env play rollcast/QA-v0 --index 3 --kwargs.split test")
    def play(
        context: typer.Context,
        env: EnvId,
        seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first episode.")] = 0,
        index: Annotated[
            int | None, typer.Option(min=0, metavar="N", help="First task, in place of one drawn.")
        ] = None,
        answers: Annotated[
            str | None, typer.Option(metavar="FILE|-", help="Answers, one a line, from a file or standard input.")
        ] = None,
        timeout: Timeout = 60.0,
    ) -> None:
        """Answer in the policy's place; see reward, its parts and metrics. Ctrl-D ends.

        Its arguments are given as --kwargs.NAME VALUE.
        """
        _play(env, _kwargs(context.meta[overrides]), seed, index, answers, timeout)

    return app


def _list(sizes: bool, as_json: bool) -> None:
    from rollcast import display
    from rollcast.env_cli import known, show_list

    listed = known(sizes)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in listed], indent=2))
    else:
        show_list(listed, display.screen())


def _check(env: str, kwargs: dict[str, Any], limits: tuple[int, int, float], as_json: bool) -> None:
    from rollcast import display
    from rollcast.env_check import Limits
    from rollcast.env_cli import check, show_report

    report = check(env, kwargs, Limits(*limits))
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2, default=str))
    else:
        show_report(report, display.screen())
    if report.failed:
        raise typer.Exit(1)


def _play(env: str, kwargs: dict[str, Any], seed: int, index: int | None, answers: str | None, timeout: float) -> None:
    from rollcast import display
    from rollcast.env_cli import Place, answers_of, play, typed

    console = display.screen()
    source = typed(console) if answers is None else answers_of(_lines(answers))
    play(env, kwargs, Place(seed, index), source, answers is not None, timeout, console)


def _lines(answers: str) -> Iterator[str]:
    """Of standard input one by one, as they come; of a file all at once."""
    if answers == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    fix = "name a text file with one answer a line"
    try:
        return io.StringIO(Path(answers).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{answers}: cannot be read", str(error.strerror), fix) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{answers}: is not text", str(error), "save it as UTF-8") from None


def _kwargs(words: list[str]) -> dict[str, Any]:
    """The environment's arguments from words such as `--kwargs.options.max_terms=3`; values are TOML or text."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        section, *keys = name.removeprefix("--").split(".")
        if section != "kwargs" or not all(keys):
            why = "only an environment's arguments are taken here"
            raise UsageError(f"{name} changes nothing here", why, "write --kwargs.NAME VALUE")
        here = found
        for key in keys[:-1]:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise UsageError(f"{name} has no place", f"{key} is a value", "give it once, or its parts only")
        here[keys[-1]] = _literal(text)
    return found


def _literal(text: str) -> Any:
    """The TOML value that `text` is, else the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break could smuggle further keys in; then it is no literal.
    return value["value"] if len(value) == 1 else text
