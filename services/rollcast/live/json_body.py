"""A request's JSON, read strictly: what two readers could read differently, or none can hold, is refused by name.

Owns: the rules of a body's text (UTF-8, one value, no key twice, no NaN, no number beyond floating point, no half of a
surrogate pair, a bounded depth). Does not know the request's fields.
"""

import json
import math
from typing import Any

from rollcast.live.openai_errors import ApiError, field_name

DEEPEST = 32
MOST_DIGITS = 300


def read_json(body: bytes) -> Any:
    """The value that `body` holds. Raises `ApiError` (400) that names the field where it is not good JSON."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise _bad("is empty; send a JSON object")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_constant=_constant)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise _bad(f"not JSON: {error.msg} at character {error.pos}") from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ApiError(400, f"{name}: stands twice in one object", name, "duplicate_key")
            seen.add(name)
    return found


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else math.inf


def _constant(name: str) -> float:
    return math.nan  # NaN and infinities are refused below, where the field is known.


def _check(value: Any) -> None:
    """Walks without recursion: a hostile body may be as deep as it is long."""
    todo: list[tuple[Any, tuple[str | int, ...]]] = [(value, ())]
    while todo:
        here, place = todo.pop()
        if isinstance(here, dict | list):
            if len(place) >= DEEPEST:
                raise _too_deep()
            items = here.items() if isinstance(here, dict) else enumerate(here)
            for name, inner in items:
                if isinstance(name, str):
                    _check_text(name, (*place, name))
                if isinstance(inner, dict | list | str | float):
                    todo.append((inner, (*place, name)))
        elif isinstance(here, str):
            _check_text(here, place)
        elif isinstance(here, float) and not math.isfinite(here):
            raise _bad("is no finite number", place)


def _check_text(text: str, place: tuple[str | int, ...]) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad(f"half of a surrogate pair at character {error.start}", place) from None


def _too_deep() -> ApiError:
    return _bad(f"is nested more than {DEEPEST} levels deep")


def _bad(why: str, place: tuple[str | int, ...] = ()) -> ApiError:
    param = field_name(place) or "body"
    return ApiError(400, f"{param}: {why}", param, "invalid_json")
