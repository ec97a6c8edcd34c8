"""The algorithms by name: which loss each one minimises, and what it settles in `[learner]`.

Owns: one line an algorithm. Does not know torch, files or command lines: losses are named, and found in `losses.py`.

A line *presets* what the user leaves unsaid and *allows* what it can do at all; everything else of `[learner]` is the
user's. `docs/algorithms/` has a page for each: formula, paper, our deviation, when to use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

AlgorithmName = Literal[
    "ppo",
    "reinforce",
    "actor_critic",
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce++",
    "reinforce++_baseline",
    "dapo",
    "gspo",
    "cispo",
    "soft_q",
]
LossName = Literal["clipped", "score", "sequence_clipped", "clipped_weight", "path_consistency"]
Normalization = Literal["batch", "batch_mean", "group", "group_mean", "group_then_batch", "leave_one_out", "none"]

OVER_GROUPS: tuple[Normalization, ...] = ("group", "group_mean", "group_then_batch", "leave_one_out")
"""Those that compare the samples of one prompt, and learn nothing from a single one."""
CRITICS = ("head", "separate")


@dataclass(frozen=True)
class Algorithm:
    """One algorithm. Registry -> settings (presets and refusals) and learner (loss)."""

    loss: LossName
    paper: str
    presets: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `[learner]` that it brings along."""
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings whose other values contradict it."""

    @property
    def needs_reference(self) -> bool:
        """Whether its loss is measured against the frozen policy, whatever `[kl]` adds."""
        return self.loss == "path_consistency"


def _without_critic(normalize: Normalization, *others: Normalization, **presets: Any) -> dict[str, Any]:
    """Presets and bounds of an algorithm whose baseline is made of other samples."""
    return {
        "presets": {"critic": "none", "normalize_advantages": normalize, **presets},
        "allowed": {"critic": ("none",), "normalize_advantages": (normalize, *others)},
    }


ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    "ppo": Algorithm("clipped", "Schulman et al. 2017, arXiv 1707.06347"),
    "reinforce": Algorithm(
        "score",
        "Williams 1992, Machine Learning 8",
        **_without_critic("batch_mean", "none", "batch", "group", "group_mean", "group_then_batch"),
    ),
    "actor_critic": Algorithm(
        "score",
        "Mnih et al. 2016, arXiv 1602.01783 (A2C: its synchronous form)",
        presets={"normalize_advantages": "none"},
        allowed={"critic": CRITICS, "normalize_advantages": ("none", "batch", "batch_mean")},
    ),
    "grpo": Algorithm(
        "clipped",
        "Shao et al. 2024, arXiv 2402.03300",
        **_without_critic("group", clip_high=0.2, loss_mean="answers"),
    ),
    "dr_grpo": Algorithm(
        "clipped",
        "Liu et al. 2025, arXiv 2503.20783",
        **_without_critic("group_mean", clip_high=0.2, loss_mean="constant"),
    ),
    "rloo": Algorithm(
        "score", "Ahmadian et al. 2024, arXiv 2402.14740", **_without_critic("leave_one_out", loss_mean="constant")
    ),
    "reinforce++": Algorithm("clipped", "Hu et al. 2025, arXiv 2501.03262", **_without_critic("batch", clip_high=0.2)),
    "reinforce++_baseline": Algorithm(
        "clipped", "Hu et al. 2025, arXiv 2501.03262", **_without_critic("group_then_batch", clip_high=0.2)
    ),
    "dapo": Algorithm(
        "clipped",
        "Yu et al. 2025, arXiv 2503.14476",
        **_without_critic("group", clip_low=0.2, clip_high=0.28, dynamic_sampling=True),
    ),
    "gspo": Algorithm(
        "sequence_clipped",
        "Zheng et al. 2025, arXiv 2507.18071",
        **_without_critic("group", "group_mean", clip_low=3e-4, clip_high=4e-4, loss_mean="answers"),
    ),
    "cispo": Algorithm(
        "clipped_weight",
        "MiniMax 2025, arXiv 2506.13585",
        **_without_critic("group", clip_low=1.0, clip_high=1.0),
    ),
    "soft_q": Algorithm(
        "path_consistency",
        "Nachum et al. 2017, arXiv 1702.08892; Guo et al. 2021, arXiv 2106.07704",
        **_without_critic("none"),
    ),
}
