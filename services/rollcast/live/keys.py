"""API keys of the live policy: who may ask, and who may steer.

Owns: the keys file, how a key is made, hashed and compared, and which scope a path needs. Does not know HTTP's
machinery (`gate.py`), nor what the routes do.

What is protected: the file holds SHA-256 digests, never keys. A key is 256 random bits, so that a plain digest cannot
be turned back by guessing, and no slow hash is needed. The file must be readable by its owner alone (0600). A key that
comes in is compared with every digest in constant time. A key is shown once, when it is made, and can be revoked; a
server that reads the file notices within a second.
"""

import hmac
import json
import logging
import math
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from rollcast.errors import ConfigError, UsageError
from rollcast.section import Section

Scope = Literal["user", "admin"]
PREFIX = "rc-"
REREAD_S = 1.0
LOG = logging.getLogger(__name__)
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"

# Without a key: what a load balancer and a browser fetch before anybody could send one.
PUBLIC = frozenset({("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/"), ("HEAD", "/")})
# With a key of scope `admin`; below them too.
ADMIN = ("/v1/policy/promote", "/v1/policy/rollback", "/v1/policy/canary", "/v1/fleet")


def scope_of(method: str, path: str) -> Scope | None:
    """The scope that a request needs; None: no key at all. Whatever is not listed needs a key."""
    if (method, path) in PUBLIC:
        return None
    return "admin" if any(path == route or path.startswith(f"{route}/") for route in ADMIN) else "user"


class Key(Section):
    """One key as the file holds it."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    """Names the key in lists and when it is revoked."""
    name: Annotated[str, Field(pattern=NAME)]
    """Whose key it is."""
    scope: Scope = "user"
    """`admin` may promote, roll back and scale too."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of the key."""
    created: str
    """When it was made (UTC)."""
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    """Requests a second, in place of the server's `requests_per_s`."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests at a time, in place of the server's `concurrent`."""

    def allows(self, scope: Scope) -> bool:
        """Whether this key is enough."""
        return self.scope == "admin" or scope == "user"


ANYONE = Key(id="0" * 8, name="anyone", scope="admin", sha256="0" * 64, created="")
"""Who asks a server without a keys file, which answers this machine only."""


class Keys(Protocol):
    """Where the gate looks a key up."""

    def find(self, presented: bytes) -> Key | None:
        """Whose key it is; None: nobody's."""


class Keyring:
    """Some keys, in memory."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = tuple(keys)

    def find(self, presented: bytes) -> Key | None:
        """Looks at every digest, whether or not one has matched."""
        digest = sha256(presented).hexdigest()
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found


class KeysFile:
    """A keyring on disk that is read again when it has changed.

    A file that has become unreadable while the server runs counts for nothing: no key is taken until it is mended.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigError` when the file is missing, open to others, or not a keys file."""
        self.path = Path(path)
        self._clock = clock
        # A clock of one machine means nothing to another, to which this may be sent: the first call looks anew.
        self._looked, self._stamp = -math.inf, self._stamp_of()
        self._ring = Keyring(read_keys(self.path))

    def find(self, presented: bytes) -> Key | None:
        now = self._clock()
        if now - self._looked >= REREAD_S:
            self._looked = now
            self._reread()
        return self._ring.find(presented)

    def _reread(self) -> None:
        stamp = self._stamp_of()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._ring = Keyring(read_keys(self.path))
            except ConfigError as error:
                LOG.error("no key is taken until this is mended: %s", error)
                self._ring = Keyring(())

    def _stamp_of(self) -> tuple[int, int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


_FILE: TypeAdapter[list[Key]] = TypeAdapter(list[Key])


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises `ConfigError` when it is missing, open to others, or not a keys file."""
    fix = f"make one with: rollcast keys add NAME --file {path}"
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"keys file {path}: cannot be read", str(error.strerror), fix) from None
    if stat.S_IMODE(mode) & 0o077:
        why = f"others than its owner may use it (mode {stat.S_IMODE(mode):04o})"
        raise ConfigError(f"keys file {path}: is not private", why, f"chmod 600 {path}")
    try:
        keys = _FILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"keys file {path}: is damaged", f"{place}: {first['msg']}", fix) from None
    if len({key.id for key in keys}) < len(keys):
        raise ConfigError(f"keys file {path}: is damaged", "two keys have one id", "revoke one of them") from None
    return keys


def make_key(
    name: str, scope: Scope, requests_per_s: float | None = None, concurrent: int | None = None
) -> tuple[Key, str]:
    """A new key as the file holds it, and the key itself, which nobody can tell again. Raises `UsageError`."""
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        made = Key(
            id=secrets.token_hex(4),
            name=name,
            scope=scope,
            sha256=sha256(key.encode()).hexdigest(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            requests_per_s=requests_per_s,
            concurrent=concurrent,
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        why = f"{first['loc'][0]}: {first['msg']}"
        raise UsageError("no such key can be made", why, "name it with letters, digits, '.', '_', '@', '-'") from None
    return made, key


def add_key(path: Path, key: Key) -> None:
    """Writes one more key; makes the file where there is none. Raises `ConfigError`."""
    keys = read_keys(path) if path.exists() else []
    _write(path, [*keys, key])


def revoke_key(path: Path, named: str) -> list[Key]:
    """Takes out the key of that id, or all keys of that name, and returns them. Raises `ConfigError`, `UsageError`."""
    keys = read_keys(path)
    gone = [key for key in keys if key.id == named] or [key for key in keys if key.name == named]
    if not gone:
        known = ", ".join(f"{key.name} ({key.id})" for key in keys) or "none"
        raise UsageError(f"no key {named!r} in {path}", f"there are: {known}", "name one of them, or its id")
    _write(path, [key for key in keys if key not in gone])
    return gone


def _write(path: Path, keys: Sequence[Key]) -> None:
    """The file is whole at any time, and private from its first byte."""
    text = json.dumps([key.model_dump(exclude_none=True) for key in keys], indent=2) + "\n"
    part: str | None = None
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mkstemp gives 0600.
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise ConfigError(f"keys file {path}: cannot be written", str(error.strerror), "name another --file") from None
