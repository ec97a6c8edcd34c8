"""What the losses of a step compare against: values, advantages, and log-probabilities of policies that stand still.

Owns: the passes that score a batch before anything is learned from it, and the way from rewards to advantages. Does not
know losses, optimisers, or what a reward means. `docs/algorithms/` says which algorithm uses which of it.

All of it stays on the policy's device, and the host waits for none of it.

Legend: E episodes, N trained tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rollcast_learners import correction, sharding
from rollcast_learners.advantages import centre, gae_of_episodes, group_advantages, leave_one_out, moments, whiten
from rollcast_learners.algorithms import ALGORITHMS, OVER_GROUPS
from rollcast_learners.batch import Batch
from rollcast_learners.losses import answers_of, kl
from rollcast_learners.optimizer import Reduce
from rollcast_learners.policy import Outputs, Policy, Reference
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings
from rollcast_learners.upload import upload

Part = tuple[Batch, Tensor, Tensor]
"""A micro-batch, its episodes, and its places in the N columns."""


@dataclass(frozen=True, eq=False)
class Scored:
    """For all trained tokens of a batch, fixed for the whole step. Scorer -> learner."""

    values_N: Tensor
    returns_N: Tensor
    advantages_N: Tensor
    rewards_N: Tensor
    """Clipped, and less the divergence where that is a reward."""
    old_logprobs_N: Tensor
    """What ratios are measured from: the sampler's own, or with a correction the policy's as the step began."""
    mask_N: Tensor
    """Which tokens the losses see."""
    weights_N: Tensor | None
    """What each token's terms are multiplied with; None where that is 1 throughout."""
    reference: "ReferenceScores | None"
    outputs: Outputs | None
    """The forward pass that scored the batch, with its graph, when the one optimiser step can use it."""
    effective_3: Tensor | None
    """Of this learner's share, what `correction.effective_share` is made from; where there is a correction."""


@dataclass(frozen=True, eq=False)
class ReferenceScores:
    """Of the frozen policy the run started from."""

    logprobs_N: Tensor
    normalizers_N: Tensor


@dataclass(frozen=True)
class Scorer:
    """Scores batches with one policy and its reference. `answer_tokens` is the longest answer of one turn."""

    policy: Policy
    reference: Reference | None
    settings: LearnerSettings
    kl: KLSettings
    correction: CorrectionSettings
    temperature: float
    answer_tokens: int
    reduce: Reduce

    @property
    def kl_applied_as(self) -> Literal["reward", "loss"] | None:
        """Where the divergence enters; nowhere for an algorithm whose own loss is measured from the reference."""
        return None if ALGORITHMS[self.settings.algorithm].needs_reference else self.kl.applied_as

    def score(self, batch: Batch, rewards_N: Tensor, kl_coef: float, outputs: Outputs | None) -> Scored:
        """Everything under the policy as it is now. `outputs` are of its forward pass over the whole batch, if made."""
        device = self.policy.device
        values_N, bootstrap_E, proximal_N = self._policy_scores(batch, outputs)
        reference = self._reference_scores(batch)
        behaviour_N, mask_N = upload(batch.old_logprobs_N, device), upload(batch.loss_mask_N, device)
        lengths_E = upload(batch.episode_length_E, device, np.int64)
        if reference is not None and self.kl_applied_as == "reward":
            rewards_N = rewards_N - kl_coef * kl(self.kl.kind, behaviour_N, reference.logprobs_N)
        rates = self.settings.gamma, self.settings.lam
        advantages_N, returns_N = gae_of_episodes(rewards_N, values_N, bootstrap_E, lengths_E, *rates)
        corrected = None if proximal_N is None else self._corrections(proximal_N, behaviour_N, mask_N, lengths_E)
        return Scored(
            values_N=values_N,
            returns_N=returns_N,
            advantages_N=self._normalized(batch, advantages_N, mask_N, lengths_E),
            rewards_N=rewards_N,
            old_logprobs_N=behaviour_N if proximal_N is None else proximal_N,
            mask_N=mask_N,
            weights_N=_product(corrected, self.loss_weights(batch)),
            reference=reference,
            outputs=outputs,
            effective_3=None if corrected is None else moments(corrected, mask_N),
        )

    def parts(self, batch: Batch) -> Iterator[Part]:
        """The micro-batches of a batch; with a sharded policy as many on every rank, if need be empty ones."""
        device = self.policy.device
        found = batch.microbatches(self.settings.microbatch_tokens)
        missing = sharding.most(self.policy, len(found)) - len(found)
        for episodes in (*found, *[np.empty(0, np.intp)] * missing):
            yield batch.select(episodes), upload(episodes, device), upload(batch.trained_of(episodes), device)

    def loss_weights(self, batch: Batch) -> Tensor | None:
        """What makes a sum over tokens, divided by tokens or answers, the mean that `loss_mean` names."""
        if self.settings.loss_mean == "tokens":
            return None
        if self.settings.loss_mean == "constant":
            return torch.full((len(batch.target_N),), 1 / self.answer_tokens, device=self.policy.device)
        answer_N = batch.episode_of_N
        counts_E = np.bincount(answer_N, batch.loss_mask_N, batch.episodes).clip(min=1)
        return upload((1 / counts_E)[answer_N], self.policy.device, np.float32)

    def counted(self, batch: Batch) -> int:
        """What the loss is a mean over in this batch: trained tokens, or answers that have any."""
        return batch.trained_tokens if self.settings.loss_mean == "tokens" else batch.trained_episodes

    def _policy_scores(self, batch: Batch, outputs: Outputs | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, values after truncated ends, and with a correction the proximal log-probabilities."""
        corrected = self.correction.correction != "none"
        if outputs is not None:
            proximal_N = outputs.logprobs_N.detach() if corrected else None
            return outputs.values_N.detach(), outputs.bootstrap_E, proximal_N
        device, tokens = self.policy.device, len(batch.target_N)
        values_N, proximal_N = torch.zeros(tokens, device=device), torch.zeros(tokens, device=device)
        bootstrap_E = torch.zeros(batch.episodes, device=device)
        for part, episodes, trained in self.parts(batch) if corrected or self.policy.has_values else ():
            with torch.no_grad():
                if corrected:
                    found = self.policy(part, self.temperature)
                    proximal_N[trained], values_N[trained] = found.logprobs_N, found.values_N
                    bootstrap_E[episodes] = found.bootstrap_E
                else:
                    values_N[trained], bootstrap_E[episodes] = self.policy.score_values(part)
        return values_N, bootstrap_E, proximal_N if corrected else None

    def _reference_scores(self, batch: Batch) -> ReferenceScores | None:
        if self.reference is None:
            return None
        logprobs_N, normalizers_N = (torch.zeros(len(batch.target_N), device=self.policy.device) for _ in range(2))
        for part, _, trained in self.parts(batch):
            with torch.no_grad():
                found = self.reference(part, self.temperature)
                logprobs_N[trained], normalizers_N[trained] = found.logprobs_N, found.normalizers_N
        return ReferenceScores(logprobs_N, normalizers_N)

    def _corrections(self, proximal_N: Tensor, behaviour_N: Tensor, mask_N: Tensor, lengths_E: Tensor) -> Tensor:
        settings = self.correction
        columns = proximal_N, behaviour_N, mask_N, lengths_E
        return correction.weights(settings.correction, *columns, settings.correction_low, settings.correction_high)

    def _normalized(self, batch: Batch, advantages_N: Tensor, mask_N: Tensor, lengths_E: Tensor) -> Tensor:
        kind = self.settings.normalize_advantages
        if kind in OVER_GROUPS:
            advantages_N = self._over_groups(batch, advantages_N, lengths_E)
        if kind in ("batch", "batch_mean", "group_then_batch"):
            moments_3 = moments(advantages_N, mask_N)
            self.reduce(moments_3)
            advantages_N = (centre if kind == "batch_mean" else whiten)(advantages_N, moments_3)
        return advantages_N

    def _over_groups(self, batch: Batch, advantages_N: Tensor, lengths_E: Tensor) -> Tensor:
        # Each episode counts once, however long: with one reward an episode this is the advantage of the papers.
        present, number_E = np.unique(batch.group_E, return_inverse=True)
        groups, group_E = len(present), upload(number_E, advantages_N.device)
        answer_N = answers_of(lengths_E, len(advantages_N))
        share_N = 1.0 / lengths_E[answer_N].to(torch.float64)
        if self.settings.normalize_advantages == "leave_one_out":
            zeros_E = torch.zeros(batch.episodes, dtype=torch.float64, device=advantages_N.device)
            baseline_E = leave_one_out(zeros_E.index_add(0, answer_N, advantages_N * share_N), group_E, groups)
            return (advantages_N - baseline_E[answer_N]).to(advantages_N.dtype)
        scale = self.settings.normalize_advantages == "group"
        return group_advantages(advantages_N, group_E[answer_N], share_N, scale=scale, groups=groups)


def _product(one_N: Tensor | None, other_N: Tensor | None) -> Tensor | None:
    """Of weights, where None is 1 throughout."""
    if one_N is None or other_N is None:
        return other_N if one_N is None else one_N
    return one_N * other_N
