"""What a learner step costs: memory against full logits, speed against a plain Hugging Face step. Prints JSON.

    python benchmarks/learner.py [--pairs 5] [--only memory|speed] [--write]

Memory: the peak of a fresh process (VmHWM) that makes two steps on 2,048 rows at V = 49,152, all of them trained:
as we do it, the same with activation checkpointing, with a head that builds the logits in the otherwise same learner,
and as a plain step.

Speed: useful tokens a second, prompt and answer tokens of all samples, however they are stored. Ours and a plain step
(padded batch, full logits, autocast to bf16 over fp32 weights, AdamW) take turns on the same samples in one process,
and the figure is the median of the pairs' ratios. `shared` is our default, 8 samples of each prompt; `distinct` has 64
prompts, so nothing can be shared, and the rest of the gain shows. `quality` holds the two to each other in float32.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, THREADS, Turns, child, finish, machine, peak_mib

MODEL = ROOT / "models" / "smollm2-135m-instruct"
PROMPT_TOKENS, SHORTEST, LONGEST = 45, 4, 32
SAMPLES = 64
PLAIN_MICROBATCH = 16
MEMORY_ROWS, MEMORY_ANSWERS = 2048, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["memory", "speed"])
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/learner-DATE.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(options.child, options.model, options.pairs)))
        return
    with tempfile.TemporaryDirectory(prefix="rollcast-bench-") as folder:
        figures = measure(model_folder(options.model, Path(folder)), options.pairs, options.only)
    finish("learner", figures, options.write)


def measure(model: str, pairs: int, only: str | None) -> dict[str, Any]:
    figures = machine()
    in_child = partial(child, __file__, "--model", model, "--pairs", str(pairs), "--child")
    if only != "speed":
        kinds = (*SIDES, "plain")
        peaks = {kind: in_child(f"memory-{kind}")["peak_mib"] for kind in kinds}
        figures["memory"] = {
            "rows": MEMORY_ROWS,
            "peak_mib": peaks,
            "ours_over_naive_head": round(peaks["ours"] / peaks["naive"], 3),
            "ours_checkpointed_over_naive_head": round(peaks["ours_checkpointed"] / peaks["naive"], 3),
            "ours_over_plain_step": round(peaks["ours"] / peaks["plain"], 3),
            "target_ours_over_naive_head": 0.75,
        }
    if only != "memory":
        figures["speed"] = in_child("speed")
    return figures | {"load_average_after": os.getloadavg()[0]}


def run_child(name: str, model: str, pairs: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return measure_speed(model, pairs) if name == "speed" else measure_memory(name.removeprefix("memory-"), model)


def model_folder(model: str, spare: Path) -> str:
    """The real model where it lies on this machine, else random weights of its shape."""
    if (Path(model) / "model.safetensors").exists():
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(spare)
    return str(spare)


# Both sides.


def our_learner(model: str, dtype: str = "bfloat16", **settings: Any) -> Any:
    from rollcast_learners.learner import PolicyLearner
    from rollcast_learners.policy import Policy, PolicySettings
    from rollcast_learners.settings import KLSettings, LearnerSettings

    policy = Policy(PolicySettings(model, dtype, **settings))  # type: ignore[arg-type]
    return PolicyLearner(policy, LearnerSettings(), KLSettings(), temperature=1.0, total_steps=1000)


class PlainLearner:
    """PPO with a value head as one writes it first: padded, all logits, one backward pass a micro-batch."""

    def __init__(self, model: str, autocast: bool = True) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.value_head = torch.nn.Linear(self.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        groups = [{"params": list(self.model.parameters()), "lr": 3e-5}]
        groups.append({"params": list(self.value_head.parameters()), "lr": 1e-3})
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.autocast = autocast

    def forward(self, padded: dict[str, Any]) -> tuple[Any, Any]:
        """Log-probabilities and values of the padded answer tokens, (B, L - 1)."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.model(
                input_ids=padded["ids"], attention_mask=padded["seen"], use_cache=False, output_hidden_states=True
            )
        logs = torch.log_softmax(output.logits[:, :-1].float(), -1)
        logprobs = logs.gather(-1, padded["ids"][:, 1:, None]).squeeze(-1)
        return logprobs, self.value_head(output.hidden_states[-1][:, :-1].float()).squeeze(-1)

    def step(self, padded: dict[str, Any]) -> dict[str, float]:
        import torch

        self.adamw.zero_grad()
        totals = {"loss/policy": 0.0, "loss/value": 0.0}
        tokens = padded["trained"].sum()
        for start in range(0, len(padded["ids"]), PLAIN_MICROBATCH):
            part = {name: column[start : start + PLAIN_MICROBATCH] for name, column in padded.items()}
            logprobs, values = self.forward(part)
            ratio = (logprobs - part["old"]).exp()
            plain, clipped = ratio * part["advantages"], ratio.clamp(0.8, 1.28) * part["advantages"]
            policy = -(torch.minimum(plain, clipped) * part["trained"]).sum() / tokens
            value = (0.5 * (values - part["returns"]).square() * part["trained"]).sum() / tokens
            (policy + 0.1 * value).backward()
            totals["loss/policy"] += policy.item()
            totals["loss/value"] += value.item()
        torch.nn.utils.clip_grad_norm_([p for group in self.adamw.param_groups for p in group["params"]], 1.0)
        self.adamw.step()
        return totals


def samples(groups: int, count: int = SAMPLES, seed: int = 0) -> list[Any]:
    """Answers of log-normal length (median 12), random tokens, random rewards of 0 or 1."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.round(rng.lognormal(np.log(12), 0.6, count)), SHORTEST, LONGEST).astype(int)
    prompts = rng.integers(100, 49000, (groups, PROMPT_TOKENS))
    return [
        trajectory(str(n % groups), n, prompts[n % groups], rng.integers(100, 49000, length), float(rng.integers(2)))
        for n, length in enumerate(lengths)
    ]


def trajectory(group: str, number: int, prompt: Any, answer: Any, reward: float) -> Any:
    from rollcast_learners.types import Prompt, Stream, Trajectory, Turn, VersionSpan

    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    trained = np.arange(len(tokens)) >= len(prompt)
    span = VersionSpan(0, len(prompt), len(tokens))
    stream = Stream(tokens, trained, np.zeros(len(tokens), np.float32), (span,))
    turn = Turn(0, len(prompt), len(tokens), "", "", reward, "stop")
    return Trajectory(Prompt(str(number), group, "benchmark", 0), (stream,), (turn,), True, False)


def with_old_logprobs(learner: Any, trajectories: list[Any]) -> list[Any]:
    """The behaviour log-probabilities are the starting policy's own."""
    import torch

    from rollcast_learners.batch import collate

    batch = collate(trajectories)
    with torch.no_grad():
        logprobs = learner.policy(batch).logprobs_N.split_with_sizes(batch.episode_length_E.tolist())
    done = []
    for item, logprobs_T in zip(trajectories, logprobs, strict=True):
        columns = item.streams[0].logprobs_T.copy()
        columns[item.streams[0].trained_T] = logprobs_T.numpy()
        done.append(replace(item, streams=(replace(item.streams[0], logprobs_T=columns),)))
    return done


def padded(trajectories: list[Any]) -> dict[str, Any]:
    """The same samples as rectangles; advantages are the rewards, whitened over the trained tokens."""
    import torch

    longest = max(len(item.streams[0].token_ids_T) for item in trajectories)
    shape = len(trajectories), longest
    ids, seen = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    trained, old, returns = (torch.zeros(shape) for _ in range(3))
    for row, item in enumerate(trajectories):
        stream, length = item.streams[0], len(item.streams[0].token_ids_T)
        ids[row, :length] = torch.from_numpy(stream.token_ids_T.astype(np.int64))
        seen[row, :length] = 1
        trained[row, :length] = torch.from_numpy(stream.trained_T.astype(np.float32))
        old[row, :length] = torch.from_numpy(stream.logprobs_T)
        returns[row] = item.reward
    trained, old, returns = (column[:, 1:] for column in (trained, old, returns))
    mean = (returns * trained).sum() / trained.sum()
    deviation = (((returns - mean).square() * trained).sum() / trained.sum()).sqrt()
    columns = {"trained": trained, "old": old, "returns": returns, "advantages": (returns - mean) / deviation}
    return {"ids": ids, "seen": seen, **columns}


# Memory.


SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_checkpointed": {"activation_checkpointing": True},
    "naive": {"head": "naive"},
}


def measure_memory(kind: str, model: str) -> dict[str, Any]:
    from rollcast_learners.batch import collate

    rng = np.random.default_rng(0)
    length = MEMORY_ROWS // MEMORY_ANSWERS
    trajectories = [
        trajectory(str(n), n, rng.integers(100, 49000, 1), rng.integers(100, 49000, length), float(n % 2))
        for n in range(MEMORY_ANSWERS)
    ]
    if kind == "plain":
        plain, batch = PlainLearner(model), padded(trajectories)
        step: Callable[[], Any] = lambda: plain.step(batch)  # noqa: E731
    else:
        learner, packed = our_learner(model, **SIDES[kind]), collate(trajectories)
        assert packed.tokens == packed.trained_tokens == MEMORY_ROWS
        step = lambda: learner.step(packed)  # noqa: E731
    step()
    step()
    return {"peak_mib": peak_mib()}


# Speed.


def measure_speed(model: str, pairs: int) -> dict[str, Any]:
    quality = measure_quality(model)
    ours, plain = our_learner(model), PlainLearner(model)
    cases = {name: with_old_logprobs(ours, samples(groups)) for name, groups in (("shared", 8), ("distinct", SAMPLES))}
    return {"quality": quality, **{name: take_turns(ours, plain, case, pairs) for name, case in cases.items()}}


def take_turns(ours: Any, plain: PlainLearner, trajectories: list[Any], pairs: int) -> dict[str, Any]:
    from rollcast_learners.batch import collate

    rectangle = padded(trajectories)
    useful = sum(len(item.streams[0].token_ids_T) for item in trajectories)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.step(collate(trajectories)),
        "plain": lambda: plain.step(rectangle),
    }
    turns = Turns(sides, pairs)
    return {
        "samples": len(trajectories),
        "useful_tokens": useful,
        "rows_ours": collate(trajectories).tokens,
        "rows_plain": int(rectangle["ids"].numel()),
        **turns.seconds(),
        "useful_tokens_per_s": {name: round(useful / s) for name, s in turns.seconds()["wall_s"].items()},
        "ours_over_plain": turns.ratio("plain", "ours"),
        "target_ours_over_plain": 1.2,
    }


def measure_quality(model: str) -> dict[str, Any]:
    """Same samples, same weights: in float32 the two are one; in bf16, how far each is from float32."""
    import torch

    from rollcast_learners.batch import collate

    learner, plain = our_learner(model, "float32"), PlainLearner(model, autocast=False)
    trajectories = with_old_logprobs(learner, samples(2, count=16, seed=1))
    trajectories = [replace(item, streams=(shifted(item.streams[0]),)) for item in trajectories]
    batch, rectangle = collate(trajectories), padded(trajectories)
    trained = rectangle["trained"].bool()
    with torch.no_grad():
        exact = plain.forward(rectangle)[0][trained]
        ours = learner.policy(batch).logprobs_N  # In the order of the rectangle's trained places.
        half = our_learner(model).policy(batch).logprobs_N
        plain.autocast = True
        plain_half = plain.forward(rectangle)[0][trained]
        plain.autocast = False
    metrics, other = learner.step(batch).metrics, plain.step(rectangle)
    return {
        "max_logprob_difference_fp32": (ours - exact).abs().max().item(),
        "loss_difference_fp32": {name: abs(metrics[name] - value) for name, value in other.items()},
        "mean_logprob_error_bf16": {
            "ours": round((half - exact).abs().mean().item(), 5),
            "plain": round((plain_half - exact).abs().mean().item(), 5),
        },
    }


def shifted(stream: Any) -> Any:
    """Old log-probabilities a little off, so that ratios are not 1 and some are clipped."""
    noise = np.random.default_rng(len(stream.token_ids_T)).normal(0, 0.2, len(stream.token_ids_T))
    return replace(stream, logprobs_T=(stream.logprobs_T + noise * stream.trained_T).astype(np.float32))


if __name__ == "__main__":
    main()
