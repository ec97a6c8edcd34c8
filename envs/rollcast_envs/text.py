"""The contract of a text environment: `TextSpace` and `TextEnv`.

Owns turn order, the choice of a task, and the names in `info`. Does not know what a task is about, nor
tokens: an environment sees and says text, and whoever plays it turns text into tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index as as_integer
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import CustomSpaceError, InvalidAction, ResetNeeded
from gymnasium.spaces import Text
from gymnasium.vector.utils import create_shared_memory

MAX_LENGTH = 1_000_000
SAMPLE_WORDS = ("yes", "no", "Paris", "the", "answer", "is", "42", "naïve", "東京", "Москва", "🙂", "\n")


class TextSpace(Text):
    r"""Any string of at most `max_length` characters: all of Unicode, the empty string included.

    Gymnasium's `Text` lists its characters, and by default takes neither spaces nor "".

    Example:
        >>> space = TextSpace(20)
        >>> "" in space and "Zürich\n東京 🙂" in space
        True
        >>> "x" * 21 in space or 7 in space
        False
    """

    def __init__(self, max_length: int = MAX_LENGTH, *, seed: int | np.random.Generator | None = None):
        # Unused but for a vector's empty array, which Gymnasium makes of the first character, zero times.
        super().__init__(max_length, min_length=0, charset=" ", seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Draw up to eight words; `Text`'s masks are per character and have no meaning here."""
        if mask is not None or probability is not None:
            raise ValueError(f"TextSpace.sample got mask={mask!r}, probability={probability!r}: pass neither")
        count = self.np_random.integers(9)
        words = [SAMPLE_WORDS[position] for position in self.np_random.integers(len(SAMPLE_WORDS), size=count)]
        return " ".join(words)[: self.max_length]

    def __repr__(self) -> str:
        return f"TextSpace({self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace) and self.max_length == other.max_length

    @property
    def is_np_flattenable(self) -> bool:
        """False: one place a character for the longest string would be megabytes of padding."""
        return False


@create_shared_memory.register(TextSpace)
def _refuse_shared_memory(space: TextSpace, n: int = 1, ctx: Any = None) -> None:
    raise CustomSpaceError(f"{space} has no fixed size in memory: use AsyncVectorEnv(..., shared_memory=False)")


@dataclass(frozen=True)
class Answered:
    """One episode's last answer and what it is held against. Evaluation -> `TextEnv.corpus_metrics`."""

    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class CorpusFigure:
    """A metric of all answers together, and how it was computed, in its library's own words ("" where none has any)."""

    value: float
    signature: str = ""


class TextEnv(gymnasium.Env[str, str]):
    """A conversation with a language model: observations are the user's turns, actions the model's answers.

    A subclass sets `size` (and, if it has one, `system_prompt`) and implements two methods:
    `begin`, which opens an episode on a task, and `respond`, which judges one answer.
    `reset` and `step` are Gymnasium's; they check the order of turns, so subclasses need not.

    Choosing the task:
        - `reset(seed=s)` draws it from `self.np_random`; equal seeds give equal episodes.
        - `reset(options={"index": i})` opens task i of the split, always with the same words: this is
          how evaluation visits every task once. `0 <= i < size`; an endless environment takes none.

    What ends an episode:
        - `terminated`: the task is over by its own rules. Nothing follows, so nothing is bootstrapped.
        - `truncated`: the environment cut an unfinished task short, such as at a turn limit.
        While both are False, the observation is the user's next turn; on the last step it may be "".
        An answer that ran out of tokens is not truncation in this sense: the sampler reports that.

    `info`, from `reset` and from every step:
        - `task_id` (str): names the task, the same in every process and release of the data.
        - `kind` (str): what sort of task it is, such as "capital"; figures are reported by kind.
        - `references` (list[str]): accepted answers, the preferred one first; empty if there are none.
        - `metrics` (dict[str, float]): on the step that ends the episode only, such as f1.
        - `rewards` (dict[str, float], optional): on a step, the parts of its reward by name, such as
          {"f1": 0.8, "length": -0.02}. They add up to the reward and are logged one by one.
        - `fields` (dict, optional): what reward functions of the user get by name; JSON values only.
        - `role` (str, optional): "tool" where the observation is what a tool returned; else it is the user's.

    Example:
        >>> class Echo(TextEnv):
        ...     words = ("ping", "pong")
        ...     size = 2
        ...     def begin(self, index):
        ...         self.word = self.words[self.np_random.integers(self.size) if index is None else index]
        ...         self.info = {"task_id": self.word, "kind": "echo", "references": [self.word]}
        ...         return f"Say {self.word}.", self.info
        ...     def respond(self, answer):
        ...         hit = float(answer == self.word)
        ...         return "", hit, True, False, {**self.info, "metrics": {"hit": hit}}
        >>> env = Echo()
        >>> env.reset(options={"index": 1})[0]
        'Say pong.'
        >>> env.step("pong")[1:4]
        (1.0, True, False)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium declares it this way)

    system_prompt: str | None = None
    """The system turn that opens every episode; None for none."""

    size: int | None = None
    """How many distinct tasks the split has; None when they are endless."""

    few_shot: Sequence[tuple[str, str]] = ()
    """Examples as (question, answer) that open every episode, after the system turn."""

    tools: Sequence[Mapping[str, Any]] = ()
    """Tools to call, each a JSON schema as OpenAI's chat API has it; the chat template tells the model of them."""

    choices: Sequence[str] | None = None
    """All answers there are, where they can be listed; an evaluation may restrict the policy to them."""

    folds: bool = False
    """Whether `split` may also name a part of train, as k-fold validation does (`splits.portion_named`)."""

    _episode_open = False

    def __init__(self, *, max_length: int = MAX_LENGTH) -> None:
        self.observation_space = TextSpace(max_length)
        self.action_space = TextSpace(max_length)

    @classmethod
    def corpus_metrics(cls, answered: Sequence[Answered]) -> dict[str, CorpusFigure]:
        """Metrics of many episodes together that are no mean over episodes, such as corpus BLEU; none by default."""
        return {}

    @abstractmethod
    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        """Open task `index`, or with None one drawn from `self.np_random`; return the first turn and info."""

    @abstractmethod
    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Judge one answer; return the next turn, the reward, terminated, truncated and info."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode_open = False
        observation, info = self.begin(self._index(options or {}))
        self._episode_open = True
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._episode_open:
            raise ResetNeeded(f"{self}: step() needs an open episode; call reset() first, and after each end")
        if action not in self.action_space:
            got = f"{len(action)} characters" if isinstance(action, str) else f"a {type(action).__name__}"
            raise InvalidAction(f"{self}: an answer is a str in {self.action_space}, got {got}")
        observation, reward, terminated, truncated, info = self.respond(action)
        self._episode_open = not (terminated or truncated)
        return observation, reward, terminated, truncated, info

    def _index(self, options: Mapping[str, Any]) -> int | None:
        unknown = sorted(options.keys() - {"index"})
        if unknown:
            raise ValueError(f"{self}: reset got the options {unknown}; the only one known is 'index'")
        if options.get("index") is None:
            return None
        return self._valid_index(options["index"])

    def _valid_index(self, value: Any) -> int:
        if self.size is None:
            raise ValueError(f"{self} is endless and has no task {value!r}: choose one with reset(seed=...)")
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not whole or not 0 <= as_integer(value) < self.size:
            raise ValueError(f"{self}: option 'index' is {value!r}; expected an integer from 0 to {self.size - 1}")
        return as_integer(value)
