"""Proximal policy optimisation (Schulman et al. 2017) of a language model with a critic: the essay.

Owns: one learning step, from a packed batch to an updated policy. Does not know Ray, where batches come from,
or how many learners there are: `reduce` sums a tensor over all of them and does nothing when there is one.

    step:      clip rewards -> score -> advantages -> epochs of minibatches
    minibatch: micro-batches of forward, loss, backward -> one all-reduce -> the guard's verdict -> AdamW

Deviations from the paper: the old log-probabilities are the sampling engine's own, so no pass recomputes
them; the clip is asymmetric; every loss is a sum over trained tokens divided by their number in the whole
minibatch over all learners, so that micro-batches and packing change nothing.

Legend: E episodes, N trained tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollcast_learners.advantages import NO_SPREAD, gae, group_advantages, moments, whiten
from rollcast_learners.batch import Batch
from rollcast_learners.guard import Diverged, NumericGuard, Verdict, clip_rewards
from rollcast_learners.losses import kl, policy_loss, token_mean, value_loss
from rollcast_learners.optimizer import MasterAdamW, Reduce, rate_factor
from rollcast_learners.policy import Outputs, Policy
from rollcast_learners.settings import KLSettings, LearnerSettings

KL_STOP = 10.0
"""Nats of behaviour KL a token beyond which the rest of a step is skipped: the samples no longer fit."""


def one_learner(_: Tensor) -> None:
    """The `reduce` of a learner on its own."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What the losses compare against, for all trained tokens of a batch. Fixed for the whole step."""

    values_N: Tensor
    returns_N: Tensor
    advantages_N: Tensor
    reference_N: Tensor | None
    outputs: Outputs | None
    """The forward pass that scored the batch, with its graph, when the one optimiser step can use it."""


@dataclass(frozen=True)
class StepResult:
    """Learner -> trainer. `diverged` says why the run must stop."""

    metrics: dict[str, float]
    diverged: str | None = None


class PPOLearner:
    """Policy, optimiser and guard. `total_steps` is what learning-rate schedules run down to."""

    @property
    def token_means(self) -> tuple[str, ...]:
        """Metrics of a step that are means over its trained tokens, as far as there is something to measure."""
        without_critic = () if self.policy.has_values else ("loss/value", "value_clip_fraction")
        without_reference = () if self.reference is not None else ("kl/reference",)
        return tuple(name for name in PPO_MEANS if name not in (*without_critic, *without_reference))

    def __init__(
        self,
        policy: Policy,
        settings: LearnerSettings,
        kl_settings: KLSettings,
        *,
        temperature: float,
        total_steps: int,
        seed: int = 0,
        reference: Policy | None = None,
        reduce: Reduce = one_learner,
    ) -> None:
        self.policy = policy
        self.settings = settings
        self.kl = kl_settings
        self.temperature = temperature
        self.total_steps = total_steps
        self.seed = seed
        self.reference = reference
        self.reduce = reduce
        self.optimizer = MasterAdamW(policy, settings)
        self.guard = NumericGuard()
        self.steps_done = 0
        self.rate_scale = 1.0

    def step(self, batch: Batch) -> StepResult:
        """One step on this learner's share of the samples. The same step on every learner."""
        rewards_N, clipped = clip_rewards(torch.from_numpy(batch.rewards_N.copy()), self.settings.reward_clip)
        sums = StepSums()
        scored = self._score(batch, rewards_N)
        diverged = None
        try:
            for episodes in self._minibatches(batch):
                if self._optimise(batch, episodes, scored, sums) > KL_STOP:
                    break
        except Diverged as error:
            diverged = error.reason
        metrics = self._metrics(sums, scored, batch, clipped)
        self.steps_done += 1
        return StepResult(metrics, diverged)

    def _score(self, batch: Batch, rewards_N: Tensor) -> Scored:
        """Values, reference log-probabilities and advantages under the policy as it is now."""
        settings = self.settings
        once = settings.epochs * settings.minibatches == 1 and batch.tokens <= settings.microbatch_tokens
        outputs = self._forward(batch) if once and batch.episodes else None
        values_N, bootstrap_E = self._values(batch, outputs)
        reference_N = self._reference(batch)
        if reference_N is not None and self.kl.applied_as == "reward":
            old_N = torch.from_numpy(batch.old_logprobs_N.copy())
            rewards_N = rewards_N - self.kl.coef * kl(self.kl.kind, old_N, reference_N.cpu())
        advantages_N, returns_N = self._advantages(batch, rewards_N, values_N.cpu(), bootstrap_E.cpu())
        device = self.policy.device
        return Scored(
            values_N,
            returns_N.to(device),
            self._normalized(batch, advantages_N).to(device),
            reference_N,
            outputs,
        )

    def _values(self, batch: Batch, outputs: Outputs | None) -> tuple[Tensor, Tensor]:
        if outputs is not None:
            return outputs.values_N.detach(), outputs.bootstrap_E
        device = self.policy.device
        values_N = torch.zeros(len(batch.target_N), device=device)
        bootstrap_E = torch.zeros(batch.episodes, device=device)
        for part, episodes, trained in self._parts(batch) if self.policy.has_values else ():
            with torch.no_grad():
                values_N[trained], bootstrap_E[episodes] = self.policy.score_values(part)
        return values_N, bootstrap_E

    def _reference(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        reference_N = torch.zeros(len(batch.target_N), device=self.policy.device)
        for part, _, trained in self._parts(batch):
            with torch.no_grad():
                reference_N[trained] = self.reference(part, self.temperature).logprobs_N
        return reference_N

    def _advantages(
        self, batch: Batch, rewards_N: Tensor, values_N: Tensor, bootstrap_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not batch.episodes:
            return rewards_N, rewards_N
        lengths = batch.episode_length_E.tolist()
        pairs = [
            gae(rewards_T, values_T, bootstrap, self.settings.gamma, self.settings.lam)
            for rewards_T, values_T, bootstrap in zip(
                rewards_N.split_with_sizes(lengths),
                values_N.split_with_sizes(lengths),
                bootstrap_E.tolist(),
                strict=True,
            )
        ]
        return torch.cat([a for a, _ in pairs]), torch.cat([r for _, r in pairs])

    def _normalized(self, batch: Batch, advantages_N: Tensor) -> Tensor:
        mask_N = torch.from_numpy(batch.loss_mask_N.copy())
        if self.settings.normalize_advantages == "batch":
            moments_3 = moments(advantages_N[mask_N])
            self.reduce(moments_3)
            return whiten(advantages_N, moments_3)
        if self.settings.normalize_advantages == "group":
            length_N = np.repeat(batch.episode_length_E, batch.episode_length_E)
            group_N = torch.from_numpy(np.repeat(batch.group_E, batch.episode_length_E))
            # Each episode counts once, however long: with one reward an episode this is GRPO's advantage.
            return group_advantages(advantages_N, group_N, torch.from_numpy(1.0 / length_N))
        return advantages_N

    def _minibatches(self, batch: Batch) -> Iterator[NDArray[np.intp]]:
        """Episodes of each minibatch: all learners draw the same, and each takes those it holds."""
        for epoch in range(self.settings.epochs):
            draw = np.random.default_rng([self.seed, self.steps_done, epoch])
            part_of = draw.permutation(batch.episodes_total) * self.settings.minibatches // batch.episodes_total
            for part in range(self.settings.minibatches):
                yield np.flatnonzero(part_of[batch.index_E] == part)

    def _optimise(self, batch: Batch, episodes: NDArray[np.intp], scored: Scored, sums: "StepSums") -> float:
        """One optimiser step; returns the behaviour KL a token it saw."""
        self.optimizer.clear()
        whole = scored.outputs is not None
        minibatch = batch if whole else batch.select(episodes)
        trained_of_minibatch = torch.from_numpy(batch.trained_of(episodes))
        local = StepSums()
        parts = [(batch, episodes, slice(None))] if whole else self._parts(minibatch)
        for part, _, trained in parts:
            outputs = scored.outputs if scored.outputs is not None else self._forward(part)
            at = trained_of_minibatch[trained]
            loss = self._loss(part, outputs, scored, at, local)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.accumulate(part.trained_tokens)
        norm, tokens = self.optimizer.reduce(self.reduce)
        totals = local.total(self.reduce)
        if not tokens:
            return 0.0  # Nothing to learn from: not even AdamW's momentum moves the policy.
        self._apply(norm, bool(np.isfinite(totals["loss"])))
        sums.add({**totals, "grad_norm": norm, "optimizer_steps": 1.0})
        return totals["kl/behaviour"] / tokens

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

    def _loss(self, part: Batch, outputs: Outputs, scored: Scored, at: Tensor, sums: "StepSums") -> Tensor:
        """Sum, not mean, over the part's tokens: the optimiser divides by the count over all learners."""
        settings, device = self.settings, self.policy.device
        old_N = torch.from_numpy(part.old_logprobs_N.copy()).to(device)
        mask_N = torch.from_numpy(part.loss_mask_N.copy()).to(device)
        returns_N = scored.returns_N[at]
        loss, metrics = policy_loss(
            outputs.logprobs_N,
            old_N,
            scored.advantages_N[at],
            mask_N,
            settings.clip_low,
            settings.clip_high,
            1,
        )
        metrics |= {
            "loss/policy": loss.detach(),
            "loss/entropy": token_mean(outputs.entropy_N.detach(), mask_N, 1),
        }
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * token_mean(outputs.entropy_N, mask_N, 1)
        if self.policy.has_values:
            critic, more = value_loss(outputs.values_N, scored.values_N[at], returns_N, mask_N, settings.value_clip, 1)
            loss = loss + settings.value_coef * critic
            metrics |= more | {"loss/value": critic.detach()}
        if scored.reference_N is not None:
            distance = token_mean(kl(self.kl.kind, outputs.logprobs_N, scored.reference_N[at]), mask_N, 1)
            loss = loss + self.kl.coef * distance if self.kl.applied_as == "loss" else loss
            metrics["kl/reference"] = distance.detach()
        sums.add_tensors({**metrics, "loss": loss.detach(), "tokens": mask_N.sum()})
        return loss

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, NDArray[np.intp], Tensor]]:
        """Micro-batches: (part, its episodes, its places in the N columns)."""
        for episodes in batch.microbatches(self.settings.microbatch_tokens):
            yield batch.select(episodes), episodes, torch.from_numpy(batch.trained_of(episodes))

    def _metrics(self, sums: "StepSums", scored: Scored, batch: Batch, clipped: int) -> dict[str, float]:
        """Of the whole step, over all learners. A figure that is not finite is absent."""
        totals = sums.values
        tokens, steps = max(totals["tokens"], 1.0), max(totals["optimizer_steps"], 1.0)
        clipped_everywhere = torch.tensor(float(clipped), dtype=torch.float64)
        self.reduce(clipped_everywhere)
        metrics = {
            **{name: totals[name] / tokens for name in self.token_means},
            "grad_norm": totals["grad_norm"] / steps,
            "learning_rate": self.settings.learning_rate * self.rate,
            "guard/skipped_steps": float(self.guard.skipped),
            "guard/clamped_ratios": totals["clamped"],
            "guard/clipped_rewards": clipped_everywhere.item(),
            **self._explained(scored, batch),
        }
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    def _explained(self, scored: Scored, batch: Batch) -> dict[str, float]:
        """Share of the returns' variance that the critic foresaw; absent without either."""
        mask_N = torch.from_numpy(batch.loss_mask_N.copy()).to(self.policy.device)
        errors_3 = moments((scored.returns_N - scored.values_N)[mask_N])
        returns_3 = moments(scored.returns_N[mask_N])
        self.reduce(errors_3)
        self.reduce(returns_3)
        variance, left = _variance(returns_3), _variance(errors_3)
        return {"explained_variance": 1.0 - left / variance} if self.policy.has_values and variance else {}


def _variance(moments_3: Tensor) -> float:
    """0 where what is left is rounding noise."""
    count, total, squares = moments_3.tolist()
    mean, mean_square = total / max(count, 1.0), squares / max(count, 1.0)
    variance = float(mean_square - mean**2)
    return 0.0 if variance <= NO_SPREAD * mean_square else variance


class StepSums:
    """Adds metrics up: tensors without waiting for them, then one transfer and one all-reduce."""

    def __init__(self) -> None:
        self.values: dict[str, float] = defaultdict(float)
        self._tensors: dict[str, Tensor] = {}

    def add_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            value = tensor.to(torch.float64)
            self._tensors[name] = self._tensors[name] + value if name in self._tensors else value

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values[name] += value

    def total(self, reduce: Reduce) -> dict[str, float]:
        """Sums over all learners; one whose share was empty adds zeros."""
        names = METRICS
        zero = torch.zeros((), dtype=torch.float64)
        stacked = torch.stack([self._tensors.get(name, zero).cpu() for name in names])
        reduce(stacked)
        return dict(zip(names, stacked.tolist(), strict=True))


PPO_MEANS = (
    "loss/policy",
    "loss/value",
    "loss/entropy",
    "kl/behaviour",
    "kl/reference",
    "clip_fraction",
    "value_clip_fraction",
)
METRICS = ("loss", "tokens", "clamped", "loss/supervised", *PPO_MEANS)
"""The same on every learner, whatever its share held."""
