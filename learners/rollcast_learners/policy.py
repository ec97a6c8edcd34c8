"""The policy: a Hugging Face causal language model, and its critic.

Owns: loading a model, the packed forward pass, and which tensors a published policy consists of. Does not
know losses, advantages, optimisers or Ray.

Legend: T packed rows, N trained tokens, V vocabulary, D hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rollcast_learners import adapters, attention, sharding
from rollcast_learners.batch import NO_ROW, Batch
from rollcast_learners.compiled import compile_layers
from rollcast_learners.head import Backend, logprobs_and_entropy, scores
from rollcast_learners.settings import LoraSettings
from rollcast_learners.upload import upload

Critic = Literal["head", "separate", "none"]

# Models that change the logits after the head's matrix product need a head of their own here.
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class PolicySettings:
    """Which model, and what is put on top of it. Config -> policy."""

    path: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    critic: Critic = "head"
    trust_remote_code: bool = False
    head: Backend = "chunked"
    activation_checkpointing: bool = False
    """Whether layers keep only their inputs, and are computed again for the backward pass."""
    compile: bool = False
    """Whether layers go through torch.compile (`compiled.py`)."""
    adapter: LoraSettings | None = None
    """Low-rank adapters in place of training every weight."""


class Outputs(NamedTuple):
    """One forward pass over a batch: what the losses need, and nothing of the size of the vocabulary."""

    logprobs_N: Tensor
    entropy_N: Tensor
    normalizers_N: Tensor
    """Of the logits, tempered: `head.Scores`."""
    values_N: Tensor
    bootstrap_E: Tensor
    """Value after the last token of each truncated episode, else 0."""


class Policy(nn.Module):
    """`lm` in the compute dtype, and a value head in float32 that starts at zero, on its trunk or on one of its own.

    Raises `ValueError` for a model whose logits are not simply hidden states times the output embedding.
    """

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__()
        self.settings = settings
        config = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
        _refuse_unknown_maths(config, settings.path)
        self.lm = self._load(config)
        # A critic of its own has the language model's trunk, from the same weights, and no head on the vocabulary.
        self.value_trunk = self._load(config).base_model if settings.critic == "separate" else None
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _load(self, config: Any) -> Any:
        lm = AutoModelForCausalLM.from_pretrained(
            self.settings.path,
            config=config,
            dtype=getattr(torch, self.settings.dtype),
            attn_implementation=attention.register(),
            trust_remote_code=self.settings.trust_remote_code,
            use_safetensors=True,
        )
        lm.config.use_cache = False
        if self.settings.activation_checkpointing:
            _keep_inputs_alone(lm, self.settings.path)
        if self.settings.adapter is not None:
            adapters.inject(lm, self.settings.adapter)
        if self.settings.compile:
            compile_layers(lm, self.settings.path)
        return lm

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What passes compute in."""
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        return dtype

    @property
    def head_weight_VD(self) -> Tensor:
        weight: Tensor = self.lm.get_output_embeddings().weight
        return weight

    @property
    def has_values(self) -> bool:
        return self.settings.critic != "none"

    def hidden(self, batch: Batch, trunk: nn.Module | None = None) -> Tensor:
        """Last hidden states of all packed rows, (T, D), of the language model or of another trunk like it."""
        trunk = self.lm.base_model if trunk is None else trunk
        # A sharded policy gathers its layers in every pass, also on a rank that has nothing to pass through them.
        batch = batch if batch.tokens else batch.with_a_row()
        output = trunk(
            input_ids=self._tensor(batch.tokens_T).unsqueeze(0),
            position_ids=self._tensor(batch.positions_T).unsqueeze(0),
            use_cache=False,
            packing=attention.packing_of(batch, self.dtype, self.device),
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def forward(self, batch: Batch, temperature: float = 1.0, trunk_gradient: bool = True) -> Outputs:
        """Log-probabilities, entropies and values of the trained tokens: no head sees any other row.

        With `trunk_gradient=False` only the critic learns from what is returned (critic warm-up).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and trunk_gradient):
            hidden_TD = self.hidden(batch)
            rows_ND = hidden_TD.index_select(0, self._tensor(batch.row_N))
            targets_N = self._tensor(batch.target_N)
            found = scores(rows_ND, self.head_weight_VD, targets_N, temperature, self.settings.head)
        return Outputs(*found, *self._values(batch, hidden_TD))

    def score_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values of the trained tokens and of the truncated ends, without the head's log-probabilities."""
        return self._values(batch, None)

    def _values(self, batch: Batch, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The seam for critics: values of the states before each trained token, and after each truncated end.

        `hidden_TD` of the language model serves the head on its trunk, where somebody has it already. No gradient
        reaches the bootstrap: it is a target, not a prediction.
        """
        none_E = torch.zeros(batch.episodes, device=self.device)
        if not self.has_values:
            return torch.zeros(len(batch.row_N), device=self.device), none_E
        if self.value_trunk is not None or hidden_TD is None:
            hidden_TD = self.hidden(batch, self.value_trunk)
        values_N = self._value(hidden_TD.index_select(0, self._tensor(batch.row_N)))
        known_E = upload(batch.bootstrap_row_E != NO_ROW, self.device)
        if not bool((batch.bootstrap_row_E != NO_ROW).any()):
            return values_N, none_E
        with torch.no_grad():
            ends_ED = hidden_TD.index_select(0, self._tensor(batch.bootstrap_row_E).clamp(min=0))
            return values_N, torch.where(known_E, self._value(ends_ED), 0.0)

    def _value(self, rows_ND: Tensor) -> Tensor:
        values_N: Tensor = self.value_head(rows_ND.float()).squeeze(-1)
        return values_N.clone()  # No view: FSDP2 hooks what a pass returns, and a change of a view would lose the hook.

    def score_rows(self, token_ids_RL: Tensor) -> Tensor:
        """Log-probabilities of tokens 1..L-1 of each row at temperature 1, (R, L - 1): the probe's reference."""
        rows, length = token_ids_RL.shape
        packing = attention.Packing.of_equals(rows, length)
        with torch.no_grad():
            output = self.lm.base_model(
                input_ids=token_ids_RL.reshape(1, -1),
                position_ids=torch.arange(length, device=self.device).repeat(rows).unsqueeze(0),
                use_cache=False,
                packing=packing,
            )
            hidden_RLD = output.last_hidden_state.view(rows, length, -1)[:, :-1]
            targets = token_ids_RL[:, 1:].reshape(-1)
            logprobs, _ = logprobs_and_entropy(hidden_RLD.flatten(0, 1), self.head_weight_VD, targets)
        return logprobs.view(rows, length - 1)

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """What a published policy consists of, by name: the adapter alone, or every tensor of the language model.

        Of a sharded policy each is gathered as it is asked for, so that they are never whole all at once.
        """
        if self.settings.adapter is None:
            yield from self._stored()
        elif self.settings.adapter.publish == "adapter":
            yield from self._adapter()
        else:
            adapter = dict(self._adapter())
            stored = ((adapters.bare_name(name), tensor) for name, tensor in self._stored() if ".lora_" not in name)
            yield from adapters.merged(stored, adapter, self.settings.adapter.scale)

    def _adapter(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in adapters.trained(self.lm):
            yield name, self._whole(tensor)

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        """Named tensors of the language model, each stored tensor once (a tied head is the embedding)."""
        seen: set[int] = set()
        for name, tensor in self.lm.named_parameters():
            # Without rows here (a sharded one may have none) there is no memory to be known by.
            memory = sharding.local(tensor).data_ptr() or id(tensor)
            if memory not in seen:
                seen.add(memory)
                yield name, self._whole(tensor)

    def _whole(self, weight: Tensor) -> Tensor:
        """As passes compute with it; of a sharded policy gathered, in few bytes."""
        rows = sharding.local(weight)
        return sharding.whole(weight, rows.to(self.dtype) if rows.is_floating_point() else rows)

    def shard(self, device: torch.device) -> None:
        """Leaves this rank its rows of every weight, on `device` (`sharding.py`); all ranks call it together.

        From then on all of them make every pass together, and go through `published()` together. The value head is too
        small to spread, and stays whole.
        """
        passes = (Policy.score_values.__name__, Policy.score_rows.__name__)
        sharding.shard(self, self.dtype, device, self.value_head, passes)

    def without_adapter(self) -> "Unadapted":
        """The model that training began from, at no memory of its own."""
        return Unadapted(self)

    def _tensor(self, column: NDArray[np.int32]) -> Tensor:
        return upload(column, self.device, np.int64)


class Unadapted:
    """A policy with its adapters switched off: the reference of a run that trains adapters."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, batch: Batch, temperature: float = 1.0) -> Outputs:
        with torch.no_grad(), adapters.switched_off(self._policy.lm):
            outputs: Outputs = self._policy(batch, temperature)
        return outputs


Reference = Policy | Unadapted
"""The policy that stands still."""


def _keep_inputs_alone(lm: Any, path: str) -> None:
    """Activation checkpointing (Chen et al. 2016, arXiv 1604.06174), a layer at a time. Changes no number.

    Raises `ValueError` for a model whose layers do not know how.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"model {path!r} has no layers that can be computed again. Set learner.activation_checkpointing to false."
        )
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # transformers looks there; the layers' own parts stay in evaluation, without dropout.


def _refuse_unknown_maths(config: Any, path: str) -> None:
    changed = [name for name in LOGIT_CHANGES if getattr(config, name, None) not in (None, 1.0)]
    if changed:
        raise ValueError(
            f"model {path!r} sets {changed[0]}={getattr(config, changed[0])}: its logits are not "
            "hidden x embedding, which the learner's head computes. Choose a model without it."
        )
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if windowed or getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"model {path!r} has a sliding window or capped attention scores, which packed attention does not "
            "compute. Choose a model with plain causal attention."
        )
