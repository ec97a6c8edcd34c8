"""Which Python a submitted job runs under: the one that runs Ray's workers, whatever `python` means on the head node.

Owns: finding it, and going on under it. Does not know anything else of rollcast: it is imported first, perhaps by a
Python that is older than rollcast needs and has none of its libraries.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of a submitted job, and for nothing else."""
PYTHON = "ROLLCAST_PYTHON"
"""The interpreter to go on under, where it is not the one that runs Ray's workers."""
WORKERS = "--python_worker_command="


def hand_over(words: Sequence[str]) -> None:
    """Goes on as `python -m rollcast WORDS` under the cluster's interpreter, if this one has no Ray.

    Ray starts a job's command with the PATH of the head node, and its workers with the Python that started Ray there.
    That one is named in the arguments of the raylet, which is above the job in the tree of processes.
    """
    if JOB not in os.environ or importlib.util.find_spec("ray") is not None:
        return
    python = os.environ.get(PYTHON) or workers_python(os.getppid())
    if python is None or os.path.abspath(python) == os.path.abspath(sys.executable):
        print(
            "This Python has no Ray.\n"
            f"why: the job's command runs under {sys.executable}, and the cluster's own interpreter was not found\n"
            f"do this: name it with `rollcast submit --python PATH`, or as {PYTHON} in the env_vars of the runtime_env",
            file=sys.stderr,
        )
        sys.exit(2)
    os.execv(python, [python, "-m", "rollcast", *words])


def workers_python(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The interpreter of Ray's workers, from the arguments of the raylet above process `pid`; None without one."""
    while pid > 1:
        try:
            arguments = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            stat = (proc / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        for argument in arguments:
            if argument.startswith(WORKERS):
                return argument[len(WORKERS) :].split(" ")[0] or None
        pid = int(stat.rpartition(")")[2].split()[1])
    return None
