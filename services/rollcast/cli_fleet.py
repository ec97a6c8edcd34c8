"""The words `rollcast scale | pause | resume | stop`: what is asked of a run that lives.

Owns: their options and help, and waiting for a run to end. Does not know how a run is reached (`reach.py`) nor what
may be asked of it (`control.py`); both are imported only when a verb is called.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from rollcast.cli_jobs import Address
from rollcast.errors import RunFailed, UsageError

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run below ./runs (or --run.dir), its folder, or one of RAY_ADDRESS.")
]
Workers = Annotated[
    str, typer.Argument(metavar="N|auto", help="How many rollout workers; auto leaves it to the configuration.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait until it has ended; 0: not.")
]
LOOK_EVERY_S = 0.5


def add_verbs(app: typer.Typer, with_overrides: type[TyperCommand], run_dir: Callable[[typer.Context], Path]) -> None:
    """Adds the verbs to `app`; `run_dir` tells the folder of all runs from the context."""

    @app.command(cls=with_overrides, epilog="Example: rollcast scale demo 4")
    def scale(
        context: typer.Context, run: RunName, workers: Workers, address: Address = None, as_json: AsJson = False
    ) -> None:
        """Change how many rollout workers a live run has; leaving ones finish what they play."""
        if address is not None:
            _there(address, "scale", run, [workers], as_json)
        _ask(run, run_dir(context), {"workers": _number(workers)}, as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast pause demo")
    def pause(context: typer.Context, run: RunName, address: Address = None, as_json: AsJson = False) -> None:
        """Let a live run rest after its present step; it keeps its processes."""
        if address is not None:
            _there(address, "pause", run, [], as_json)
        _ask(run, run_dir(context), {"paused": True}, as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast resume demo")
    def resume(context: typer.Context, run: RunName, address: Address = None, as_json: AsJson = False) -> None:
        """Let a paused run go on. (A run that has ended goes on with `rollcast train`.)"""
        if address is not None:
            _there(address, "resume", run, [], as_json)
        _ask(run, run_dir(context), {"paused": False}, as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast stop demo")
    def stop(
        context: typer.Context,
        run: RunName,
        timeout: Timeout = 600.0,
        address: Address = None,
        as_json: AsJson = False,
    ) -> None:
        """End a live run after its present step; it saves a checkpoint first, and waits until it has ended."""
        if address is not None:
            from rollcast.job_verbs import stop_job

            stop_job(address, run, timeout, as_json)
            return
        _ask(run, run_dir(context), {"stop": True}, as_json, timeout)


def _there(address: str, verb: str, run: str, words: list[str], as_json: bool) -> NoReturn:
    """The same on the cluster behind that dashboard, where the run's control can be reached."""
    from rollcast.job_verbs import there

    there(address, verb, run, [*words, "--json"] if as_json else words)


def _number(word: str) -> int | None:
    """Whether a number can be is the run's to say; what is none is refused here."""
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        why = "A fleet is a whole number of workers, or auto."
        raise UsageError(f"{word!r} is no number of rollout workers.", why, "Write one, such as 4.") from None


def _ask(run: str, base: Path, wish: dict[str, Any], as_json: bool, ends_within_s: float = 0.0) -> None:
    from rollcast.reach import reached

    with reached(run, base) as live:
        from rollcast.control import answer, answers  # It imports Ray, which `reached` has prepared for.

        # The status first: a run that was asked to stop may be gone before it could tell it.
        status = answer(live.control.status.remote(), live.name)
        asked = answer(live.control.ask.remote(**wish), live.name)
        if ends_within_s and not live.is_here:
            _wait(live.name, lambda: not answers(live.control), ends_within_s)
    # Here the run's cluster may end with it, and would end whoever is still connected.
    if ends_within_s and live.is_here:
        _wait(live.name, lambda: not live.goes_on, ends_within_s)
    if as_json:
        typer.echo(json.dumps({"run": live.name, "asked": asdict(asked), "status": status}))
    else:
        typer.echo(f"{live.name}: {_told(wish, status, bool(ends_within_s))}")


def _told(wish: dict[str, Any], status: dict[str, Any], ended: bool) -> str:
    step = f"at step {status.get('step', 0)}"
    if "workers" in wish:
        wanted = "as configured" if wish["workers"] is None else wish["workers"]
        return f"{status.get('workers', 0)} rollout workers now, asked for: {wanted}"
    if "stop" in wish:
        return "ended; its newest checkpoint is whole" if ended else f"stopping {step}; it saves a checkpoint first"
    return f"pausing {step}" if wish["paused"] else f"going on {step}"


def _wait(run: str, has_ended: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not has_ended():
        if time.monotonic() > deadline:
            what = f"The run {run} has not ended within {seconds:g} s."
            raise RunFailed(what, "It was asked to, and finishes its present step first.", "See `rollcast status`.")
        time.sleep(LOOK_EVERY_S)
