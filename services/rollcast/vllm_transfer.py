"""How a running vLLM engine takes over a published policy: vLLM's weight transfer, fed from the arena.

Owns: what happens inside the engine's worker processes between start and finish of an update. Does not know
when to update, what was validated, or any request. vLLM finds it by the entry point `vllm.general_plugins`,
and through `WorkerExtension` when the code came without installed metadata (Ray's `working_dir`).

Two ways lead into the model. `in place` is for what we know: plain, unquantised layers on CPU or CUDA. Their
parameters are filled by the model's own loader, and the CPU's packed copies are made again: the start of an
engine in small, at half the time of the other way. `layer by layer` is vLLM's reload, for everything else.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.platforms import current_platform

from rollcast_learners.arena import one_thread_each, open_tensors
from rollcast_learners.types import TensorEntry, Weights

BACKEND = "rollcast"
KNOWN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: the files are found by their folder."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where the segments of `version` lie on this node; plain values, as JSON would carry them."""

    version: int
    folder: str
    segments: list[str]
    manifest: list[dict[str, Any]]


def update_info(weights: Weights, folder: str) -> dict[str, Any]:
    """What `UpdateInfo` is made from, on the other side of vLLM's own transport."""
    rows = [asdict(entry) for entry in weights.manifest]
    return {
        "version": weights.version,
        "folder": folder,
        "segments": list(weights.segments),
        "manifest": rows,
    }


class RollcastTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's side of an update. A failure after its start leaves a model that must not be used."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.in_place = loads_in_place(self.model)
        self.awaited: set[str] = set()

    @torch.no_grad()
    def start_weight_update(self) -> None:
        if self.in_place:
            modules = list(self.model.named_modules())
            self.awaited = {f"{name}.weight" for name, layer in modules if unpack(layer)}
            # Where the processor packs nothing, a tensor that does not come would stay the old policy's in silence.
            self.awaited |= {name for module, layer in modules for name in parameters_of(module, layer)}
        else:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # vLLM's own version synchronises whatever the platform is, which a CPU build refuses.
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        rows = [{**row, "shape": tuple(row["shape"])} for row in update_info.manifest]
        manifest = tuple(TensorEntry(**row) for row in rows)
        segments = tuple(update_info.segments)
        weights = Weights("full", update_info.version, manifest, segments, home="", folder=update_info.folder)
        with one_thread_each():
            loaded = self.model.load_weights(open_tensors(weights, update_info.folder).items())
        # A few models do not tell what they loaded.
        self.awaited = set() if loaded is None else self.awaited - loaded

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        if self.awaited:
            raise RuntimeError(
                f"The update left {', '.join(sorted(self.awaited)[:3])} without weights, so the model is unusable. "
                "Publish every tensor of the policy, and start this engine again."
            )
        with one_thread_each():
            if not self.in_place:
                finalize_layerwise_reload(self.model, self.model_config)
            for layer in self.stale_layers():
                layer.quant_method.process_weights_after_loading(layer)

    def stale_layers(self) -> list[Any]:
        """The layers whose packed copy is still the old policy's: all of them in place, else tied heads.

        vLLM's reload packs a layer when its own weights arrive, which for a tied head is never.
        """
        if self.in_place:
            return packed_layers(self.model)
        return [layer for layer in packed_layers(self.model) if isinstance(layer, ParallelLMHead)]

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def parameters_of(module: str, layer: torch.nn.Module) -> list[str]:
    """Names of a layer's own parameters that an update brings; a head may be tied, and then none comes for it."""
    if isinstance(layer, ParallelLMHead):
        return []
    own = layer.named_parameters(recurse=False)
    return [f"{module}.{name}" for name, parameter in own if parameter.numel()]


def loads_in_place(model: torch.nn.Module) -> bool:
    """Whether every layer is one of those whose processing after a load we can repeat."""
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return False
    if hasattr(model, "process_weights_after_loading"):
        return False
    return all(_is_known(layer) for layer in model.modules())


def _is_known(layer: Any) -> bool:
    if is_deferred_attention_layer(layer) and type(layer) is not Attention:
        return False
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    # Without `cpu_linear` the CPU backend packed the weight itself in place, as it does for convolutions.
    return type(method) in KNOWN_METHODS and (hasattr(layer, "cpu_linear") or not current_platform.is_cpu())


def unpack(layer: Any) -> bool:
    """Gives a layer its parameter back, still empty, where the CPU backend dropped it for a packed copy."""
    if not hasattr(layer, "cpu_linear") or layer.weight.numel():
        return False
    described = get_layerwise_info(layer).restore_metadata[0]["weight"]
    layer.register_parameter("weight", restore_layer_refs(materialize_meta_tensor(described), layer))
    return True


def packed_layers(model: torch.nn.Module) -> list[Any]:
    """The layers that compute with a packed copy of their weight.

    Beside a head of its own an embedding only looks up: its packed copy, made at the start, is dropped here,
    so that nothing can compute with a stale one.
    """
    packed = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    if any(isinstance(layer, ParallelLMHead) for layer in packed):
        unused = [layer for layer in packed if type(layer) is VocabParallelEmbedding]
        for layer in unused:
            del layer.cpu_linear
        packed = [layer for layer in packed if layer not in unused]
    return packed


class WorkerExtension:
    """Named as `worker_extension_cls`: resolving it imports this module in every worker, which registers."""


def register() -> None:
    """The entry point; also called on import, since vLLM asks for the engine by name in each process."""
    with suppress(ValueError):  # registered in this process before
        WeightTransferEngineFactory.register_engine(BACKEND, RollcastTransfer)


register()
