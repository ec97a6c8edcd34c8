"""What is different inside a job that was submitted to a cluster: whose code runs, and what outlives the job.

Owns: how a process knows that it is in such a job, and the refusals that follow from it. Does not know Ray: it reads
what Ray says to a job in its environment.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rollcast.errors import ConfigError, UsageError
from rollcast.interpreter import JOB

SOURCES = {"rollcast": "services", "rollcast_learners": "learners", "rollcast_envs": "envs"}
"""Package -> the folder of the repository that holds it."""
CODE = "ROLLCAST_CODE"
"""Digest of the code that `rollcast submit` shipped."""
SHIPPED_BELOW = "runtime_resources"
"""Ray's folder of what jobs ship, inside the folder of its session; both go with the cluster."""


def in_job(environ: Mapping[str, str] = os.environ) -> bool:
    return JOB in environ


def job_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of the job's runtime_env, which every process of the job has."""
    config = json.loads(environ.get(JOB, "{}"))
    variables: dict[str, str] = (config.get("runtime_env") or {}).get("env_vars") or {}
    return variables


# ---- the code


def imported() -> dict[str, Path]:
    """Where this process finds each package of rollcast."""
    found = {name: importlib.util.find_spec(name) for name in SOURCES}
    return {name: Path(spec.origin).parent for name, spec in found.items() if spec is not None and spec.origin}


def digest_of(folders: Mapping[str, Path]) -> str:
    """One number for the code of the packages: names and contents of their Python files."""
    digest = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        for file in sorted(folder.rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{name}/{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def refuse_other_code(found: Mapping[str, Path], folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raises `UsageError` when a submitted job imports another rollcast than the one that was shipped with it.

    `folder` is the job's working folder. `rollcast submit` says by a digest what it shipped; of a plain
    `ray job submit --working-dir .` the folders themselves are there to compare with.
    """
    if not in_job(environ):
        return
    shipped = {name: folder / source / name for name, source in SOURCES.items()}
    if CODE in environ:
        others = [] if digest_of(found) == environ[CODE] else sorted(found)
    else:
        others = [n for n, path in shipped.items() if path.is_dir() and not _same(found.get(n), path)]
    if others:
        places = ", ".join(f"{name} from {found.get(name, 'nowhere')}" for name in others)
        raise UsageError(
            "The rollcast that was imported is not the one that was shipped with the job.",
            f"this job imports {places}",
            "submit with `rollcast submit`, or `ray job submit --runtime-env deploy/runtime_env.yaml`, which put the "
            "shipped code before what is installed; a PYTHONPATH of your own in env_vars must begin with it",
        )


def _same(found: Path | None, shipped: Path) -> bool:
    return found is not None and found.resolve() == shipped.resolve()


# ---- what outlives the job


def refuse_passing_folder(run_dir: str, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raises `ConfigError` for a `run.dir` that would go with the job: a relative one, or one in Ray's own folder."""
    if not in_job(environ):
        return
    if problem := relative(run_dir):
        raise ConfigError(*problem)
    path = Path(run_dir).expanduser()
    session = next((part.parent for part in folder.parents if part.name == SHIPPED_BELOW), None)
    if session is not None and path.resolve().is_relative_to(session.resolve()):
        raise ConfigError(*_passing(run_dir, f"{session} is Ray's own folder, which goes with the cluster"))


def relative(run_dir: str) -> tuple[str, str, str] | None:
    """What, why and do this of a `run.dir` that is relative; None for an absolute one."""
    if Path(run_dir).expanduser().is_absolute():
        return None
    return _passing(run_dir, "it is relative, and the working folder of a submitted job is deleted with it")


def _passing(run_dir: str, why: str) -> tuple[str, str, str]:
    fix = "name an absolute folder that outlives the job and that every node sees, such as --run.dir /data/runs"
    return f"run.dir: {run_dir!r} would not outlive the job", why, fix
