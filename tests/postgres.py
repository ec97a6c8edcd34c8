"""A PostgreSQL server of the tests' own, where Debian's package `postgresql` is installed.

Owns: finding the programs, starting and ending the server. It listens on a socket alone, and where
the tests are root it runs as the user `postgres`, since it refuses root.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


def why_not() -> str | None:
    """Why there can be no server here; None if there can."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed (rollcast[postgres])"
    return None if PROGRAMS else "no PostgreSQL server is installed (apt-get install postgresql)"


@contextmanager
def server() -> Iterator[str]:
    """A fresh server; yields the URL of its database."""
    folder = Path(tempfile.mkdtemp(prefix="rc-pg-", dir="/tmp"))  # A socket's name leaves no room for a longer path.
    become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if become:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [*become, str(PROGRAMS[-1].with_name(program)), *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    data = str(folder / "data")
    run("initdb", "-D", data, "-A", "trust", "-U", "rollcast", "-N")
    try:
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql+psycopg://rollcast@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
