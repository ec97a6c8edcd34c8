"""From the name of a run to its control, from another terminal: where its cluster is, and what it takes to get in.

Owns: which address and which token are used, and every refusal on the way. Does not know what is asked of the run.

A run's cluster is the one in its run.json, or that of RAY_ADDRESS for a run whose folder is not here. The token is
never written into the run's folder: Ray reads it from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rollcast.errors import UsageError
from rollcast.rundir import RunDir, is_alive
from rollcast.runs import find as find_folder
from rollcast.runs import is_run, owner_of, state_of

NAMESPACE = "rollcast"
KNOCK_S = 5.0
START_AGAIN = "Start it again with `rollcast train`; it goes on from its newest checkpoint."


@dataclass(frozen=True)
class Reached:
    """A live run: its name, its control, and its folder where it can be seen from here."""

    name: str
    control: Any
    folder: RunDir | None

    @property
    def is_here(self) -> bool:
        """Whether its trainer is a process of this host."""
        return self.folder is not None and owner_of(self.folder).get("host") == socket.gethostname()

    @property
    def goes_on(self) -> bool:
        """Whether that process lives."""
        return self.folder is not None and is_alive(owner_of(self.folder))


@dataclass(frozen=True)
class _Place:
    """Where a run's control is to be looked for."""

    name: str
    folder: RunDir | None
    address: str
    namespace: str
    auth: str | None


@contextmanager
def reached(word: str, base: Path) -> Iterator[Reached]:
    """The run called `word` below `base`, or on the cluster that RAY_ADDRESS names.

    Raises `UsageError` for a run that is unknown, has ended, or whose cluster cannot be reached.
    """
    place = _place_of(word, base)
    connected = _connect(place)
    import ray

    from rollcast.control import find

    try:
        yield Reached(place.name, find(place.name, place.namespace), place.folder)
    finally:
        if connected:
            ray.shutdown()


def _place_of(word: str, base: Path) -> _Place:
    outside = os.environ.get("RAY_ADDRESS")
    if outside and not any(is_run(path) for path in (base / word, Path(word).expanduser())):
        return _Place(word, None, outside, NAMESPACE, os.environ.get("RAY_AUTH_MODE"))
    folder = find_folder(word, base)
    _refuse_ended(folder)
    owner = owner_of(folder)
    elsewhere = owner.get("host") != socket.gethostname()
    address = outside if outside and elsewhere else owner["address"]
    return _Place(owner["name"], folder, address, owner["namespace"], owner.get("auth"))


def _refuse_ended(folder: RunDir) -> None:
    state = state_of(folder)
    if state in ("finished", "ended"):
        why = "It has made its last step." if state == "finished" else "Its trainer ended before the last step."
        fix = "Raise run.steps and start it again, or name another run." if state == "finished" else START_AGAIN
        raise UsageError(f"The run {folder.path.name} does not live: it has {state}.", why, fix)


def _connect(place: _Place) -> bool:
    """Connects to the run's cluster; False where this process has a connection already."""
    _prepare(place, os.environ)
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():  # A caller's own session: tests, notebooks.
        return False
    _knock(place)
    try:
        ray.init(address=place.address, namespace=place.namespace, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, AuthenticationError) as error:
        raise UsageError(
            f"The cluster of {place.name} at {place.address} does not let this terminal in.",
            f"{type(error).__name__}: {str(error).partition('. ')[0]}",
            "Give this terminal the token of the terminal that trains: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
        ) from None
    return True


def _prepare(place: _Place, environment: "os._Environ[str]") -> None:
    """What Ray reads when it is imported. Raises `UsageError` without a token for a cluster that wants one."""
    if place.auth is not None:
        environment.setdefault("RAY_AUTH_MODE", place.auth)
    elif _has_token(environment):
        environment.setdefault("RAY_AUTH_MODE", "token")
    if environment.get("RAY_AUTH_MODE", "").lower() == "token" and not _has_token(environment):
        raise UsageError(
            f"The cluster of {place.name} wants a token, and this terminal has none.",
            "RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are not set, and there is no ~/.ray/auth_token.",
            "Give this terminal the token of the terminal that trains.",
        )


def _has_token(environment: Mapping[str, str]) -> bool:
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(environment.get("RAY_AUTH_TOKEN")) or path.is_file()


def _knock(place: _Place) -> None:
    """Ray itself would try for minutes, and then end the process."""
    try:
        parts = urlsplit(place.address if "://" in place.address else f"//{place.address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:  # "auto" and its like: Ray finds the cluster of this machine.
        return
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except OSError as error:
        raise UsageError(
            f"The cluster of {place.name} at {place.address} does not answer.",
            str(error),
            "Ask from a machine of that cluster, and see with `rollcast status` whether the run is still heard.",
        ) from None
