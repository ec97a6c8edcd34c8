"""One learning step of a language model by reinforcement, whatever the algorithm: the essay.

Owns: one step, from a packed batch to an updated policy. Does not know Ray, where batches come from, or how many
learners there are: `reduce` sums a tensor over all of them and does nothing when there is one.

    step:      clip rewards -> score -> advantages -> epochs of minibatches -> figures
    minibatch: micro-batches of forward, loss, backward -> all-reduce -> the guard's verdict -> AdamW

The host waits for the device once a minibatch, for the verdict, and once more for the figures of the step.

The algorithm (`algorithms.py`) chooses the loss and, through its presets, how advantages are made (`scoring.py`); it
changes no line here. The default is proximal policy optimisation (Schulman et al. 2017) with a critic. Deviations from
that paper: the old log-probabilities are the sampling engine's own, so no pass recomputes them unless an off-policy
correction wants one; the clip is asymmetric; every loss is a sum divided by a count over the whole minibatch and all
learners, so that micro-batches and packing change nothing.

Legend: E episodes, N trained tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollcast_learners import losses, sharding
from rollcast_learners.advantages import NO_SPREAD, moments
from rollcast_learners.algorithms import ALGORITHMS, LossName
from rollcast_learners.batch import Batch
from rollcast_learners.correction import effective_share
from rollcast_learners.guard import Diverged, NumericGuard, Verdict, clip_rewards
from rollcast_learners.losses import Metrics, kl, token_mean, value_loss
from rollcast_learners.optimizer import MasterAdamW, Reduce, rate_factor
from rollcast_learners.policy import Outputs, Policy, Reference
from rollcast_learners.scoring import Scored, Scorer
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.sums import LOSS_MEANS, METRICS, TOKEN_MEANS, StepSums
from rollcast_learners.types import TokenDetails
from rollcast_learners.upload import upload

KL_STOP = 10.0
"""Nats of behaviour KL a token beyond which the rest of a step is skipped: the samples no longer fit."""
KL_ERROR_LIMIT = 0.2
"""Largest relative error that an adaptive KL weight answers to (Ziegler et al. 2019, section 2.2)."""


def one_learner(_: Tensor) -> None:
    """The `reduce` of a learner on its own."""


@dataclass(frozen=True)
class StepResult:
    """Learner -> trainer. `diverged` says why the run must stop."""

    metrics: dict[str, float]
    diverged: str | None = None
    details: tuple[TokenDetails, ...] = field(default=(), compare=False)
    """Of each learner's share."""


class StepFigures(NamedTuple):
    """What is read at the end of a step, over all learners. Moments are count, sum and sum of squares."""

    clipped_rewards: float
    errors_3: Sequence[float]
    returns_3: Sequence[float]
    effective_3: Sequence[float]
    """Zeros where there is no correction."""

    @classmethod
    def of(cls, row: Sequence[float]) -> "StepFigures":
        return cls(row[0], row[1:4], row[4:7], row[7:10])


@dataclass(frozen=True, eq=False)
class Columns:
    """What a policy loss sees of a micro-batch, one entry a trained token. Learner -> loss."""

    outputs: Outputs
    scored: Scored
    at: Tensor
    """Places of the micro-batch in the columns of `scored`."""
    mask_N: Tensor
    lengths_E: Tensor
    settings: LearnerSettings
    kl_coef: float

    @property
    def weights_N(self) -> Tensor | None:
        return None if self.scored.weights_N is None else self.scored.weights_N[self.at]

    @property
    def ratio_columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, old ones, advantages, mask."""
        scored = self.scored
        return self.outputs.logprobs_N, scored.old_logprobs_N[self.at], scored.advantages_N[self.at], self.mask_N


class PolicyLearner:
    """Policy, optimiser and guard. `total_steps` is what learning-rate schedules run down to."""

    def __init__(
        self,
        policy: Policy,
        settings: LearnerSettings,
        kl_settings: KLSettings,
        correction: CorrectionSettings | None = None,
        *,
        temperature: float,
        total_steps: int,
        answer_tokens: int = 1,
        seed: int = 0,
        reference: Reference | None = None,
        reduce: Reduce = one_learner,
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.kl = kl_settings
        self.kl_coef = kl_settings.coef
        self.temperature = temperature
        self.total_steps = total_steps
        self.seed = seed
        self.reference = reference
        self.reduce = reduce
        self.loss = LOSSES[ALGORITHMS[settings.algorithm].loss]
        correction = correction or CorrectionSettings()
        fixed = settings, kl_settings, correction, temperature, answer_tokens, reduce
        self.scorer = Scorer(policy, reference, *fixed)
        self.optimizer = MasterAdamW(policy, settings)
        self.guard = NumericGuard()
        self.steps_done = 0
        self.rate_scale = 1.0

    def step(self, batch: Batch) -> StepResult:
        """One step on this learner's share of the samples. The same step on every learner."""
        rewards_N, clipped = clip_rewards(upload(batch.rewards_N, self.policy.device), self.settings.reward_clip)
        totals: dict[str, float] = defaultdict(float)
        scored = self._score(batch, rewards_N)
        self._watched = Watched(len(batch.target_N), self.policy.device)
        diverged = None
        try:
            for episodes in self._minibatches(batch):
                if self._optimise(batch, episodes, scored, totals) > KL_STOP:
                    break
        except Diverged as error:
            diverged = error.reason
        figures, columns_4N = self._read(scored, clipped)
        metrics = self._metrics(totals, figures)
        self._adapt_kl(metrics, batch.episodes_total)
        self.steps_done += 1
        return StepResult(metrics, diverged, (TokenDetails(batch.index_E, batch.episode_length_E, *columns_4N),))

    def _score(self, batch: Batch, rewards_N: Tensor) -> Scored:
        """What the losses compare against, under the policy as it is now."""
        settings = self.settings
        # All ranks of a sharded policy make the same passes, also one whose share is smaller, or empty.
        larger = sharding.most(self.policy, int(batch.tokens > settings.microbatch_tokens))
        once = settings.epochs * settings.minibatches == 1 and not larger
        passes = batch.episodes or sharding.is_sharded(self.policy)
        outputs = self._forward(batch) if once and passes else None
        return self.scorer.score(batch, rewards_N, self.kl_coef, outputs)

    def _minibatches(self, batch: Batch) -> Iterator[NDArray[np.intp]]:
        """Episodes of each minibatch: all learners draw the same, and each takes those it holds."""
        for epoch in range(self.settings.epochs):
            draw = np.random.default_rng([self.seed, self.steps_done, epoch])
            part_of = draw.permutation(batch.episodes_total) * self.settings.minibatches // batch.episodes_total
            for part in range(self.settings.minibatches):
                yield np.flatnonzero(part_of[batch.index_E] == part)

    def _optimise(self, batch: Batch, episodes: NDArray[np.intp], scored: Scored, of_step: dict[str, float]) -> float:
        """One optimiser step; returns the behaviour KL a token it saw."""
        self.optimizer.clear()
        whole = scored.outputs is not None
        minibatch = batch if whole else batch.select(episodes)
        trained_of_minibatch = upload(batch.trained_of(episodes), self.policy.device)
        sums = StepSums(self.policy.device)
        parts = [(batch, None, slice(None))] if whole else self.scorer.parts(minibatch)
        for part, _, trained in parts:
            outputs = scored.outputs if scored.outputs is not None else self._forward(part)
            at = trained_of_minibatch[trained]
            self._watched.see(outputs.logprobs_N, at)
            loss = self._loss(part, outputs, scored, at, sums)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.accumulate(self.scorer.counted(part))
            sums.count(part.trained_tokens, part.trained_episodes)
        norm_and_count, sums_M = self.optimizer.reduce(self.reduce), sums.over_learners(self.reduce)
        norm, count, *found = torch.cat([norm_and_count, sums_M]).tolist()
        if not count:
            return 0.0  # Nothing to learn from: not even AdamW's momentum moves the policy.
        totals: dict[str, float] = dict(zip(METRICS, found, strict=True))
        self._apply(norm, bool(np.isfinite(totals["loss"])))
        for name, value in {**totals, "grad_norm": norm, "optimizer_steps": 1.0}.items():
            of_step[name] += value
        return totals["kl/behaviour"] / totals["tokens"]

    def _apply(self, norm: float, finite: bool) -> None:
        verdict = self.guard.decide(finite, norm)
        if verdict is Verdict.STEP:
            self.optimizer.step(norm, self.settings.grad_clip, self.rate, self._critic_only)
        elif verdict is Verdict.SKIP_AND_HALVE:
            self.rate_scale /= 2

    @property
    def rate(self) -> float:
        """What both learning rates are multiplied with now."""
        return self.rate_scale * rate_factor(self.settings, self.steps_done, self.total_steps)

    @property
    def _critic_only(self) -> bool:
        return self.policy.has_values and self.steps_done < self.settings.critic_warmup_steps

    def _forward(self, part: Batch) -> Outputs:
        outputs: Outputs = self.policy(part, self.temperature, trunk_gradient=not self._critic_only)
        return outputs

    def _loss(self, part: Batch, outputs: Outputs, scored: Scored, at: Tensor, sums: StepSums) -> Tensor:
        """Sum, not mean, over the part's tokens: the optimiser divides by the count over all learners."""
        settings = self.settings
        mask_N = scored.mask_N[at]
        lengths_E = upload(part.episode_length_E, self.policy.device, np.int64)
        columns = Columns(outputs, scored, at, mask_N, lengths_E, settings, self.kl_coef)
        weights_N = columns.weights_N
        loss, metrics = self.loss(columns)
        metrics |= {
            "loss/policy": loss.detach(),
            "loss/entropy": token_mean(outputs.entropy_N.detach(), mask_N, 1),
        }
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * weighted_mean(outputs.entropy_N, mask_N, weights_N)
        if self.policy.has_values:
            compared = outputs.values_N, scored.values_N[at], scored.returns_N[at], mask_N
            critic, more = value_loss(*compared, settings.value_clip, 1, weights_T=weights_N)
            loss = loss + settings.value_coef * critic
            metrics |= more | {"loss/value": critic.detach()}
        if scored.reference is not None and self.kl.kind != "none":
            distance_N = kl(self.kl.kind, outputs.logprobs_N, scored.reference.logprobs_N[at])
            if self.scorer.kl_applied_as == "loss":
                loss = loss + self.kl_coef * weighted_mean(distance_N, mask_N, weights_N)
            metrics["kl/reference"] = token_mean(distance_N.detach(), mask_N, 1)
        sums.add({**metrics, "loss": loss.detach()})
        return loss

    def _adapt_kl(self, metrics: dict[str, float], samples: int) -> None:
        """Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: proportional control in the logarithm."""
        if self.kl.target is not None and "kl/reference" in metrics:
            error = np.clip(metrics["kl/reference"] / self.kl.target - 1, -KL_ERROR_LIMIT, KL_ERROR_LIMIT)
            self.kl_coef *= float(1 + error * samples / self.kl.horizon)

    def _read(self, scored: Scored, clipped: Tensor) -> tuple[StepFigures, NDArray[np.float32]]:
        """What is left to know of a step over all learners, and the columns of `Watched`: one transfer."""
        errors_3 = moments(scored.returns_N - scored.values_N, scored.mask_N)
        returns_3 = moments(scored.returns_N, scored.mask_N)
        effective_3 = torch.zeros_like(errors_3) if scored.effective_3 is None else scored.effective_3
        figures_F = torch.cat([clipped.to(errors_3)[None], errors_3, returns_3, effective_3])
        self.reduce(figures_F)
        columns_4N = self._watched.columns(scored)
        read = torch.cat([figures_F, columns_4N.flatten()]).cpu().numpy()
        figures, columns = np.split(read, [len(figures_F)])
        return StepFigures.of(figures.tolist()), columns.reshape(columns_4N.shape).astype(np.float32)

    def _metrics(self, totals: dict[str, float], figures: StepFigures) -> dict[str, float]:
        """Of the whole step, over all learners. A figure that is not finite is absent."""
        tokens, steps = max(totals["tokens"], 1.0), max(totals["optimizer_steps"], 1.0)
        count = tokens if self.settings.loss_mean == "tokens" else max(totals["answers"], 1.0)
        metrics = {
            **{name: totals[name] / (count if name in LOSS_MEANS else tokens) for name in self.reported},
            "grad_norm": totals["grad_norm"] / steps,
            "learning_rate": self.settings.learning_rate * self.rate,
            "guard/skipped_steps": float(self.guard.skipped),
            "guard/clamped_ratios": totals["clamped"],
            "guard/clipped_rewards": figures.clipped_rewards,
        }
        variance = _variance(figures.returns_3)
        if self.policy.has_values and variance:
            metrics["explained_variance"] = 1.0 - _variance(figures.errors_3) / variance
        if any(figures.effective_3):
            metrics["correction/effective_share"] = effective_share(figures.effective_3)
        if self.kl.target is not None:
            metrics["kl/coef"] = self.kl_coef
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    @property
    def reported(self) -> tuple[str, ...]:
        """The means of a step that this learner has anything to say of."""
        silent = {"loss/supervised"}
        silent |= set() if self.policy.has_values else {"loss/value", "value_clip_fraction"}
        silent |= set() if self.kl.kind != "none" and self.reference is not None else {"kl/reference"}
        by_ratio = ALGORITHMS[self.settings.algorithm].loss != "path_consistency"
        silent |= {"soft_value"} if by_ratio else {"clip_fraction"}
        return tuple(name for name in (*LOSS_MEANS, *TOKEN_MEANS) if name not in silent)


class Watched:
    """The trained tokens of a step, as the passes see them: nothing is waited for until the step is over."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._logprobs_N = torch.zeros(tokens, device=device)
        self._push_N = torch.zeros(tokens, device=device)

    def see(self, logprobs_N: Tensor, at: Tensor) -> None:
        """One pass over the tokens at these places; its gradient is noted when it comes."""
        self._logprobs_N[at] = logprobs_N.detach()
        if logprobs_N.requires_grad:  # Not while only the critic learns.
            logprobs_N.register_hook(self._note(at))  # type: ignore[no-untyped-call]

    def _note(self, at: Tensor) -> Callable[[Tensor], None]:
        def note(gradient_N: Tensor) -> None:
            self._push_N.index_add_(0, at, -gradient_N)

        return note

    def columns(self, scored: Scored) -> Tensor:
        """Log-probability, value, advantage and push of every token, (4, N), in float64."""
        found = self._logprobs_N, scored.values_N, scored.advantages_N, self._push_N
        return torch.stack([column_N.to(torch.float64) for column_N in found])


def weighted_mean(values_N: Tensor, mask_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """Sum of weighted terms, which the optimiser divides by the count."""
    return token_mean(values_N if weights_N is None else values_N * weights_N, mask_N, 1)


def _variance(moments_3: Sequence[float]) -> float:
    """0 where what is left is rounding noise."""
    count, total, squares = moments_3
    mean, mean_square = total / max(count, 1.0), squares / max(count, 1.0)
    variance = float(mean_square - mean**2)
    return 0.0 if variance <= NO_SPREAD * mean_square else variance


# ---- the losses by name, fed from the columns of a micro-batch


def _clipped(c: Columns) -> tuple[Tensor, Metrics]:
    s = c.settings
    bounds = s.clip_low, s.clip_high, 1
    return losses.policy_loss(*c.ratio_columns, *bounds, dual_clip=s.dual_clip, weights_T=c.weights_N)


def _score(c: Columns) -> tuple[Tensor, Metrics]:
    return losses.score_loss(*c.ratio_columns, 1, weights_T=c.weights_N)


def _sequence_clipped(c: Columns) -> tuple[Tensor, Metrics]:
    s = c.settings
    bounds = c.lengths_E, s.clip_low, s.clip_high, 1
    return losses.sequence_policy_loss(*c.ratio_columns, *bounds, weights_T=c.weights_N)


def _clipped_weight(c: Columns) -> tuple[Tensor, Metrics]:
    s = c.settings
    return losses.clipped_weight_loss(*c.ratio_columns, s.clip_low, s.clip_high, 1, weights_T=c.weights_N)


def _path_consistency(c: Columns) -> tuple[Tensor, Metrics]:
    reference = c.scored.reference
    assert reference is not None, "soft_q is built with a reference"
    ours = c.outputs.logprobs_N, c.outputs.normalizers_N
    theirs = reference.logprobs_N[c.at], reference.normalizers_N[c.at]
    path = c.scored.rewards_N[c.at], c.mask_N, c.lengths_E
    rates = c.kl_coef, c.settings.gamma, 1
    loss, metrics = losses.path_consistency_loss(*ours, *theirs, *path, *rates, weights_T=c.weights_N)
    logprobs_N, old_logprobs_N, _, mask_N = c.ratio_columns
    distance_N = kl("k3", old_logprobs_N, logprobs_N.detach())
    return loss, metrics | {"kl/behaviour": token_mean(distance_N, mask_N, 1)}


LOSSES: dict[LossName, Callable[[Columns], tuple[Tensor, Metrics]]] = {
    "clipped": _clipped,
    "score": _score,
    "sequence_clipped": _sequence_clipped,
    "clipped_weight": _clipped_weight,
    "path_consistency": _path_consistency,
}
