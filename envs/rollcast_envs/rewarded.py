"""Rewards of the user on top of any text environment: what they are (`RewardSpec`), when they count (`RewardedEnv`).

Owns: the configuration of a reward, the sum of weighted parts, and what `info` tells of it. Does not know how a
function is run (`reward_pool.py`), how a server is asked (`remote_rewards.py`), nor what the built-in parts measure
(`shaping.py`).
"""

import importlib.machinery
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from rollcast_envs import reward_pool, shaping
from rollcast_envs.errors import DataError
from rollcast_envs.reward_pool import Function, Outcome, RewardCall, RewardRefused
from rollcast_envs.shaping import SHAPING

REMOTE = ("judge", "reward_model", "classifier")
MAX_RETRIES = 10
MAX_TIMEOUT_S = 3600.0
MAX_PROCESSES = 64
TOLERANCE = 1e-6

Starter = Callable[[RewardCall], Callable[[], Outcome]]
"""Starts one call, and returns what waits for its outcome."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward as it stands in a configuration. Config -> prompt -> `RewardedEnv`.

    Example:
        >>> RewardSpec.parse({"function": "repetition", "weight": -0.5, "options": {"n": 2}}).name
        'repetition'
    """

    function: str
    """A built-in one by name (of `shaping.SHAPING` or `REMOTE`), or one of the user's as `package.module:function` or
    `path/to/file.py:function`; its forms are told in `reward_child.py`."""
    name: str = ""
    """What it is called in figures; by default the last part of `function`."""
    weight: float = 1.0
    timeout_s: float = 10.0
    """Seconds that one try may take."""
    retries: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for the function, the same for every call; JSON values only."""
    processes: int = 2
    """How many children a function of the user may have."""

    @classmethod
    def parse(cls, given: "Mapping[str, Any] | RewardSpec") -> "RewardSpec":
        """Raises `DataError`. Code of the user is looked for, but not imported."""
        if isinstance(given, RewardSpec):
            return given
        table = _table(given)
        _check_types(table)
        function = table["function"]
        spec = cls(**({"name": function.rpartition(":")[2].rpartition(".")[2]} | table))
        if not ("weight" in table or not _both_ways(function)):
            why = "it may be good or bad, and nothing says which"
            raise DataError(f"reward {spec.name!r}", why, "give its weight, a negative one for a penalty")
        _check_function(spec)
        _check_numbers(spec)
        return spec

    def plain(self) -> dict[str, Any]:
        """As a mapping that JSON can hold; `parse` takes it back."""
        return asdict(self) | {"options": dict(self.options)}


class RewardedEnv(gymnasium.Wrapper[str, str, str, str], RecordConstructorArgs):
    """Adds rewards of the user to those of a text environment, on the step that ends the episode.

    Each reward sees the first observation as the question, the last answer, and `references` and `fields` of `info`
    (from `reset` if the last step names none).

    `info` then holds, besides what the environment says:
        - `rewards` (dict[str, float]): the parts of the step's reward, weighted; they add up to it exactly. The
          environment's own come first, each times `own_weight` ({"task": reward} if it names none). A reward whose name
          the environment has taken gets "_2" after it.
    and on the last step:
        - `reward_values` (dict[str, float]): what each reward said, without its weight.
        - `reward_seconds` (dict[str, float]): how long each took, waiting included.
        - `reward_error` (str), only if a reward failed: which, and what happened. The step's reward is then the
          environment's own part alone; whoever trains on it should leave the sample out.

    A reward that fails raises nothing and delays the step by (retries + 1) * timeout_s at most (and by the time to load
    its function again where a child was lost). All of them are computed at the same time.

    Args:
        env: any environment whose observations and actions are text.
        rewards: what to add, as `RewardSpec` or as a mapping with its fields.
        own_weight: what the environment's own reward counts, on every step.

    Raises:
        DataError: if a reward cannot be used, such as a function that cannot be loaded.
    """

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        rewards: Sequence[RewardSpec | Mapping[str, Any]],
        own_weight: float = 1.0,
    ) -> None:
        if not _is_finite(own_weight):
            raise DataError("own_weight", f"it is {own_weight!r}", "give a finite number")
        self.specs = tuple(RewardSpec.parse(reward) for reward in rewards)
        _check_names(self.specs)
        RecordConstructorArgs.__init__(self, rewards=[spec.plain() for spec in self.specs], own_weight=own_weight)
        gymnasium.Wrapper.__init__(self, env)
        self.own_weight = float(own_weight)
        self._starters = [starter(spec) for spec in self.specs]
        self._question = ""
        self._opening: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        self._question = observation if isinstance(observation, str) else str(observation)
        self._opening = info if isinstance(info, dict) else {}
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if not (_is_finite(reward) and isinstance(info, dict)):
            # Nonsense already, and not of a reward's making: whoever plays the environment will say so.
            return observation, reward, terminated, truncated, info  # type: ignore[return-value]
        own = {name: self.own_weight * part for name, part in _own_parts(float(reward), info).items()}
        info = info | {"rewards": own}
        if terminated or truncated:
            info |= self._judged(str(action), info, own)
        return observation, sum(info["rewards"].values()), terminated, truncated, info

    def _judged(self, answer: str, info: dict[str, Any], own: dict[str, float]) -> dict[str, Any]:
        said = {"references": [], "fields": {}} | self._opening | info
        call = RewardCall(self._question, answer, _texts(said["references"]), dict(said["fields"] or {}))
        waiting = [start(call) for start in self._starters]
        outcomes = [wait() for wait in waiting]
        for spec, outcome in zip(self.specs, outcomes, strict=True):
            reward_pool.shared().count(spec.name, outcome)
        return _summary(list(zip(self.specs, outcomes, strict=True)), own)


def _summary(judged: list[tuple[RewardSpec, Outcome]], own: dict[str, float]) -> dict[str, Any]:
    """What `info` says of the rewards."""
    values = {spec.name: outcome.value for spec, outcome in judged if outcome.value is not None}
    told: dict[str, Any] = {
        "reward_values": values,
        "reward_seconds": {spec.name: outcome.seconds for spec, outcome in judged},
    }
    errors = [f"reward {spec.name}: {outcome.error}" for spec, outcome in judged if outcome.value is None]
    parts = dict(own)
    for spec, _ in judged:
        if spec.name in values:
            parts[f"{spec.name}_2" if spec.name in own else spec.name] = spec.weight * values[spec.name]
    if not errors and not math.isfinite(sum(parts.values())):
        errors = [f"reward {judged[-1][0].name}: the weighted sum of all parts is not finite"]
    return told | ({"reward_error": "; ".join(errors), "rewards": own} if errors else {"rewards": parts})


def _own_parts(reward: float, info: dict[str, Any]) -> dict[str, float]:
    """The parts that the environment names; a difference to its reward is the part `other`."""
    parts = info.get("rewards")
    if not (isinstance(parts, dict) and parts and all(_is_finite(part) for part in parts.values())):
        return {"task": reward}
    named = {str(name): float(part) for name, part in parts.items()}
    rest = reward - sum(named.values())
    return named if abs(rest) <= TOLERANCE * max(1.0, abs(reward)) else named | {"other": rest}


def _texts(references: Any) -> list[str]:
    return [references] if isinstance(references, str) else [str(reference) for reference in references or ()]


def starter(spec: RewardSpec) -> Starter:
    """What starts one call of the reward; a function of the user is loaded first. Raises `DataError`."""
    if spec.function in REMOTE:
        return partial(_remote(spec).start, timeout_s=spec.timeout_s, retries=spec.retries)
    if spec.function in SHAPING and not SHAPING[spec.function].in_child:
        return partial(_measured, SHAPING[spec.function], spec.options)
    function = Function(_path(spec.function), spec.options, spec.processes)
    pool = reward_pool.shared()
    try:
        pool.prepare(function)
    except RewardRefused as refusal:
        raise DataError(f"reward {spec.name!r}", f"{spec.function} {refusal}", "correct the function") from refusal
    start = partial(_pooled, function, spec)
    if spec.function in SHAPING:
        _try_out(spec, start)
    return start


def _pooled(function: Function, spec: RewardSpec, call: RewardCall) -> Callable[[], Outcome]:
    # A forked process has a pool of its own, so it is asked for at each call.
    return reward_pool.shared().start(function, call, spec.timeout_s, spec.retries)


def _measured(part: shaping.Shaping, options: Mapping[str, Any], call: RewardCall) -> Callable[[], Outcome]:
    began = monotonic()
    try:
        value = part.measure(call.answer, call.references, call.fields, options)
        outcome = Outcome(value=value, seconds=monotonic() - began)
    except (TypeError, ValueError, OSError) as error:
        outcome = Outcome(error=f"raised {type(error).__name__}: {error}", seconds=monotonic() - began)
    return lambda: outcome


def _remote(spec: RewardSpec) -> Any:
    from rollcast_envs import remote_rewards  # Loads httpx, which most runs do without.

    try:
        return remote_rewards.build(spec.function, spec.options)
    except DataError as error:
        raise DataError(f"reward {spec.name!r}: {error.what}", error.why, error.fix) from error


def _path(function: str) -> str:
    """For a child: a file by its full path, and `shaping.py` without what its package loads."""
    if function in SHAPING:
        return f"{shaping.__file__}:{SHAPING[function].function.__name__}"
    place, _, attribute = function.rpartition(":")
    return f"{Path(place).absolute()}:{attribute}" if place.endswith(".py") else function


def _try_out(spec: RewardSpec, start: Starter) -> None:
    outcome = start(RewardCall("", "", [], {}))()
    if outcome.error is not None:
        raise DataError(f"reward {spec.name!r}", f"with these options it {outcome.error}", "correct its options")


def _table(given: object) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError("a reward", f"it is {given!r}", 'write a table such as { function = "file.py:function" }')
    known = [each.name for each in fields(RewardSpec)]
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            fix = f"write {near[0]!r}" if near else f"use {', '.join(known)}"
            raise DataError(f"key {key!r} of a reward", "there is no such key", fix)
    if not isinstance(given.get("function"), str):
        fix = f'give "module:function", "file.py:function" or one of {", ".join((*SHAPING, *REMOTE))}'
        raise DataError("key 'function' of a reward", f"it is {given.get('function')!r}", fix)
    return dict(given)


def _check_types(table: dict[str, Any]) -> None:
    wanted: dict[str, tuple[Any, str]] = {
        "name": (str, "a string"),
        "weight": (int | float, "a number"),
        "timeout_s": (int | float, "a number of seconds"),
        "retries": (int, "a whole number"),
        "options": (Mapping, "a table"),
        "processes": (int, "a whole number"),
    }
    for key, (kind, meaning) in wanted.items():
        if key in table and (not isinstance(table[key], kind) or isinstance(table[key], bool)):
            raise DataError(f"key {key!r} of reward {table['function']!r}", f"it is {table[key]!r}", f"give {meaning}")
    try:
        json.dumps(table.get("options", {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        what = f"options of reward {table['function']!r}"
        raise DataError(
            what, f"JSON cannot hold them ({error})", "use text, finite numbers, lists and tables"
        ) from error


def _check_numbers(spec: RewardSpec) -> None:
    checks: tuple[tuple[str, bool, str], ...] = (
        ("name", bool(spec.name.strip()), "a name"),
        ("weight", _is_finite(spec.weight), "a finite number"),
        ("timeout_s", 0 < spec.timeout_s <= MAX_TIMEOUT_S, f"seconds above 0, to {MAX_TIMEOUT_S:g}"),
        ("retries", 0 <= spec.retries <= MAX_RETRIES, f"0 to {MAX_RETRIES}"),
        ("processes", 1 <= spec.processes <= MAX_PROCESSES, f"1 to {MAX_PROCESSES}"),
    )
    for key, right, expected in checks:
        if not right:
            raise DataError(f"{key} of reward {spec.function!r}", f"it is {getattr(spec, key)!r}", f"give {expected}")


def _check_names(specs: Sequence[RewardSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise DataError("rewards", f"two are called {name!r}", "give one of them another name")


def _both_ways(function: str) -> bool:
    return function == "classifier" or (function in SHAPING and SHAPING[function].both_ways)


def _check_function(spec: RewardSpec) -> None:
    place, colon, attribute = spec.function.rpartition(":")
    what = f"reward {spec.function!r}"
    if not colon:
        _check_built_in(spec)
    elif not all(part.isidentifier() for part in attribute.split(".")):
        raise DataError(what, f"{attribute!r} is no name of a function", 'write "file.py:function"')
    elif place.endswith(".py"):
        if not Path(place).is_file():
            raise DataError(what, f"there is no file {place} in {os.getcwd()}", "correct the path")
    elif not _module_exists(place):
        fix = f"install it, put its folder on PYTHONPATH, or name its file: {place.replace('.', '/')}.py:{attribute}"
        raise DataError(what, f"no module {place!r} was found", fix)


def _check_built_in(spec: RewardSpec) -> None:
    what = f"reward {spec.function!r}"
    if spec.function in REMOTE:
        _remote(spec)
        return
    if spec.function not in SHAPING:
        near = get_close_matches(spec.function, [*SHAPING, *REMOTE], n=1)
        own = 'write "module:function" or "file.py:function" for one of your own'
        raise DataError(what, "no built-in reward has this name", f"write {near[0]!r}, or {own}" if near else own)
    part = SHAPING[spec.function]
    for option in spec.options:
        if option not in part.options:
            near = get_close_matches(option, part.options, n=1)
            fix = f"write {near[0]!r}" if near else f"use {', '.join(part.options)}"
            raise DataError(f"option {option!r} of {what}", "there is no such option", fix)
    if not part.in_child:
        document = {str(spec.options.get("document", "document")): "some words"}
        outcome = _measured(part, spec.options, RewardCall("", "some words", ["words"], document))()
        if outcome.error is not None:
            raise DataError(what, f"with these options it {outcome.error}", "correct its options")


def _module_exists(module: str) -> bool:
    """Whether Python would find it from here; nothing is imported."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    spec = importlib.machinery.PathFinder.find_spec(parts[0], [os.getcwd(), *sys.path])
    try:
        spec = spec or importlib.util.find_spec(parts[0])
    except ValueError:  # A module that runs as a script.
        return False
    for end in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), list(spec.submodule_search_locations))
    return spec is not None


def _is_finite(value: object) -> bool:
    try:
        return not isinstance(value, str | bytes) and math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
