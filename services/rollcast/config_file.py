"""A run's TOML file and dotted overrides, read into settings; and the settings, told to people.

Owns: how they are read, the message for a key that is wrong, docs/config.md. Does not know what a setting means
(`config.py`).
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import tomlkit
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rollcast.config import (
    SAMPLING_KEYS,
    WORKER_KINDS,
    EnvSection,
    RewardSection,
    RunConfig,
    WorkerRange,
    sampling_refusal,
)
from rollcast.errors import ConfigError
from rollcast.live.limits import Limits

# ---- reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file; `overrides` are words as typed: `--learner.epochs 2` or `--learner.epochs=2`.

    Raises `ConfigError` that names every key that is wrong.
    """
    data = _read(Path(path))
    data.setdefault("env", [])
    for keys, text in _pairs(overrides):
        _put(data, keys, text)
    run = data.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", _run_name(Path(path)))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors() if not _echo(detail)]
        raise ConfigError.join(str(path), problems) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read",
            str(error.strerror),
            "name a TOML file, such as deploy/configs/demo.toml",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text", str(error), "save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        fix = 'correct that line; text needs quotes: name = "value"'
        raise ConfigError(f"{path}: is not valid TOML", str(error), fix) from None


def _run_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64] or "run"


def _pairs(words: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        keys = name.removeprefix("--").split(".")
        if not name.startswith("--") or len(keys) < 2 or not all(keys):
            raise ConfigError(f"{word}: is not an override", "it has no section and key", "write --section.key VALUE")
        value = text if equals else next(rest, None)
        if value is None:
            raise ConfigError(f"{name}: has no value", "the command line ends there", f"write {name} VALUE")
        yield keys, value


def _put(data: dict[str, Any], keys: list[str], text: str) -> None:
    """Sets one value in the tables and lists of the file; a missing table on the way is made."""
    here: Any = data
    for position, key in enumerate(keys):
        slot = _slot(here, key)
        if slot is None:
            raise _no_such_place(keys, position, here)
        if position == len(keys) - 1:
            here[slot] = _literal(keys, text)
        else:
            here = here[slot]


def _slot(here: object, key: str) -> str | int | None:
    """Where `key` leads from here, made if need be; a list can grow by one at its end."""
    if isinstance(here, dict):
        here.setdefault(key, {})
        return key
    if isinstance(here, list) and key.isdigit() and int(key) <= len(here):
        if int(key) == len(here):
            here.append({})
        return int(key)
    return None


def _no_such_place(keys: list[str], position: int, here: object) -> ConfigError:
    above = ".".join(keys[:position])
    what = f"--{'.'.join(keys)}: does not lead to a setting"
    if isinstance(here, list):
        why = f"{above} is a list of {len(here)}, so that {keys[position]!r} names none of it"
        return ConfigError(what, why, f"count from 0: --{above}.0.{keys[-1]} VALUE")
    return ConfigError(what, f"{above} is a value, not a section", f"write --{above} VALUE")


def _literal(keys: list[str], text: str) -> Any:
    """The TOML value that `text` is, else the text itself; where text is wanted, quotes are optional."""
    field = _field(keys)
    if field is not None and _is_text(field) and not text.startswith(('"', "'")):
        return text
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break could smuggle further keys in; then it is no literal.
    return value["value"] if len(value) == 1 else text


# ---- telling what is wrong


LISTS: dict[str, type[BaseModel]] = {"env": EnvSection, "env.rewards": RewardSection}
"""Lists of tables: `[[env]]` and, below one, `[[env.rewards]]`."""
TABLES: dict[str, type[BaseModel]] = {"rollout.workers": WorkerRange, "serve.limits": Limits}
"""Tables in a section, the first in place of a value."""


class Problem(NamedTuple):
    """One thing wrong with a configuration."""

    what: str
    why: str
    fix: str


def _explain(detail: ErrorDetails) -> Problem:
    location = tuple(part for part in detail["loc"] if part not in WORKER_KINDS)  # Of a union, pydantic names the kind.
    path, kind = _dotted(location), detail["type"]
    if kind == "rollcast":
        context = detail["ctx"]
        return Problem(f"{context['path']} is refused", context["why"], context["fix"])
    if kind == "extra_forbidden":
        return _unknown(location)
    if kind in ("missing", "too_short"):
        header = "[[env]] with an id" if path == "env" else path
        return Problem(f"{header} is missing", "the run needs it", f"add it. {_purpose(path)}".strip())
    if kind in ("model_type", "tuple_type"):
        header = "[[env]]" if path.startswith("env") else f"[{path}]"
        return Problem(f"{path} is not a section", f"it is {_short(detail)}", f"write {header} above its keys")
    why = re.sub(r"^(Input|String|Dictionary)\b", "it", detail["msg"])
    return Problem(f"{path} cannot be {_short(detail)}", why, f"change {path}. {_purpose(path)}".strip())


def _short(detail: ErrorDetails) -> str:
    text = repr(detail["input"])
    return text if len(text) <= 60 else f"{text[:60]}..."


def _echo(detail: ErrorDetails) -> bool:
    """Whether pydantic only repeats itself: a list whose items are wrong is called too short as well."""
    return detail["type"] == "too_short" and bool(detail["input"])


def _unknown(location: Sequence[str | int]) -> Problem:
    path, key = _dotted(location), str(location[-1])
    if location[0] == "rollout" and key in SAMPLING_KEYS:
        _, why, fix = sampling_refusal(path)
        return Problem(f"{path} is refused", why, fix)
    nearest = _nearest(location)
    why = f"rollcast has no such setting; the nearest known one is {nearest}"
    return Problem(f"{path} is not a known key", why, f"write {nearest}, or remove it")


def _nearest(location: Sequence[str | int]) -> str:
    """The known key most like the unknown one; one of the same section wins when it is about as like."""
    here, key = _dotted(location[:-1]), str(location[-1])

    def likeness(path: str) -> float:
        table, _, leaf = path.rpartition(".")
        initials = "".join(word[:1] for word in leaf.split("_"))
        alike = 1.0 if key == initials else SequenceMatcher(None, key, leaf).ratio()
        return alike + 0.3 * (bool(here) and table == here)

    return max(_known_paths(here), key=likeness)


def _known_paths(here: str) -> Iterator[str]:
    """All settings; those of the table in which the unknown key stands by its own name, numbers included."""
    yield from RunConfig.model_fields
    for name, section in _sections():
        shown = here if name == _unnumbered(here) else name.replace("env", "env.0")
        yield from (f"{shown}.{_key(*item)}" for item in section.model_fields.items())


def _unnumbered(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table of the file by its dotted name; lists of tables without their numbers."""
    for name, field in RunConfig.model_fields.items():
        annotation: Any = field.annotation
        yield name, LISTS.get(name, annotation)
        yield from ((inner, table) for inner, table in (LISTS | TABLES).items() if inner.startswith(f"{name}."))


def _key(name: str, field: FieldInfo) -> str:
    return field.alias or name


def _field(keys: Sequence[str]) -> FieldInfo | None:
    """The setting that dotted keys name, if there is one."""
    table, _, leaf = _unnumbered(_dotted(keys)).rpartition(".")
    section = dict(_sections()).get(table)
    if section is None:
        return None
    return next((field for name, field in section.model_fields.items() if _key(name, field) == leaf), None)


def _purpose(path: str) -> str:
    field = _field(path.split("."))
    if field is None:
        return ""
    default = "" if field.is_required() else f" (default {_shown(field.get_default(call_default_factory=True))})"
    return f"It is: {str(field.description).rstrip('.')}{default}."


def _dotted(location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in location)


def _is_text(field: FieldInfo) -> bool:
    annotation = field.annotation
    return annotation is str or get_origin(annotation) is Literal


# ---- the reference page


def config_reference() -> str:
    """docs/config.md: every section and key with its type, default and meaning."""
    parts = [_INTRODUCTION]
    for name, section in _sections():
        header = f"[[{name}]]" if name in LISTS else f"[{name}]"
        fields = {key: field for key, field in section.model_fields.items() if field.annotation not in TABLES.values()}
        rows = [_row(_key(*item), item[1]) for item in fields.items()]
        table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"## `{header}`\n\n{section.__doc__}\n\n{table}\n")
    return "\n".join(parts)


_INTRODUCTION = """\
# Configuration

This page is written by `rollcast.config_file.config_reference()`; a test holds it to the code.

A run reads one TOML file. Any key can be set on the command line too: `--learner.learning_rate 1e-5`,
`--env.0.kwargs.split test`; values are TOML literals, and quotes around text may be left out. An unknown
key is refused with the nearest known one. The run folder keeps the resolved settings as `config.toml`.
Required are `run.steps`, `model.path` and one `[[env]]` with an `id`. Examples are in `deploy/configs/`.
"""


def _row(key: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "file name" if key == "name" else "required"
    else:
        default = f"`{_shown(field.get_default(call_default_factory=True))}`"
    return f"| `{key}` | {_values(field)} | {default} | {field.description} |"


def _values(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    annotation = kinds[0]
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        limits = [bound for one in metadata for bound in getattr(one, "metadata", ())]
        table = ", or a table" if type(None) not in kinds else ""
        return ", ".join([_WORDS[annotation], *_bounds(limits)]) + table
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_shown(choice)}`" for choice in get_args(annotation))
    return ", ".join([_WORDS.get(annotation, "table"), *_bounds(field.metadata)])


_WORDS: dict[Any, str] = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}


def _bounds(metadata: Sequence[object]) -> Iterator[str]:
    for bound in metadata:
        match bound:
            case Ge(ge=limit):
                yield f"at least {limit}"
            case Gt(gt=limit):
                yield f"above {limit}"
            case Le(le=limit):
                yield f"at most {limit}"
            case Lt(lt=limit):
                yield f"below {limit}"


def _shown(value: object) -> str:
    """A default as the file would hold it."""
    if value is None:
        return "unset"
    return "{}" if value == {} else tomlkit.item(value).as_string()
