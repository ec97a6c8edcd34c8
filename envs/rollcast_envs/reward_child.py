"""What runs in a reward's child process: loads one function of the user, calls it, and says in JSON what it returned.

Owns: finding the function, its form, and what counts as a number. Does not know deadlines, retries or weights, and
imports nothing but the standard library, so that a child starts in milliseconds. It is run as a file, by
`reward_pool.py`; nobody imports it there.

The three forms, told apart by the names of their parameters:
    - `(answer, references, **fields) -> float`, one answer a call;
    - `(answers, references, **columns) -> list[float]`, a batch;
    - `(prompts, completions, **columns) -> list[float]`, a batch as TRL's trainers call it.
Each may be `async`. A function gets those keywords that it accepts, and all of them if it takes `**`.

Messages are lines of JSON on a socket. The first carries `function`, `options` (keywords that never change) and `path`,
and is answered by `batches` or `refused`. After it each carries `calls`, and is answered by `results`, one a call:
`value`, `bad` (it returned nonsense) or `error` (it raised).
"""

import ctypes
import importlib
import importlib.util
import inspect
import json
import numbers
import os
import reprlib
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

Form = Literal["single", "batch", "trl"]
Call = dict[str, Any]
Result = dict[str, Any]

PR_SET_PDEATHSIG = 1
NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)
FORMS: dict[str, Form] = {"completions": "trl", "answers": "batch", "answer": "single"}
"""By the parameter that gives a form away; TRL's comes first, since its columns may have any name."""

CONVERSATIONAL = "conversational"
"""The option that gives a TRL function chat messages, as TRL does on conversational data, and not plain strings."""


def main() -> None:
    """Serves the socket whose number is the first argument until the parent, the second, closes it."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    os.dup2(2, 1)  # What the function prints is for people: it goes where errors go.
    die_with(parent)
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rw", encoding="utf-8", newline="\n") as lines:

        def say(message: dict[str, Any]) -> None:
            lines.write(json.dumps(message) + "\n")
            lines.flush()

        opening = json.loads(lines.readline() or "null")
        if opening is None:
            return
        sys.path[:] = opening["path"]
        try:
            reward = Reward(load(opening["function"]), opening["options"])
        except BaseException as error:  # The user's module: whatever it raises is data, SystemExit too.
            say({"refused": told(error)})
            return
        say({"batches": reward.form != "single" or reward.is_async})
        for line in lines:
            say({"results": reward.results(json.loads(line)["calls"])})


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, even if the function then hangs; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def load(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names."""
    place, _, attribute = name.rpartition(":")
    found: Any = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{attribute} is no function but {short(found)}")
    return found  # type: ignore[no-any-return]


def load_file(file: Path) -> Any:
    """The file as a module of its own name; it may import what lies beside it."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def form_of(function: Callable[..., Any]) -> Form:
    """How the function is called. Raises `TypeError` if its parameters fit none of the forms."""
    names = inspect.signature(function).parameters
    for name, form in FORMS.items():
        if name in names:
            return form
    raise TypeError(
        f"its parameters are ({', '.join(names)}); one of them must be called answer (one answer a call), "
        "answers (a batch) or completions (a batch, as TRL has it)"
    )


class Reward:
    """The user's function, and how to call it."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function = function
        self.form = form_of(function)
        self.options = {name: value for name, value in options.items() if name != CONVERSATIONAL}
        self.conversational = options.get(CONVERSATIONAL) is True
        called = getattr(function, "__call__", None)  # noqa: B004  (of an object that is called: is that async?)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
        self._runner: Any = None

    def results(self, calls: Sequence[Call]) -> list[Result]:
        """One result a call, in order. Never raises for what the function does."""
        if self.form != "single":
            return self._batch(calls)
        if self.is_async:
            return self._together(calls)
        return [self._single(call) for call in calls]

    def _single(self, call: Call) -> Result:
        try:
            return number(self._awaited(self._invoke(single_keywords(call))))
        except BaseException as error:  # The user's function: whatever it raises is data, SystemExit too.
            return {"error": told(error)}

    def _together(self, calls: Sequence[Call]) -> list[Result]:
        """An async function of one answer, awaited for all calls at once."""
        import asyncio

        async def one(call: Call) -> Result:
            try:
                return number(await self._invoke(single_keywords(call)))
            except BaseException as error:  # As above.
                return {"error": told(error)}

        async def all_of_them() -> list[Result]:
            return await asyncio.gather(*map(one, calls))

        return self._awaited(all_of_them())  # type: ignore[no-any-return]

    def _batch(self, calls: Sequence[Call]) -> list[Result]:
        keywords = trl_keywords(calls, self.conversational) if self.form == "trl" else batch_keywords(calls)
        try:
            returned = self._awaited(self._invoke(keywords))
            values = returned.tolist() if hasattr(returned, "tolist") else returned
            if isinstance(values, list | tuple) and len(values) == len(calls):
                return [number(value) for value in values]
            bad = f"returned {counted(values)} for {len(calls)} answers; expected a list of as many numbers"
            return [{"bad": bad}] * len(calls)
        except BaseException as error:  # As above.
            return [{"error": told(error) + (chat_hint(error) if self.form == "trl" else "")}] * len(calls)

    def _invoke(self, keywords: dict[str, Any]) -> Any:
        """Calls the function with what it accepts of `keywords` and of the options."""
        fields, own = keywords.pop("fields"), keywords
        given = fields | self.options | own
        parameters = inspect.signature(self.function).parameters
        missing = [
            name for name, p in parameters.items() if p.default is p.empty and p.kind in NAMED and name not in given
        ]
        if missing:
            raise TypeError(f"it needs {', '.join(missing)}, and there is only {', '.join(given)}")
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        by_position = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and name in given]
        by_name = {
            name: value
            for name, value in given.items()
            if name not in by_position and (takes_all or name in parameters)
        }
        return self.function(*(given[name] for name in by_position), **by_name)

    def _awaited(self, returned: Any) -> Any:
        """The value itself; one event loop for all calls, so that a function may keep a connection open."""
        if not inspect.isawaitable(returned):
            return returned
        import asyncio  # Costs as much as the rest of this file to load, and few functions need it.

        async def wait() -> Any:
            return await returned

        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(wait())


def single_keywords(call: Call) -> dict[str, Any]:
    """What a function of one answer may take; `fields` holds the rest, by name."""
    own = {name: call[name] for name in ("answer", "references", "question")}
    return own | {"fields": call["fields"]}


def batch_keywords(calls: Sequence[Call]) -> dict[str, Any]:
    own = {f"{name}s": [call[name] for call in calls] for name in ("answer", "question")}
    return own | {"references": [call["references"] for call in calls], "fields": columns(calls)}


def trl_keywords(calls: Sequence[Call], conversational: bool) -> dict[str, Any]:
    """As TRL's trainers call it: prompts and completions as strings or as chat messages, and columns by name."""
    sides = {"prompts": ("question", "user"), "completions": ("answer", "assistant")}
    own = {
        side: [[{"role": role, "content": call[name]}] if conversational else call[name] for call in calls]
        for side, (name, role) in sides.items()
    }
    return own | {"fields": {"references": [call["references"] for call in calls]} | columns(calls)}


def columns(calls: Sequence[Call]) -> dict[str, list[Any]]:
    """Fields by name, one value a call; None where a call lacks it."""
    names = {name: None for call in calls for name in call["fields"]}
    return {name: [call["fields"].get(name) for call in calls] for name in names}


def number(value: Any) -> Result:
    """A finite number as `value`, also a bool, or one of numpy or torch; anything else as `bad`."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, numbers.Real):
        return {"bad": f"returned {short(value)}; expected a finite number"}
    try:
        plain = float(value)
    except OverflowError:
        plain = float("inf")
    return {"value": plain} if isfinite(plain) else {"bad": f"returned {plain}; expected a finite number"}


def short(value: Any) -> str:
    """What the value is, without running its own `__repr__`."""
    if value is None:
        return "None"
    if type(value) in (str, bytes, int, float, complex, list, tuple, dict, set):
        return f"the {type(value).__name__} {reprlib.repr(value)}"
    return f"a {type(value).__name__}"


def counted(values: Any) -> str:
    return f"a {type(values).__name__} of {len(values)}" if isinstance(values, list | tuple) else short(values)


def told(error: BaseException) -> str:
    """What was raised, and the line of the user's that raised it."""
    try:
        message = " ".join(str(error).split())[:300]
    except BaseException:  # An exception of the user's own, which cannot even say what it is.
        message = ""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "<frozen" not in f.filename
    ]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}{': ' + message if message else ''}{where}"


def chat_hint(error: BaseException) -> str:
    """TRL gives strings or messages as its data has them; a function written for messages trips over strings."""
    trips = isinstance(error, TypeError) and "string indices" in str(error)
    return "; if it expects chat messages, set options = { conversational = true }" if trips else ""


if __name__ == "__main__":
    main()
