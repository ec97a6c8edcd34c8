"""Runs as jobs of a Ray cluster, from outside it: submitted, listed, heard and stopped through Ray's job API.

Owns: what is shipped with a job, the command it runs, and how a run is found among the cluster's jobs. Does not know
what a run does there, nor how it is told (`cli_jobs.py`).

A verb that has to look into the run folder, or to reach the run's own actors, runs as a small job on the cluster: the
folder is there and not here. What Ray's API can do itself (list, logs, stop) goes the short way.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import requests
import yaml  # type: ignore[import-untyped]
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from rollcast.errors import RollcastError, RunFailed, UsageError
from rollcast.interpreter import PYTHON
from rollcast.preflight import Node
from rollcast.submitted import CODE, digest_of, imported

RUN, RUN_DIR, INTERPRETER = "rollcast_run", "rollcast_run_dir", "rollcast_python"
"""What a job says of itself, in its metadata."""
EXCLUDED = ("/.git", "/.venv*", "/models", "/runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
"""Never shipped; what .gitignore names is not either."""
STOP_WAIT_S = 600
"""Seconds that Ray waits for a job it ends before it kills it; a checkpoint is saved meanwhile. Ray's own are 3."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
LOOK_EVERY_S = 0.3
MOST_NODES = 10_000
NODES_WITHIN_S = 20.0
LOCAL = "http://127.0.0.1:8265"


@dataclass(frozen=True)
class Shipment:
    """What goes to the cluster with a job."""

    working_dir: Path | None
    """Configurations and code of the user's own, less `EXCLUDED`; None ships rollcast alone."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of Ray's runtime_env, such as `pip`."""
    python: str | None = None
    """The interpreter on the cluster; without it, the one that runs Ray's workers."""

    def environment(self) -> dict[str, Any]:
        """Ray's runtime_env. The packages that run here go along, and before whatever is installed there."""
        folders = imported()
        variables = {STOP_WAIT: str(STOP_WAIT_S), **(self.runtime_env.get("env_vars") or {})}
        if self.python is not None:
            variables[PYTHON] = self.python
        folder = {} if self.working_dir is None else {"working_dir": str(self.working_dir)}
        return {
            **self.runtime_env,
            **folder,
            "py_modules": [*map(str, folders.values()), *(self.runtime_env.get("py_modules") or [])],
            "excludes": [*EXCLUDED, *(self.runtime_env.get("excludes") or [])],
            "env_vars": {**variables, CODE: digest_of(folders)},
        }


@dataclass(frozen=True)
class Job:
    """One job of a run, as the cluster tells of it."""

    id: str
    run: str
    status: str
    started: float | None
    """Epoch seconds."""
    ended: float | None
    exit_code: int | None
    message: str
    run_dir: str | None
    """Folder of all runs, on the cluster."""
    python: str
    saves_when_stopped: bool
    """Whether Ray gives it time to save a checkpoint before it kills it."""

    @property
    def over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Jobs:
    """The cluster behind one dashboard. Raises `UsageError` when it does not answer, or not to this token."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address or address_from(os.environ)
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # It tells of every file and socket.
        with _telling(self.address), _alone(self.address):
            self._client = JobSubmissionClient(self.address)

    def submit(self, run: str, words: Sequence[str], shipment: Shipment, run_dir: str) -> str:
        """Starts `rollcast WORDS` as a job; returns its id."""
        python = shipment.python or "python3"
        said = {RUN: run, RUN_DIR: run_dir, INTERPRETER: python}
        return self._start(f"{run}-{uuid4().hex[:8]}", python, words, shipment.environment(), said)

    def nodes(self) -> list[Node]:
        """All that live, the head first; of a cluster that has just started, once they have said what they have."""
        deadline = time.monotonic() + NODES_WITHIN_S
        while True:
            with _telling(self.address), _alone(self.address):
                found = list_nodes(self.address, filters=[("state", "=", "ALIVE")], limit=MOST_NODES)
            if (found and all(it.resources_total for it in found)) or time.monotonic() > deadline:
                break
            time.sleep(LOOK_EVERY_S)
        found.sort(key=lambda node: not node.is_head_node)
        return [
            Node(it.node_ip, it.resources_total.get("CPU", 0.0), it.resources_total.get("GPU", 0.0)) for it in found
        ]

    def all(self) -> list[Job]:
        """Jobs of runs, the newest first; other jobs of the cluster are left out."""
        with _telling(self.address):
            found = self._client.list_jobs()
        jobs = [job for details in found if (job := job_of(details)) is not None]
        return sorted(jobs, key=lambda job: -(job.started or 0.0))

    def find(self, run: str) -> Job:
        """The newest job of that run, or the one of that id. Raises `UsageError` with the runs there are."""
        jobs = self.all()
        for job in jobs:
            if run in (job.run, job.id):
                return job
        names = ", ".join(dict.fromkeys(job.run for job in jobs))
        raise UsageError(
            f"There is no run {run!r} among the jobs of {self.address}.",
            f"Its runs are: {names}." if names else "No run was submitted to it.",
            "Name one of them, or see `rollcast runs --address URL`.",
        )

    def logs(self, job: str) -> str:
        """What the job's command has printed so far."""
        with _telling(self.address):
            return said_by_command(job, self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Hands on what the job's command prints until the job is over; returns how it ended."""

        async def tail() -> None:
            held: str | None = ""
            async for text in self._client.tail_job_logs(job):
                if held is None:
                    write(text)
                elif begins_command(job) in (held := held + text) and (said := said_by_command(job, held)):
                    write(said)
                    held = None

        with _telling(self.address):
            asyncio.run(tail())
        return self.wait(job)

    def info(self, job: str) -> Job:
        with _telling(self.address):
            found = job_of(self._client.get_job_info(job))
        assert found is not None, "it is asked for by the id of a run's job"
        return found

    def stop(self, job: Job, within_s: float) -> Job:
        """Asks the job to save and end, and waits until it has. Returns it as it is then."""
        with _telling(self.address):
            self._client.stop_job(job.id)
        return self.wait(job.id, within_s) if within_s else self.info(job.id)

    def wait(self, job: str, within_s: float = inf) -> Job:
        """Until it is over. Raises `RunFailed` when that takes longer."""
        deadline = time.monotonic() + within_s
        while not (found := self.info(job)).over:
            if time.monotonic() > deadline:
                what = f"Job {job} has not ended within {within_s:g} s."
                raise RunFailed(what, "It was asked to, and saves a checkpoint first.", "See `rollcast logs`.")
            time.sleep(LOOK_EVERY_S)
        return found

    def ask(self, about: Job, words: Sequence[str]) -> tuple[int, str]:
        """`rollcast WORDS` on the cluster, as a small job with the packages that run here; exit code and output."""
        name = f"ask-{uuid4().hex[:12]}"
        self._start(name, about.python, words, Shipment(None).environment(), {})
        with _telling(self.address):
            while not JobStatus(self._client.get_job_status(name)).is_terminal():
                time.sleep(LOOK_EVERY_S)
            details = self._client.get_job_info(name)
            said = self.logs(name)
            self._client.delete_job(name)
        if details.driver_exit_code is None:
            raise RunFailed(f"The cluster at {self.address} could not be asked.", str(details.message), "Try again.")
        return details.driver_exit_code, said

    def _start(
        self, name: str, python: str, words: Sequence[str], environment: Mapping[str, Any], said: Mapping[str, str]
    ) -> str:
        command = shlex.join([python, "-m", "rollcast", *words])
        try:
            with _telling(self.address):
                started: str = self._client.submit_job(
                    entrypoint=command, submission_id=name, runtime_env=dict(environment), metadata=dict(said)
                )
        except (ValueError, TypeError) as error:  # Of what Ray makes of the runtime_env, and of its 500 MiB at most.
            fix = (
                "Correct the file named with --runtime-env; leave large files out by its `excludes`, or by .gitignore."
            )
            raise UsageError("The job cannot be shipped.", str(error), fix) from None
        return started


def address_from(environ: Mapping[str, str]) -> str:
    """The dashboard's: of RAY_API_SERVER_ADDRESS, or of RAY_ADDRESS where that is a URL, else this machine's own."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if environ.get(name, "").startswith(("http://", "https://")):
            return environ[name]
    return LOCAL


@contextmanager
def _alone(address: str) -> Iterator[None]:
    """Ray's client would take the address of the environment before the one it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _telling(address: str) -> Iterator[None]:
    """What can go wrong between here and the cluster, told as a user's mistake."""
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(
            f"The cluster at {address} does not let this user in.",
            str(error).splitlines()[0],
            "Set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or a file in RAY_AUTH_TOKEN_PATH.",
        ) from None
    except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
        raise UsageError(
            f"The cluster at {address} does not answer.",
            str(error),
            "Name its dashboard with --address http://HOST:8265, and see that the port is reachable from here.",
        ) from None
    except RuntimeError as error:
        raise RunFailed(f"The cluster at {address} refused.", str(error), "See the dashboard's log there.") from None


def job_of(details: JobDetails) -> Job | None:
    """A job of a run; None for any other job of the cluster."""
    metadata = details.metadata or {}
    words = _words(details.entrypoint)
    run = metadata.get(RUN) or run_of(words)
    if run is None or details.submission_id is None:
        return None
    return Job(
        id=details.submission_id,
        run=run,
        status=str(details.status),
        started=_seconds(details.start_time),
        ended=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        run_dir=metadata.get(RUN_DIR) or _option(words, "--run.dir"),
        python=metadata.get(INTERPRETER) or (words[0] if words else "python3"),
        saves_when_stopped=STOP_WAIT in ((details.runtime_env or {}).get("env_vars") or {}),
    )


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # A shell's line that is no list of words: not a command of ours.
        return []


def run_of(words: Sequence[str]) -> str | None:
    """The run that a command such as `python -m rollcast train CONFIG.toml --run NAME` starts; None for others."""
    for verb in ("train", "sft"):
        if "rollcast" in words and verb in words[words.index("rollcast") :]:
            config = next((word for word in words if word.endswith(".toml")), None)
            named = _option(words, "--run") or _option(words, "--run.name")
            return named or (Path(config).stem if config is not None else None)
    return None


def _option(words: Sequence[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def said_by_command(job: str, log: str) -> str:
    """A job's log without what Ray wrote before the command began."""
    before, begun, after = log.partition(begins_command(job))
    return after.partition("\n")[2] if begun else before


def begins_command(job: str) -> str:
    """Where Ray's own words in a job's log end."""
    return f"Running entrypoint for job {job}:"


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime_env file, as `ray job submit --runtime-env` takes it. Raises `UsageError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read", str(error), "name a YAML file of Ray's runtime_env") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is no runtime_env", "it is not a table of keys", "see deploy/runtime_env.yaml")
    return content


def exit_code(job: Job) -> int:
    """Of a job that is over: its command's, and 0 where it was stopped."""
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "STOPPED" else RollcastError.exit_code
