"""The nouns of rollcast: Prompt -> Trajectory -> Batch -> Weights.

Owns: what travels between processes, who makes it and who eats it. Does not know how any of it is made.
Everything here is frozen, small to import (numpy only) and safe to send to another machine.

Legend for shapes: B sequences, T packed tokens, N trained tokens, V vocabulary, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One episode to play: says what, holds no tokens. Prompt stream -> worker.

    The samples of one question share `group_id`, `seed` and everything else but `id`:
    `Prompt(id="7.3", group_id="7", env_id="rollcast/QA-v0", seed=41, kwargs={"split": "train"})`.
    """

    id: str
    group_id: str
    env_id: str
    seed: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `gymnasium.make`."""
    options: Mapping[str, Any] | None = None
    """Passed to `env.reset(options=)`."""
    env_name: str = ""
    """What this environment is called in the run's figures, where its id would not do."""
    scoring: Mapping[str, Any] | None = None
    """Reward functions of the user on top of the environment's own reward: `rewards` and `own_weight`."""

    @property
    def label(self) -> str:
        """The environment in names of metrics: `QA-v0` for `rollcast/QA-v0`."""
        return self.env_name or self.env_id.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Config -> worker -> sampler. Temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    restricted: bool = False
    """Whether the answers are restricted to the environment's `choices`, where it lists them."""
    choices: tuple[str, ...] | None = None
    """The answers there are; set by the episode for a restricted sampling. Never in training: the log-probabilities
    would be of a renormalised distribution that the learner does not compute."""


@dataclass(frozen=True)
class VersionSpan:
    """Policy `version` produced the tokens [start, end). Sampler -> stream."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Completion:
    """What the engine answered to one list of token ids. Sampler -> episode.

    `logprobs_T` are of the distribution sampled from (temperature applied); spans count from the first new
    token.
    """

    token_ids_T: NDArray[np.int32]
    logprobs_T: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens in the order in which the engine saw them; only ever appended to. Episode -> collate.

    `trained_T` marks the tokens the policy sampled; elsewhere `logprobs_T` is 0. Spans cover the sampled
    tokens.
    """

    token_ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    logprobs_T: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]


@dataclass(frozen=True)
class Turn:
    """One question and its answer: sampled tokens [start, end) of stream `stream`. Episode -> rollouts."""

    stream: int
    start: int
    end: int
    observation: str
    answer: str
    reward: float
    finish_reason: FinishReason


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode, complete even when it failed: a bad one is data, not a crash. Worker -> buffer -> collate.

    `turns[i].reward` belongs to the last token of turn i. `error` names what went wrong; such a trajectory is
    counted and never trained on.
    """

    prompt: Prompt
    streams: tuple[Stream, ...]
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    kind: str = ""
    error: str | None = None
    references: tuple[str, ...] = ()
    """Accepted answers, as the environment told them last."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of the reward by name, where the environment names them, summed over the turns."""
    reward_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each reward function of the user took."""

    @property
    def reward(self) -> float:
        """The undiscounted return of the episode."""
        return sum(turn.reward for turn in self.turns)

    @property
    def versions(self) -> tuple[int, ...]:
        """Every policy version that sampled a token here, ascending."""
        return tuple(sorted({span.version for stream in self.streams for span in stream.spans}))

    @property
    def sampled_tokens(self) -> int:
        return int(sum(int(stream.trained_T.sum()) for stream in self.streams))


@dataclass(frozen=True, eq=False)
class TokenDetails:
    """What a learning step made of each trained token, in the order in which it was sampled. Learner -> rollouts.

    The columns hold one episode after the other, `length_E` tokens each.
    """

    index_E: NDArray[np.int32]
    """Position of each episode among those of the step."""
    length_E: NDArray[np.int32]
    logprobs_N: NDArray[np.float32]
    """Under the policy as the step last saw the token, before the optimiser step that it was part of."""
    values_N: NDArray[np.float32]
    """The critic's, at the beginning of the step; 0 without one."""
    advantages_N: NDArray[np.float32]
    """Normalised."""
    push_N: NDArray[np.float32]
    """How much the loss falls with the token's log-probability: what pushed it up, or down where negative. Summed over
    the passes of the step, and not yet divided by the step's count. 0 where a clip or a mask left the token out."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` at byte `offset` of segment file `segment`. Arena -> reader."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int
    nbytes: int
    digest: str
    """blake3 of the tensor's bytes, hexadecimal; empty when the publisher was told not to digest."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed token rows and the learner's log-probabilities of their tokens 1..L-1 under one version.

    R rows of L tokens. Learner -> worker.
    """

    token_ids_RL: NDArray[np.int32]
    logprobs_RL: NDArray[np.float32]
    """Shape (R, L - 1)."""


@dataclass(frozen=True, eq=False)
class Weights:
    """One published policy, without the value head. Learner -> store -> workers and the live policy.

    `adapter` is a LoRA adapter alone, by the names of peft's files, for whoever has the model it belongs to.

    `segments` are file names below `folder` on the node `home`; each is a safetensors file of at most 1 GiB.
    """

    kind: Literal["full", "adapter"]
    version: int
    manifest: tuple[TensorEntry, ...]
    segments: tuple[str, ...]
    home: str
    folder: str
    probe: Probe | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.manifest)
