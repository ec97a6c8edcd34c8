"""The tables of the feedback database, and how such a database is opened.

Owns: the schema and its version, and what SQLite and PostgreSQL need said to them. Does not know what feedback means.

A database knows its schema's version. An older one is brought up to date when the writer opens it, by the statements of
`MIGRATIONS`, in one transaction; a newer one is refused, since an older rollcast could only damage it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Double,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from rollcast.config_feedback import FeedbackSection
from rollcast.errors import RunFailed, UsageError
from rollcast.rundir import RunDir

SCHEMA = 1
MIGRATIONS: Mapping[int, Sequence[str]] = {}
"""By the version they start from: statements that lead to the next one. There has been only one version yet."""
BUSY_TIMEOUT_MS = 5000

metadata = MetaData()

schema = Table("rollcast_schema", metadata, Column("version", Integer, nullable=False))

# Text that anybody wrote is JSON in ASCII: neither a NUL nor half a surrogate pair can make a row unwritable.
answers = Table(
    "rollcast_answers",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("time", Double, nullable=False, index=True),
    Column("key", String(200), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("answer_ids", LargeBinary, nullable=False),
    Column("logprobs", LargeBinary, nullable=False),
    Column("spans", Text, nullable=False),
    Column("temperature", Double, nullable=False),
    Column("finish_reason", String(40), nullable=False),
    Column("size", Integer, nullable=False),
)


def _answer_id(name: str) -> Column[str]:
    reference = ForeignKey(answers.c.id, ondelete="CASCADE")
    return Column(name, String(200), reference, primary_key=True)


ratings = Table(
    "rollcast_ratings",
    metadata,
    _answer_id("answer"),
    Column("thumb", String(4)),
    Column("score", Double),
    Column("edit", Text),
    Column("key", String(200), nullable=False),
    Column("time", Double, nullable=False, index=True),
)

preferences = Table(
    "rollcast_preferences",
    metadata,
    _answer_id("better"),
    _answer_id("worse"),
    Column("key", String(200), nullable=False),
    Column("time", Double, nullable=False),
)


def sqlite_url(path: Path) -> str:
    return URL.create("sqlite", database=str(path)).render_as_string()


def database_of(run: RunDir, settings: FeedbackSection) -> str:
    """The URL of a run's database."""
    return settings.url if settings.url is not None else sqlite_url(run.feedback.absolute())


def open_to_write(url: str, migrations: Mapping[int, Sequence[str]] = MIGRATIONS, version: int = SCHEMA) -> Engine:
    """The database, made or brought up to date if need be; an SQLite file is readable by its owner only.

    Raises `UsageError` for a URL that cannot be used, `RunFailed` for a database that cannot be opened.
    """
    parsed = _parsed(url)
    try:
        if parsed.database and parsed.get_backend_name() == "sqlite":
            os.close(os.open(parsed.database, os.O_RDWR | os.O_CREAT, 0o600))
        engine = _engine(parsed)
        with engine.begin() as connection:
            if not inspect(connection).has_table(schema.name):
                metadata.create_all(connection)
                connection.execute(insert(schema).values(version=version))
            found = connection.execute(select(schema.c.version)).scalar_one()
            for step in range(found, version):
                for statement in migrations[step]:
                    connection.execute(text(statement))
                connection.execute(update(schema).values(version=step + 1))
    except (OSError, SQLAlchemyError) as error:
        raise _cannot_open(parsed, str(error)) from error
    _refuse_newer(parsed, found, version)
    return engine


def open_to_read(url: str) -> Engine:
    """The database as it is; nothing can be written. Raises `UsageError`, or `RunFailed` where there is none."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
        raise _cannot_open(parsed, "there is no such file")
    engine = _engine(parsed, read_only=True)
    try:
        with engine.connect() as connection:
            found = connection.execute(select(schema.c.version)).scalar_one()
    except SQLAlchemyError as error:
        raise _cannot_open(parsed, str(error)) from error
    if found < SCHEMA:
        raise _cannot_open(parsed, f"it has schema {found}, and serving it once brings it to {SCHEMA}")
    _refuse_newer(parsed, found, SCHEMA)
    return engine


def _parsed(url: str) -> URL:
    fix = "write sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME; the password may come from ~/.pgpass"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UsageError("feedback.url is no address of a database", "it cannot be parsed", fix) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        why = f"{parsed.get_backend_name()} is not supported"
        raise UsageError("feedback.url is no address of a database that can be used", why, fix)
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise UsageError("feedback.url names no file", "what is in memory alone would be lost", fix)
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _engine(url: URL, read_only: bool = False) -> Engine:
    try:
        if url.get_backend_name() == "postgresql":
            options: dict[str, Any] = {"connect_args": {"connect_timeout": 5}, "pool_pre_ping": True}
            engine = create_engine(url, hide_parameters=True, **options)
            return engine.execution_options(postgresql_readonly=True) if read_only else engine
        if read_only:
            url = url.set(database=f"file:{Path(str(url.database)).absolute().as_uri()[7:]}", query={"uri": "true"})
            url = url.update_query_dict({"mode": "ro"})
        engine = create_engine(url, hide_parameters=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        fix = "install rollcast[postgres], or leave feedback.url out"
        raise UsageError("feedback.url cannot be used here", str(error), fix) from None
    _prepare_sqlite(engine, read_only)
    return engine


def _prepare_sqlite(engine: Engine, read_only: bool) -> None:
    """Python's driver neither begins transactions around tables nor checks references, unless told."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys = ON")
        if not read_only:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _cannot_open(url: URL, why: str) -> RunFailed:
    where = url.render_as_string(hide_password=True)
    fix = "Make that place writable or the server reachable, or set feedback.url to another database."
    return RunFailed(f"The feedback database {where} cannot be opened.", why, fix)


def _refuse_newer(url: URL, found: int, version: int) -> None:
    if found > version:
        raise _cannot_open(url, f"a newer rollcast made it (schema {found}; this one knows {version})")
