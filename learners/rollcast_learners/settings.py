"""The settings of the learner, as they stand in `[learner]` and `[kl]` of a run's configuration.

Owns: names, defaults, bounds and one sentence each. Does not know files, overrides, torch or the rest
of a run.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Frozen, strict about unknown keys; the sentence below a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class LearnerSettings(Settings):
    """How the policy learns."""

    algorithm: Literal["ppo"] = "ppo"
    """The learning algorithm."""
    num_learners: int = Field(default=1, ge=0)
    """Learner processes, data parallel; 0 runs the learner inside the trainer process."""
    gpus_per_learner: float = Field(default=0, ge=0)
    """GPUs reserved for each learner."""
    cpus_per_learner: int = Field(default=1, ge=1)
    """CPU cores reserved for each learner, and its number of threads."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Questions a step; each is answered `rollout.group_size` times."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the samples of a step."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps an epoch."""
    microbatch_tokens: int = Field(default=4096, ge=1)
    """Packed rows in one forward pass: bounds memory, changes no result."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """AdamW's learning rate for the language model."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall from the end of the warm-up to the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which both learning rates rise from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay for the language model."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """The probability ratio is clipped above at 1 + clip_high."""
    normalize_advantages: Literal["batch", "group", "none"] = "batch"
    """Whitened over the batch, centred and scaled within each group of samples, or left as they are."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    critic: Literal["head", "none"] = "head"
    """A value head on the policy's trunk, or no value function at all."""
    value_learning_rate: float = Field(default=2e-4, gt=0)
    """AdamW's learning rate for the value head."""
    value_clip: float | None = Field(default=None, gt=0)
    """Clip of the value's change against the value before the update; absent means no clip."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the value head learns."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    reward_clip: float = Field(default=10.0, gt=0)
    """Rewards are clipped to plus and minus this."""
    on_length: Literal["zero", "bootstrap", "mask"] = "zero"
    """An answer cut at max_new_tokens ends with value 0, continues with the critic's, or is not trained on."""


class KLSettings(Settings):
    """Distance to the frozen policy the run started from."""

    kind: Literal["none", "k1", "k2", "k3"] = "none"
    """Estimator of the divergence; `none` loads no reference policy."""
    coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence."""
    applied_as: Literal["reward", "loss"] = Field(default="reward", alias="as")
    """Subtracted from each token's reward, or added to the loss."""
