"""The verbs that talk to the live policy, and to what was said of it: query, chat, feedback.

Owns: their words and help. Does not know HTTP (`talk.py`), the terminal (`chat_screen.py`) or the database.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_URL = "http://127.0.0.1:8000"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Model = Annotated[str, typer.Option(metavar="NAME", help="policy, policy@best or policy@VERSION.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system turn.")]


def add_talk_verbs(app: typer.Typer) -> None:
    """`rollcast query` and `rollcast chat`."""

    @app.command(epilog='Example: rollcast query http://127.0.0.1:8000 "What is the capital of Peru?"')
    def query(
        url: Annotated[str, typer.Argument(metavar="URL", help="Where the policy is served.")],
        text: Annotated[str, typer.Argument(metavar="TEXT", help="The question.")],
        model: Model = "policy",
        system: System = None,
        max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most tokens of the answer.")] = None,
        temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Ask a served policy one question. The API key, if one is needed, is read from ROLLCAST_API_KEY.

        The answer goes to standard output as it comes, its policy version to standard error.
        """
        from rollcast.display import harmless_lines, screen
        from rollcast.talk import Answered, PolicyClient

        opening = [{"role": "system", "content": system}] if system else []
        sampling = {"max_tokens": max_tokens, "temperature": temperature}
        given = {name: value for name, value in sampling.items() if value is not None}
        console = screen()
        for piece in PolicyClient(url).ask([*opening, {"role": "user", "content": text}], model, **given):
            if as_json and isinstance(piece, Answered):
                typer.echo(json.dumps(asdict(piece)))
            elif isinstance(piece, Answered):
                console.print()
                typer.echo(f"policy version {piece.policy_version}, answer {piece.id}", err=True)
            elif not as_json:
                console.print(harmless_lines(piece), end="", soft_wrap=True)

    @app.command(epilog="Example: rollcast chat http://127.0.0.1:8000 --model policy@best")
    def chat(
        url: Annotated[str, typer.Argument(metavar="[URL]", help="Where the policy is served.")] = DEFAULT_URL,
        model: Model = "policy",
        system: System = None,
    ) -> None:
        """Talk to a served policy in the terminal; /good, /bad and /edit give feedback, /help lists all commands.

        The API key, if one is needed, is read from ROLLCAST_API_KEY.
        """
        from rollcast.chat_screen import Chat
        from rollcast.display import screen
        from rollcast.talk import PolicyClient

        policy = PolicyClient(url)
        served = policy.policy()
        typer.echo(f"{policy.url} serves policy version {served.get('policy_version')}; /help lists commands", err=True)
        with suppress(ImportError):
            import readline  # noqa: F401  (lets lines be edited and recalled)
        Chat(policy, screen(), model, system).run(lambda: input("> "))


def feedback_verbs(command: type[Any], run_dir: Callable[[typer.Context], tuple[Path, list[str]]]) -> typer.Typer:
    """The verbs below `rollcast feedback`; `command` takes overrides, and `run_dir` tells them from a context."""
    app = typer.Typer(help="What people said of a served policy's answers.", no_args_is_help=True)

    @app.callback()
    def feedback() -> None:
        """What people said of a served policy's answers (docs/feedback.md)."""

    @app.command(cls=command, epilog="Example: rollcast feedback export demo feedback.jsonl")
    def export(
        context: typer.Context,
        run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run below ./runs, or its folder.")],
        file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="The file to write.")],
        tokens: Annotated[
            bool, typer.Option("--tokens", help="Every answer served, with its exact tokens, one a line.")
        ] = False,
        as_json: AsJson = False,
    ) -> None:
        """Write feedback as a data set, which rollcast/Feedback-v0 plays and other tasks take as references."""
        from rollcast.export import settings_of
        from rollcast.feedback_data import export_feedback
        from rollcast.runs import find

        base, overrides = run_dir(context)
        found = find(run, base)
        done = export_feedback(found, settings_of(found, overrides), file, tokens=tokens)
        if as_json:
            typer.echo(json.dumps(asdict(done)))
            return
        what = f"{done.rows} answers" if tokens else f"{done.rows} questions with {done.answers} judged answers"
        typer.echo(f"{done.path}: {what}")
        for reason, count in done.left_out.items():
            typer.echo(f"left out, {reason}: {count}", err=True)

    return app
