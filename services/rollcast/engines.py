"""Starting an engine from a run's settings: for rollout workers, and for the live policy.

Owns: which sampler `rollout.engine` means and what it is given. Does not know who plays or answers with it.
"""

from pathlib import Path

from rollcast.chat import ChatCodec
from rollcast.config import RunConfig
from rollcast.sampler import Sampler, ScriptedSampler
from rollcast_learners.settings import LoraSettings


async def start_engine(
    config: RunConfig,
    dtype: str,
    codec: ChatCodec,
    record: Path | None,
    *,
    concurrency: int,
    threads: int,
    reserved: int = 0,
    version: int = -1,
    seconds_per_token: float = 0.0,
) -> Sampler:
    """The run's engine on the model of `model.path`, which counts as policy `version`: -1 is none yet.

    `concurrency` and `reserved` are the rollouts and the streamed answers that a vLLM engine runs at once; `record` is
    where it notes down what would be left of it. `seconds_per_token` slows the script.
    """
    rollout, path = config.rollout, config.model.path
    if rollout.engine == "scripted":
        end, context = codec.tokenizer.eos_token_id, rollout.max_model_len
        script = ScriptedSampler(end, seconds_per_token=seconds_per_token, max_model_len=context)
        script.version = version
        return script
    if rollout.engine == "torch":
        import torch

        from rollcast.torch_sampler import TorchSampler

        torch.set_num_threads(threads)
        trusted = config.model.trust_remote_code
        slow = TorchSampler(path, dtype, rollout.max_model_len, trusted, loaded_adapter(config))
        slow.version = version
        return slow
    from rollcast.vllm_sampler import VllmSampler

    return await VllmSampler.start(
        path,
        version,
        dtype=dtype,
        max_model_len=rollout.max_model_len,
        concurrency=concurrency,
        reserved=reserved,
        tensor_parallel=rollout.tensor_parallel,
        threads=threads,
        structured=config.eval.restrict_answers,
        adapter=loaded_adapter(config),
        engine_args=rollout.engine_args,
        record=record,
    )


def loaded_adapter(config: RunConfig) -> LoraSettings | None:
    """The adapters that the engine adds itself; none where policies arrive whole."""
    return config.adapter if config.published_kind == "adapter" else None
