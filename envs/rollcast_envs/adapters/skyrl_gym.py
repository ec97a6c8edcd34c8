"""`rollcast/SkyRLGym-v0`: an environment of SkyRL-Gym's shape, given by the name of its class.

Owns: how a row of data becomes an episode of such a class, and how its messages become turns. Does not know SkyRL: it
needs no package of it, only a class with `init(prompt)` and `step(answer)`.
"""

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rollcast_envs.adapters.outside import OwnRandomness
from rollcast_envs.errors import DataError
from rollcast_envs.fields import Field
from rollcast_envs.records import open_records
from rollcast_envs.splits import portion_named
from rollcast_envs.text import TextEnv

Message = Mapping[str, str]
WANTED = (Field("prompt", "any", "what opens the episode: a text, or messages with role and content"),)
GIVE_ONE = 'name a class, such as env = "skyrl_gym.envs.gsm8k.env:GSM8kEnv"'


class SkyRLGymEnv(TextEnv):
    """Environments written for SkyRL-Gym, or of its shape: `init(prompt)`, `step(answer)`.

    For each episode the class is made anew. `init` takes messages and returns messages and a dict. `step` returns
    `observations` (messages), `reward`, `done` and `metadata`, as a dict or as an object. `close` and `get_metrics` are
    used where there are any. As in SkyRL, the class gets the row of data as `extras` if it takes that argument.

    Equal seeds choose the same row, and the constructor then draws the same numbers from `random` and `numpy.random`;
    what the class draws later is its own affair, since its steps may wait for others and so run side by side.

    The answer in the conversation stays as the model wrote it: a `postprocessed_action` has no effect. A system message
    that opens the first prompt is the system turn of all; another prompt's own opens its first turn.

    Args:
        env: the class, as "package.module:Class".
        arguments: for its constructor, such as {"env_config": {"max_turns": 3}}; `env_config` can be read by attribute.
        data: rows with a `prompt`, as for every task (a file, or one for each split); None to open all with `prompt`.
        prompt: a text, or messages, where there is no data.
        split: "train", "validation" or "test": which rows of the data.
        fields: which column is the prompt, as {"prompt": "question"}.

    Raises:
        DataError: when the class cannot be found or has another shape, or the data cannot be read.
    """

    def __init__(
        self,
        env: str = "",
        arguments: Mapping[str, Any] | None = None,
        data: str | Mapping[str, str] | None = None,
        prompt: str | Sequence[Message] = "",
        split: str = "train",
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._class = _class_of(env)
        self._arguments = dict(arguments or {})
        if isinstance(self._arguments.get("env_config"), Mapping):
            self._arguments["env_config"] = _Config(self._arguments["env_config"])
        portion_named(split)
        self.folds = data is not None
        self._rows = None if data is None else open_records(data, WANTED, split=split, fields=fields)
        self.size = None if self._rows is None else len(self._rows)
        self._prompt = prompt
        first = _messages(prompt if self._rows is None else self._rows[0]["prompt"])
        self.system_prompt = first[0]["content"] if first and first[0]["role"] == "system" else None
        self._name = env.rpartition(":")[2]
        self._played: Any = None
        self._info: dict[str, Any] = {}

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        if self._rows is None:
            row, task_id = {"prompt": self._prompt}, self._name
        else:
            row = self._rows[int(self.np_random.integers(len(self._rows))) if index is None else index]
            task_id = str(row["id"])
        self._info = {"task_id": task_id, "kind": str(row.get("kind", self._name)), "references": _references(row)}
        self.close()
        with OwnRandomness(int(self.np_random.integers(2**31)) if index is None else index).entered():
            self._played = self._class(**self._arguments_of(row))
        messages, _ = self._played.init([dict(message) for message in _messages(row["prompt"])])
        return self._opening(_messages(messages)), self._info

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        output = self._played.step(answer)
        done, reward = bool(_part(output, "done")), float(_part(output, "reward"))
        metrics = _numbers(self._metrics(output)) if done else {}
        messages = _messages(_part(output, "observations") or ())
        info = self._info | ({"metrics": metrics} if done else {})
        if messages and messages[-1]["role"] == "tool":
            info["role"] = "tool"
        return "\n".join(message["content"] for message in messages), reward, done, False, info

    def close(self) -> None:
        if self._played is not None and hasattr(self._played, "close"):
            self._played.close()
        self._played = None

    def _arguments_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        takes_row = "extras" in inspect.signature(self._class).parameters
        return {"extras": dict(row)} | self._arguments if takes_row and self._rows is not None else self._arguments

    def _opening(self, messages: Sequence[Message]) -> str:
        """The first turn as one text. Raises `DataError` for a prompt in which a model has already answered."""
        if any(message["role"] == "assistant" for message in messages):
            why = "an episode opens with the user's turn"
            raise DataError("prompt has a turn of the assistant", why, "put what it says into the user's turn")
        known = {"role": "system", "content": self.system_prompt}
        return "\n\n".join(message["content"] for message in messages if dict(message) != known)

    def _metrics(self, output: Any) -> Mapping[str, Any]:
        """The episode's own, else what the last step says."""
        own = self._played.get_metrics() if hasattr(self._played, "get_metrics") else {}
        return own or _part(output, "metadata") or {}


class _Config(dict[str, Any]):
    """Settings that are read by attribute or by key, as with the library that SkyRL uses for them."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"env_config has no {name!r}")
        return _Config(self[name]) if isinstance(self[name], Mapping) else self[name]


def _class_of(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise DataError(f"env is {name!r}", "it names no class", GIVE_ONE)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"env is {name!r}", str(error), "install its package, or correct the name") from error
    if not all(callable(getattr(found, method, None)) for method in ("init", "step")):
        raise DataError(f"env is {name!r}", "it has no methods init and step", GIVE_ONE)
    return found


def _messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    is_list = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
    if not is_list or not all(isinstance(message.get(key), str) for message in prompt for key in ("role", "content")):
        why = "it is neither a text nor a list of messages with role and content"
        raise DataError(f"{repr(prompt)[:80]} is no prompt or observation", why, "write [{role = ..., content = ...}]")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    kept = {str(key): value for key, value in values.items() if isinstance(value, bool | int | float)}
    return {key: float(value) for key, value in kept.items() if math.isfinite(value)}


def _references(row: Mapping[str, Any]) -> list[str]:
    """The right answer, where SkyRL's data sets have it."""
    spec = row.get("reward_spec")
    truth = spec.get("ground_truth") if isinstance(spec, Mapping) else None
    if isinstance(truth, str):
        return [truth]
    return [str(text) for text in truth] if isinstance(truth, Sequence) else []
