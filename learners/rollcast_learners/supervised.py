"""Supervised fine-tuning on references: cross-entropy on the answer's tokens, through the learner's own machinery.

Owns: that loss, and the held-out loss that tells whether it generalises. Does not know where references come from:
they arrive as trajectories whose trained tokens nobody sampled, so packing, micro-batches, optimiser, guard and
checkpoints are those of `learner.py`.

Legend: N trained tokens.
"""

import torch
from torch import Tensor

from rollcast_learners.batch import Batch
from rollcast_learners.learner import PolicyLearner, weighted_mean
from rollcast_learners.losses import token_mean
from rollcast_learners.policy import Outputs
from rollcast_learners.scoring import Scored
from rollcast_learners.sums import StepSums
from rollcast_learners.upload import upload


class SupervisedLearner(PolicyLearner):
    """Maximum likelihood, a mean over tokens or answers as `loss_mean` says."""

    reported = ("loss/supervised", "loss/entropy")

    def held_out_loss(self, batch: Batch) -> float:
        """Mean negative log-likelihood of the trained tokens, in nat, as the policy is now."""
        total = torch.zeros((), dtype=torch.float64)
        for part, _, _ in self.scorer.parts(batch):
            with torch.no_grad():
                total -= self.policy(part, 1.0).logprobs_N.sum().cpu()
        return float(total) / max(batch.trained_tokens, 1)

    def _score(self, batch: Batch, rewards_N: Tensor) -> Scored:
        """Nothing is compared against: a reference has no reward and no earlier policy."""
        none_N = torch.zeros(len(batch.target_N), device=self.policy.device)
        weights_N = self.scorer.loss_weights(batch)
        mask_N = upload(batch.loss_mask_N, self.policy.device)
        return Scored(none_N, none_N, none_N, none_N, none_N, mask_N, weights_N, None, None, None)

    def _loss(self, part: Batch, outputs: Outputs, scored: Scored, at: Tensor, sums: StepSums) -> Tensor:
        mask_N = scored.mask_N[at]
        weights_N = None if scored.weights_N is None else scored.weights_N[at]
        loss = -weighted_mean(outputs.logprobs_N, mask_N, weights_N)
        entropy = token_mean(outputs.entropy_N.detach(), mask_N, 1)
        sums.add({"loss": loss.detach(), "loss/supervised": loss.detach(), "loss/entropy": entropy})
        return loss
