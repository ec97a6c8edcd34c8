"""The words `rollcast submit` and `rollcast logs`, and the options that other verbs share with them.

Owns: their options and help. Does not know what they do (`job_verbs.py`), which is imported only when one is called.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster whose job the run is, by its dashboard: http://HOST:8265."),
]
Restarts = Annotated[
    int, typer.Option(min=0, metavar="N", help="Start a run that crashed again, at most N times, from its checkpoint.")
]


def add(
    app: typer.Typer,
    with_overrides: type[TyperCommand],
    overrides: Callable[[typer.Context, str | None], list[str]],
    run_dir: Callable[[typer.Context], Path],
) -> None:
    """Adds the verbs; `overrides` are the settings that were typed, `run_dir` the folder of runs."""

    @app.command(
        cls=with_overrides,
        epilog="Example: rollcast submit deploy/configs/qa.toml --run.dir /data/runs --model.path /data/model --follow",
    )
    def submit(
        context: typer.Context,
        config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run (docs/config.md).")],
        run: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run and of its folder.")] = None,
        follow: Annotated[bool, typer.Option("--follow", help="Print what it prints, and exit as it does.")] = False,
        address: Address = None,
        restarts: Restarts = 0,
        working_dir: Annotated[
            Path, typer.Option(metavar="DIR", help="Folder to ship: configurations, and code of your own.")
        ] = Path("."),
        runtime_env: Annotated[
            Path | None, typer.Option(metavar="FILE.yaml", help="More of Ray's runtime_env, such as pip packages.")
        ] = None,
        python: Annotated[
            str | None, typer.Option(metavar="PATH", help="Python on the cluster; else the one that runs Ray there.")
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Check, print what would be submitted, and start nothing.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Train on a cluster: ship this rollcast and a folder, and start the run there as a job.

        Any setting can be given as --section.key VALUE; run.dir and model.path name folders of the cluster. The
        cluster's token is read from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. See docs/jobs.md.
        """
        from rollcast.job_verbs import Submission
        from rollcast.jobs import Shipment, read_runtime_env

        extra = {} if runtime_env is None else read_runtime_env(runtime_env)
        asked = Submission(config, overrides(context, run), restarts, Shipment(working_dir, extra, python))
        asked.start(address, follow, dry_run, as_json)

    @app.command(cls=with_overrides, epilog="Example: rollcast logs demo --follow")
    def logs(
        context: typer.Context,
        run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run below ./runs (or --run.dir).")],
        follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until the run ends.")] = False,
        address: Address = None,
    ) -> None:
        """What a run has said, line by line."""
        from rollcast.job_verbs import show_logs, show_logs_there
        from rollcast.runs import find

        if address is not None:
            show_logs_there(address, run, follow)
        else:
            show_logs(find(run, run_dir(context)), follow)

    @app.command(epilog="Example: rollcast stop demo --address http://head:8265")
    def stop(
        run: Annotated[str, typer.Argument(metavar="RUN", help="A run.")],
        address: Address = None,
    ) -> None:
        """End a run."""
        from rollcast.job_verbs import stop_job

        assert address is not None
        stop_job(address, run)
