"""What the verbs of jobs do: checks, ships and starts a run on a cluster; lists, tells, hears and stops it from there.

Owns: what is said to the person who typed the verb, and what is refused before a job is made. Does not know Ray's job
API (`jobs.py`), nor the verbs' options (`cli_jobs.py`).
"""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import typer

from rollcast import display, preflight
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import UsageError
from rollcast.jobs import STOP_WAIT, STOP_WAIT_S, Job, Jobs, Shipment, exit_code
from rollcast.plan import is_hub_id, processes_of
from rollcast.rundir import RunDir
from rollcast.runs import state_of
from rollcast.submitted import relative

LOOK_EVERY_S = 0.3


# ---- submit


@dataclass(frozen=True)
class Submission:
    """A run that somebody wants on a cluster."""

    config: Path
    overrides: Sequence[str]
    restarts: int
    shipment: Shipment

    def start(self, address: str | None, follow: bool, dry_run: bool, as_json: bool) -> None:
        """Checks what can be checked from here, ships, and starts; with `follow`, sees it through and exits as it does.

        Raises `UsageError` or `ConfigError` for what could not work there.
        """
        settings = load_config(self.config, self.overrides)
        words = ["train", _inside(self.config, self.shipment.working_dir), *self.overrides]
        words += ["--restarts", str(self.restarts)] if self.restarts else []
        refuse_local_paths(settings)
        jobs = Jobs(address)
        _refuse_small_cluster(settings, jobs)
        _refuse_running(settings.run.name, jobs)
        if dry_run:
            _show_dry_run(settings, jobs, words, self.shipment, as_json)
        else:
            job = jobs.submit(settings.run.name, words, self.shipment, settings.run.dir)
            _submitted(jobs, settings.run.name, job, follow, as_json)


def _inside(config: Path, folder: Path | None) -> str:
    """The configuration as the job names it: relative to the folder that is shipped."""
    assert folder is not None, "submit ships a folder"
    if not folder.is_dir():
        raise UsageError(f"--working-dir {folder}: there is no such folder", "it is shipped with the job", "correct it")
    try:
        return config.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise UsageError(
            f"{config} is not shipped with the job",
            f"it is outside {folder.resolve()}, the folder that is",
            "type the command in a folder that holds it, or name that folder with --working-dir",
        ) from None


def refuse_local_paths(config: RunConfig) -> None:
    """Raises `UsageError` for what is on this machine alone, or would go with the job."""
    model = config.model.path
    if problem := relative(config.run.dir):
        raise UsageError(*problem)
    if not Path(model).expanduser().is_absolute() and not is_hub_id(model):
        raise UsageError(
            f"model.path: {model!r} is a folder of this machine",
            "the job runs elsewhere, and models are too large to be shipped with it",
            "name an absolute folder that every node of the cluster has, or a hub id `org/name`",
        )


def _refuse_small_cluster(config: RunConfig, jobs: Jobs) -> None:
    if not config.run.wait_for_devices:
        preflight.refuse(preflight.device_problems(processes_of(config), jobs.nodes()))


def _refuse_running(run: str, jobs: Jobs) -> None:
    job = next((job for job in jobs.all() if job.run == run and not job.over), None)
    if job is not None:
        raise UsageError(
            f"The run {run} is being trained already.",
            f"Job {job.id} of {jobs.address} is {job.status.lower()}.",
            f"Stop it with `rollcast stop {run} --address {jobs.address}`, or choose another name with --run.",
        )


def _show_dry_run(config: RunConfig, jobs: Jobs, words: Sequence[str], shipment: Shipment, as_json: bool) -> None:
    nodes = jobs.nodes()
    environment = shipment.environment()
    if as_json:
        found = {"address": jobs.address, "run": config.run.name, "words": list(words), "runtime_env": environment}
        typer.echo(json.dumps({**found, "nodes": [asdict(node) for node in nodes]}, indent=2))
        return
    typer.echo(f"run {config.run.name} in {config.run.dir} on {jobs.address}")
    typer.echo(f"command: rollcast {shlex.join(words)}")
    typer.echo(f"shipped: {environment['working_dir']} without {', '.join(environment['excludes'])}")
    for node in nodes:
        typer.echo(f"node {node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs")


def _submitted(jobs: Jobs, run: str, job: str, follow: bool, as_json: bool) -> None:
    at = f" --address {jobs.address}"
    if as_json:
        typer.echo(json.dumps({"job": job, "run": run, "address": jobs.address}))
    else:
        typer.echo(f"submitted {run} as job {job}", err=follow)
    if follow:
        _follow(jobs, job, f"rollcast logs {run} --follow{at}")
    elif not as_json:
        typer.echo(f"rollcast logs {run} --follow{at}\nrollcast status {run}{at}\nrollcast stop {run}{at}")


def _follow(jobs: Jobs, job: str, again: str) -> NoReturn:
    """Exits as the job does. Ctrl-C ends the following, not the job."""
    try:
        ended = jobs.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; to see it again: {again}", err=True)
        raise typer.Exit(130) from None
    if ended.status == "STOPPED":
        typer.echo("the job was stopped", err=True)
    elif ended.exit_code is None:
        typer.echo(ended.message, err=True)
    raise typer.Exit(exit_code(ended))


# ---- from outside


def list_runs(address: str, as_json: bool) -> None:
    """The jobs of a cluster that are runs, the newest first."""
    found = Jobs(address).all()
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in found], indent=2))
    elif not found:
        typer.echo(f"no runs among the jobs of {address}")
    else:
        screen = display.screen()
        shown = display.table(screen, "run", "job", "state", "exit code", "started")
        for job in found:
            code = "" if job.exit_code is None else str(job.exit_code)
            started = "" if job.started is None else display.moment(job.started)
            shown.add_row(job.run, job.id, job.status.lower(), code, started)
        screen.print(shown)


def there(address: str, verb: str, run: str | None, words: Sequence[str] = ()) -> NoReturn:
    """`rollcast VERB RUN WORDS` on the cluster: prints what it says, and exits as it does."""
    jobs = Jobs(address)
    job = jobs.find(run) if run is not None else _newest(jobs)
    if job.run_dir is None:
        raise UsageError(
            f"The folder of run {job.run!r} is not known here.",
            f"Job {job.id} was not submitted by `rollcast submit`, and its command names no --run.dir.",
            f"Ask on a node of the cluster: `rollcast {verb} {job.run} --run.dir DIR`.",
        )
    code, said = jobs.ask(job, [verb, job.run, *words, "--run.dir", job.run_dir])
    typer.echo(said, nl=False, err=code != 0)
    raise typer.Exit(code)


def _newest(jobs: Jobs) -> Job:
    found = jobs.all()
    if not found:
        raise UsageError(f"There are no runs among the jobs of {jobs.address}.", "None was submitted.", "Submit one.")
    return found[0]


def stop_job(address: str, run: str, within_s: float, as_json: bool) -> None:
    """Ends the job of a run, which saves a checkpoint first, and waits for it; 0 does not wait."""
    jobs = Jobs(address)
    job = jobs.find(run)
    if job.over:
        raise UsageError(f"The run {job.run} does not go on.", f"Its job {job.id} is {job.status.lower()}.", "Nothing.")
    if not job.saves_when_stopped:
        raise UsageError(
            f"The run {job.run} could not save a checkpoint.",
            f"Job {job.id} was submitted without {STOP_WAIT}: Ray would kill it 3 seconds after it asks it to end.",
            f"Use `rollcast stop {job.run}` on the cluster; submit with `rollcast submit`, or with {STOP_WAIT}="
            f"{STOP_WAIT_S} in the runtime_env.",
        )
    typer.echo(f"stopping {job.run}: it saves a checkpoint first", err=True)
    now = jobs.stop(job, within_s)
    if as_json:
        typer.echo(json.dumps(asdict(now)))
    else:
        typer.echo(f"{job.run}: {now.status.lower()}")


# ---- logs


def show_logs(run: RunDir, follow: bool) -> None:
    """What a run of this machine has said: runs/NAME/logs."""
    files = sorted(run.logs.glob("*.log"))
    if not files and not follow:
        raise UsageError(f"The run {run.path.name} has said nothing.", f"{run.logs} holds no log.", "See its status.")
    for file in files[:-1] if len(files) > 1 else []:
        typer.echo(f"==> {file.name}")
        typer.echo(file.read_text(encoding="utf-8", errors="replace"), nl=False)
    last = files[-1] if files else run.logs / "trainer.log"
    if len(files) > 1:
        typer.echo(f"==> {last.name}")
    _tail(last, lambda: follow and state_of(run) == "running")


def _tail(file: Path, goes_on: Callable[[], bool]) -> None:
    """The file so far, and what is added while it goes on."""
    seen = 0
    while True:
        more = goes_on()  # Asked before the file is read, so that its last words are not missed.
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(seen)
                said = stream.read()
            seen += len(said)
            typer.echo(said.decode(errors="replace"), nl=False)
        if not more:
            return
        time.sleep(LOOK_EVERY_S)


def show_logs_there(address: str, run: str, follow: bool) -> None:
    """What the job of a run has printed."""
    jobs = Jobs(address)
    job = jobs.find(run)
    if follow:
        _follow(jobs, job.id, f"rollcast logs {run} --follow --address {address}")
    typer.echo(jobs.logs(job.id), nl=False)
