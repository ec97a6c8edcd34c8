"""The verbs of the live policy. Owns: their words and help. Does not know how a policy is served."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

RunDirOf = Callable[[typer.Context], tuple[Path, list[str]]]


def add(app: typer.Typer, command: type[Any], run_dir: RunDirOf) -> None:
    """Hooks the verbs into `app`. `command` takes overrides; `run_dir` parts --run.dir from the others."""

    @app.command(cls=command, epilog="Example: rollcast serve demo --serve.port 8000")
    def serve(
        context: typer.Context,
        policy: Annotated[
            str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, live or ended, or a folder checkpoints/step_N.")
        ],
        detach: Annotated[
            bool, typer.Option("--detach", help="Leave it on the cluster that RAY_ADDRESS names, and return.")
        ] = False,
        stop: Annotated[
            bool, typer.Option("--stop", help="Take off the cluster what was left there, and return.")
        ] = False,
    ) -> None:
        """Serve a policy over HTTP, as OpenAI's API, until it is interrupted.

        A live run is followed from version to version while it answers. Without --serve.keys_file only this machine may
        ask. Any setting of the run can be given as --section.key VALUE, such as --serve.port.
        """
        from rollcast.export import settings_of
        from rollcast.live import serving
        from rollcast.runs import find_source

        base, overrides = run_dir(context)

        def say(text: str) -> None:
            typer.echo(text, err=True)

        source = find_source(policy, base)
        config = settings_of(source.run, overrides)
        if stop:
            serving.take_off(source, config, say)
        else:
            serving.serve(source, config, say, detach)
