"""The settings of the learner, as they stand in `[learner]` and `[kl]` of a run's configuration.

Owns: names, defaults, bounds and one sentence each. Does not know files, overrides, torch or the rest
of a run.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollcast_learners.algorithms import ALGORITHMS, AlgorithmName, Normalization


class Settings(BaseModel):
    """Frozen, strict about unknown keys; the sentence below a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class LearnerSettings(Settings):
    """How the policy learns."""

    algorithm: AlgorithmName = "ppo"
    """The learning algorithm (docs/algorithms); it settles what a file leaves out of the other keys here."""
    num_learners: int = Field(default=1, ge=0)
    """Learner processes, data parallel (docs/learners.md); 0 runs the learner inside the trainer process."""
    sharding: Literal["none", "fsdp"] = "none"
    """Whether each learner holds the whole policy, or `fsdp`: a share of its weights, moments and gradients."""
    gpus_per_learner: float = Field(default=0, ge=0)
    """GPUs reserved for each learner."""
    cpus_per_learner: int = Field(default=1, ge=1)
    """CPU cores reserved for each learner."""
    threads: int = Field(default=0, ge=0)
    """Threads of each learner; 0 is one a reserved core, or inside the trainer one a core of the machine."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Questions a step; each is answered `rollout.group_size` times."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the samples of a step."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps an epoch."""
    microbatch_tokens: int = Field(default=4096, ge=1)
    """Packed rows in one forward pass: bounds memory, changes no result."""
    activation_checkpointing: bool = False
    """Whether layers keep only their inputs and are computed again: about a third more work for far less memory."""
    compile: bool = False
    """Whether layers go through torch.compile: faster steps after some seconds of compiling; wants a C++ compiler."""
    head: Literal["chunked", "naive", "triton"] = "chunked"
    """How log-probabilities are made: in chunks; the same by Triton kernels (NVIDIA GPU); or plainly, a yardstick."""
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
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Largest ratio that a token with a negative advantage counts with; absent means no bound."""
    loss_mean: Literal["tokens", "answers", "constant"] = "tokens"
    """Mean over all tokens; over answers of their token means; or over answers of token sums / max_new_tokens."""
    normalize_advantages: Normalization = "batch"
    """Over the batch or the samples of a prompt: minus the mean and scaled, or `_mean`: only minus the mean."""
    dynamic_sampling: bool = False
    """Whether prompts whose samples are all equally good are replaced by others, since they teach nothing."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    critic: Literal["head", "separate", "none"] = "head"
    """A value head on the policy's trunk, one on a trunk of its own (twice the memory), or no value function at all."""
    value_learning_rate: float = Field(default=2e-4, gt=0)
    """AdamW's learning rate for the critic; a separate one wants about that of the language model."""
    value_clip: float | None = Field(default=None, gt=0)
    """Clip of the value's change against the value before the update; absent means no clip."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the critic learns."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    reward_clip: float = Field(default=10.0, gt=0)
    """Rewards are clipped to plus and minus this."""
    on_length: Literal["zero", "bootstrap", "mask"] = "zero"
    """An answer cut at max_new_tokens ends with value 0, continues with the critic's, or is not trained on."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """What the algorithm brings along stands where nothing is said."""
        if isinstance(given, dict) and given.get("algorithm", "ppo") in ALGORITHMS:
            return {**ALGORITHMS[given.get("algorithm", "ppo")].presets, **given}
        return given


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraSettings(Settings):
    """Low-rank adapters (LoRA) in place of training every weight."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains every weight. Adapters want about ten times the learning rate."""
    alpha: int = Field(default=32, ge=1)
    """An adapter counts alpha / rank times."""
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = LINEAR_LAYERS
    """Ends of the names of the linear layers that get one."""
    publish: Literal["adapter", "merged"] = "adapter"
    """What workers get: the adapter alone, which their engine adds, or the model with it added."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class CorrectionSettings(Settings):
    """How samples of older policies count."""

    correction: Literal["none", "decoupled", "token_tis", "sequence_tis", "token_mask", "sequence_mask"] = "none"
    """Weight of a sample of an older policy (docs/algorithms/correction.md); none measures ratios from that policy."""
    correction_low: float = Field(default=0.5, gt=0, le=1)
    """Ratio below which token_mask leaves a token out."""
    correction_high: float = Field(default=2.0, ge=1)
    """Ratio at which the truncated weights end, and beyond which the masks leave out."""


class KLSettings(Settings):
    """Distance to the frozen policy the run started from."""

    kind: Literal["none", "k1", "k2", "k3"] = "none"
    """Estimator of the divergence; `none` loads no reference policy."""
    coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence; the temperature of soft_q."""
    target: float | None = Field(default=None, gt=0)
    """Divergence a token to which the weight adapts itself; absent leaves the weight as it is."""
    horizon: int = Field(default=10000, ge=1)
    """Samples over which an adaptive weight moves by a fifth of itself at most."""
    applied_as: Literal["reward", "loss"] = Field(default="reward", alias="as")
    """Subtracted from each token's reward, or added to the loss."""
