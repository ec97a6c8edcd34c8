"""What the learner alone reaches on one GPU: head, attention, step, packing. Prints JSON, with a verdict a target.

    python benchmarks/gpu_learner.py [--only head attention step-0.6b step-4b packing] [--rounds 5] [--tiny]
           [--compile] [--head chunked]

Needs torch, transformers and numpy, and nothing of Ray, vLLM or rollcast's services. Models are random weights of real
shapes: neither speed nor memory depends on their values. `--tiny` shrinks everything, so that a CPU runs it in seconds;
such figures say nothing of a GPU, and the targets then read "not measured".

Every section is a process of its own: what it breaks on becomes its reason, and the other sections go on. What does not
fit into memory becomes a row with that reason. Within a section all sides take turns, the first turn is left out, and a
ratio is the median of the turns' ratios.

Formulas, M rows, V vocabulary, D hidden, S rows of a sequence, L layers, H heads of size d, N weights of the layers:

    head       8 M D V / t               logits, logits again for the backward pass, and the gradient's two products;
                                         the naive head makes three of the four, and gets the same formula
    attention  6 H d sum(S^2) / t        QK^T and PV forward, twice that backward, half of it by causality
    step       6 N M + 6 D V M' + 6 L H d sum(S^2), M' trained rows; no recomputation counts
    MFU        step / t / peak           peak of the card in dense bf16, by its name; absent for an unknown card
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "learners"))

MIB = 2**20
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16, from the makers' data sheets; the first name that occurs in the card's."""
TURNS = 8
SECTIONS = ("head", "attention", "step-0.6b", "step-4b", "packing")
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
QWEN3 |= {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
SHAPES = {  # The config.json of Qwen3-0.6B and Qwen3-4B, as far as it concerns the shape.
    "0.6b": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}


@dataclass(frozen=True)
class Sizes:
    """What is measured; `--tiny` has another one."""

    shapes: dict[str, dict[str, Any]]
    head: tuple[int, int] = (4096, 131072)
    rows: tuple[int, ...] = (4096, 16384, 65536)
    sequence: int = 16384
    """Longest sequence, and rows of a micro-batch."""
    prompt: int = 256
    answers: tuple[int, int, int] = (64, 8, 2048)
    """How many, how many of a prompt, and the longest."""


TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
REAL = Sizes(SHAPES)
TINY = Sizes({name: shape | TINY_SHAPE for name, shape in SHAPES.items()}, (32, 512), (64, 256), 128, 16, (8, 4, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also the step with each layer compiled")
    parser.add_argument("--head", choices=["naive", "chunked", "triton"], help="of the step; triton where it can run")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(Bench(options).section(options.child)))
        return
    found = {name: child(name) for name in options.only}
    cuda = torch.cuda.is_available()
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_flops": peak_flops(),
        "torch": torch.__version__,
        "tiny": options.tiny,
        **found,
        "targets": targets(found, "" if cuda and not options.tiny else "needs a GPU and the real sizes"),
    }
    print(json.dumps(figures, indent=2))


def child(name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *sys.argv, "--child", name], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        print(done.stderr, file=sys.stderr)
        return {"reason": f"broke: {said[-1]}"}
    section: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return section


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def targets(found: dict[str, Any], unfit: str) -> list[dict[str, Any]]:
    """Each target by name: reached or not, or null with the reason."""
    wanted = (
        ("head, H 4096, V 131072: TFLOP/s", 400, ("head", "16384", "triton", "tflops")),
        ("0.6B, one 16k sequence: tokens/s", 25000, ("step-0.6b", "16384", "rl", "tokens_per_s")),
        ("0.6B, one 16k sequence: RL / supervised", 0.95, ("step-0.6b", "16384", "rl_over_supervised")),
        ("4B, one 16k sequence: MFU", 0.35, ("step-4b", "16384", "rl", "mfu")),
    )
    rows = []
    for name, at_least, path in wanted:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if unfit or value is None:
            why = unfit or "its section has no such figure; see there"
            rows.append({"name": name, "target": at_least, "reached": None, "why": f"not measured: {why}"})
        else:
            rows.append({"name": name, "target": at_least, "value": value, "reached": value >= at_least})
    return rows


class Bench:
    """One section, in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16
        self.sizes = TINY if options.tiny else REAL
        self.options = options
        torch.manual_seed(0)

    def section(self, name: str) -> dict[str, Any]:
        if name == "head":
            return self.head()
        if name == "attention":
            return self.attention()
        shape = self.sizes.shapes[name.removeprefix("step-") if name.startswith("step-") else "0.6b"]
        with tempfile.TemporaryDirectory(prefix="rollcast-gpu-") as folder:
            self.write_model(shape, folder)
            quality = self.step_quality(folder)
            rows = self.packing(folder) if name == "packing" else self.steps(shape, folder)
        return {"quality": quality, **rows}

    # ---- turns

    def take_turns(self, sides: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """Median seconds and peak memory of each side, or the reason why it has none."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = dict.fromkeys(sides, 0)
        reasons: dict[str, str] = {}
        for _ in range(self.options.rounds + 1):
            for name, step in sides.items():
                if name in reasons:
                    continue
                try:
                    spent, peak = self.timed(step)
                except torch.OutOfMemoryError as error:
                    reasons[name] = f"out of memory: {str(error).splitlines()[0]}"
                    continue
                seconds[name].append(spent)
                peaks[name] = max(peaks[name], peak)
        return {
            name: {"reason": reasons[name]}
            if name in reasons
            else {
                "seconds": median(seconds[name][1:]),
                "turns": seconds[name][1:],
                "peak_mib": round(peaks[name] / MIB) if self.device.type == "cuda" else None,
            }
            for name in sides
        }

    def timed(self, step: Callable[[], Any]) -> tuple[float, int]:
        """Seconds, and bytes allocated at the most beyond what was there before."""
        gc.collect()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin, 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before

    # ---- head

    def head(self) -> dict[str, Any]:
        from rollcast_learners.head import scores

        hidden, vocabulary = self.sizes.head
        weight_VD = self.random(vocabulary, hidden).mul_(hidden**-0.5).requires_grad_()
        rows: dict[str, Any] = {"quality": self.head_quality(weight_VD)}
        for count in self.sizes.rows:
            hidden_TD = self.random(count, hidden).requires_grad_()
            targets_T = torch.randint(vocabulary, (count,), device=self.device)

            def step(backend: Any, hidden_TD: Any = hidden_TD, targets_T: Any = targets_T) -> None:
                hidden_TD.grad = weight_VD.grad = None
                found = scores(hidden_TD, weight_VD, targets_T, backend=backend)
                (found.logprobs_T.sum() + 0.01 * found.entropy_T.sum()).backward()

            row = self.take_turns({backend: (lambda b=backend: step(b)) for backend in self.backends()})
            for side in row.values():
                if "seconds" in side:
                    side["tflops"] = 8 * count * hidden * vocabulary / side["seconds"] / 1e12
            rows[str(count)] = row
        return rows | ({} if self.device.type == "cuda" else {"triton": "not measured: needs an NVIDIA GPU"})

    def backends(self) -> tuple[Any, ...]:
        return ("naive", "chunked", "triton") if self.device.type == "cuda" else ("naive", "chunked")

    def head_quality(self, weight_VD: torch.Tensor) -> dict[str, Any]:
        """Against float64 over the same bf16 numbers: log-probabilities, and the gradient of the hidden states."""
        from rollcast_learners.head import scores

        def run(backend: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_TD = inputs[0].detach().requires_grad_()
            logprobs_T = scores(hidden_TD, inputs[1].detach(), targets_T, backend=backend).logprobs_T
            return logprobs_T.detach().double(), torch.autograd.grad(logprobs_T.sum(), hidden_TD)[0].double()

        hidden_TD = self.random(128, weight_VD.shape[1])
        targets_T = torch.randint(len(weight_VD), (128,), device=self.device)
        logprobs_T, grad_TD = run("naive", hidden_TD.double(), weight_VD.double())
        quality = {}
        for backend in self.backends():
            ours_T, ours_TD = run(backend, hidden_TD, weight_VD)
            quality[backend] = {
                "max_logprob_difference": (ours_T - logprobs_T).abs().max().item(),
                "relative_gradient_difference": ((ours_TD - grad_TD).norm() / grad_TD.norm()).item(),
            }
        return quality

    # ---- attention

    def attention(self) -> dict[str, Any]:
        """One sequence, and one prompt with several answers, as a layer of the 0.6B shape sees them."""
        shape, longest = self.sizes.shapes["0.6b"], self.sizes.sequence
        tails = 8
        cases = {"one_sequence": [longest], "shared_prompt": [longest // 2] + [longest // 2 // tails] * tails}
        rows: dict[str, Any] = {}
        for name, (prompt, *answers) in cases.items():
            batch = collated([self.samples(prompt, [length + 1 for length in answers] or [1], "0")])
            flops = 6 * shape["num_attention_heads"] * shape["head_dim"] * twice_the_pairs(prompt, answers)
            row = self.take_turns(self.attention_sides(shape, batch))
            for side in row.values():
                if "seconds" in side:
                    side["tflops"] = flops / side["seconds"] / 1e12
            rows[name] = row
        rows["quality"] = self.attention_quality(shape)
        return rows | ({} if self.device.type == "cuda" else {"flex": "not measured: no backward pass on a CPU"})

    def attention_quality(self, shape: dict[str, Any]) -> dict[str, Any]:
        """Largest difference from float64 over the same bf16 numbers, outputs of a few families."""
        from rollcast_learners import attention, attention_flex

        batch = collated([self.samples(self.sizes.prompt, [9, 70, 200], str(n)) for n in range(3)])
        heads = self.attention_heads(shape, batch)

        def output(packing: Any, heads: list[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return attention.packed_attention(torch.nn.Identity(), *heads, None, packing)[0].double()

        exact = output(attention.pieces_of(batch, torch.float64, self.device), [one.double() for one in heads])
        forms: dict[str, Any] = {"calls": attention.pieces_of(batch, self.dtype, self.device)}
        if self.device.type == "cuda":
            forms["flex"] = attention_flex.block_mask(batch, self.device)
        return {name: (output(packing, heads) - exact).abs().max().item() for name, packing in forms.items()}

    def attention_heads(self, shape: dict[str, Any], batch: Any) -> list[torch.Tensor]:
        counts = (shape["num_attention_heads"], *[shape["num_key_value_heads"]] * 2)
        return [self.random(1, count, batch.tokens, shape["head_dim"]).requires_grad_() for count in counts]

    def attention_sides(self, shape: dict[str, Any], batch: Any) -> dict[str, Callable[[], Any]]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from rollcast_learners import attention, attention_flex

        heads = self.attention_heads(shape, batch)

        def step(packing: Any) -> None:
            output, _ = attention.packed_attention(torch.nn.Identity(), *heads, None, packing)
            torch.autograd.grad(output.sum(), heads)

        def cudnn(packing: Any) -> None:
            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            with sdpa_kernel(order, set_priority=True):
                step(packing)

        pieces = attention.pieces_of(batch, self.dtype, self.device)
        sides: dict[str, Callable[[], Any]] = {"calls": lambda: step(pieces)}
        if self.device.type == "cuda":
            mask = attention_flex.block_mask(batch, self.device)
            sides |= {"calls_cudnn_first": lambda: cudnn(pieces), "flex": lambda: step(mask)}
        return sides

    # ---- step

    def steps(self, shape: dict[str, Any], folder: str) -> dict[str, Any]:
        """Every size as it is; what does not fit, once more with activation checkpointing."""
        rows = self.step_rows(shape, folder, self.sizes.rows, checkpointing=False)
        again = [int(count) for count, row in rows.items() if "reason" in row["rl"] or "reason" in row["supervised"]]
        checkpointed = self.step_rows(shape, folder, again, checkpointing=True) if again else {}
        return rows | {count: row | {"without_checkpointing": rows[count]} for count, row in checkpointed.items()}

    def step_rows(self, shape: dict[str, Any], folder: str, counts: Any, checkpointing: bool) -> dict[str, Any]:
        learner, supervised = self.learners(folder, checkpointing)
        rows = {}
        for count in counts:
            lengths = [min(count, self.sizes.sequence)] * max(1, count // self.sizes.sequence)
            batch = collated([self.samples(1, [length], str(n)) for n, length in enumerate(lengths)])
            sides: dict[str, Callable[[], Any]] = {
                "rl": lambda batch=batch: learner.step(batch),
                "supervised": lambda batch=batch: supervised.step(batch),
            }
            if self.options.compile:
                compiled = sides["rl"]
                sides = {name: as_written(learner.policy, side) for name, side in sides.items()}
                sides["rl_compiled"] = compiled
            row: dict[str, Any] = self.take_turns(sides)
            for side in row.values():
                side |= speed(side, batch.tokens, step_flops(shape, learner.policy, batch, lengths))
            row |= ratio("rl_over_supervised", row["supervised"], row["rl"])
            if self.options.compile:
                row |= ratio("compiled_over_plain", row["rl"], row["rl_compiled"])
            rows[str(count)] = row | {"sequences": len(lengths), "checkpointing": checkpointing}
        return rows

    def learners(self, folder: str, checkpointing: bool = False) -> tuple[Any, Any]:
        """Ours by reinforcement (PPO, the defaults), and by supervision: one policy and one optimiser for both."""
        from rollcast_learners.learner import PolicyLearner
        from rollcast_learners.settings import KLSettings, LearnerSettings
        from rollcast_learners.supervised import SupervisedLearner

        gc.collect()  # What an earlier learner held; the allocator gives it back where it is needed.
        policy = self.policy(folder, "bfloat16", activation_checkpointing=checkpointing, compile=self.options.compile)
        settings = LearnerSettings(microbatch_tokens=self.sizes.sequence)
        made = [
            kind(policy, settings, KLSettings(), temperature=1.0, total_steps=1000)
            for kind in (PolicyLearner, SupervisedLearner)
        ]
        made[1].optimizer = made[0].optimizer
        return made[0], made[1]

    def policy(self, folder: str, dtype: str, **settings: Any) -> Any:
        from rollcast_learners.policy import Policy, PolicySettings

        return Policy(PolicySettings(folder, dtype, head=self.head_backend, **settings)).to(self.device)

    @property
    def head_backend(self) -> Any:
        return self.options.head or ("triton" if self.device.type == "cuda" else "chunked")

    def write_model(self, shape: dict[str, Any], folder: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = dict(shape)
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        with self.device:
            AutoModelForCausalLM.from_config(config, dtype=self.dtype).save_pretrained(folder)

    def step_quality(self, folder: str) -> dict[str, Any]:
        """Log-probabilities of one sequence in bf16, against the same weights in float32."""
        batch = collated([self.samples(self.sizes.prompt, [self.sizes.prompt], "0")])
        found = []
        for dtype in ("bfloat16", "float32"):
            with torch.no_grad():
                found.append(self.policy(folder, dtype)(batch).logprobs_N)
        gap_N = (found[0] - found[1]).abs()
        return {"max_logprob_difference": gap_N.max().item(), "mean_logprob_difference": gap_N.mean().item()}

    # ---- packing

    def packing(self, folder: str) -> dict[str, Any]:
        """The same samples padded to the longest, packed, and packed with each prompt once."""
        learner, _ = self.learners(folder)
        batches = self.forms(self.sizes.answers[0])
        useful = batches["packed"].tokens
        row: dict[str, Any] = self.take_turns(
            {name: lambda batch=batch: learner.step(batch) for name, batch in batches.items()}
        )
        for name, side in row.items():
            side |= speed(side, useful, None) | {"rows": batches[name].tokens}
        row |= ratio("packed_over_padded", row["padded"], row["packed"])
        row |= ratio("shared_over_padded", row["padded"], row["shared"])
        return row | {"useful_tokens": useful, "agreement": self.agreement(learner.policy)}

    def forms(self, count: int) -> dict[str, Any]:
        """The same answers, of log-normal length, as three batches."""
        from rollcast_learners.batch import collate

        _, group, longest = self.sizes.answers
        drawn = np.random.default_rng(0).lognormal(np.log(longest / 8), 0.8, count)
        lengths = np.clip(np.round(drawn), 2, longest).astype(int).tolist()
        items = [
            item
            for first in range(0, count, group)
            for item in self.samples(self.sizes.prompt, lengths[first : first + group], str(first))
        ]
        alone = [collate([item]) for item in items]
        longest = max(batch.tokens for batch in alone)
        batches = {"padded": side_by_side(alone, longest), "packed": side_by_side(alone), "shared": collate(items)}
        same = {"group_E": batches["shared"].group_E}
        return {name: replace(batch, **same) for name, batch in batches.items()}

    def agreement(self, policy: Any) -> dict[str, float]:
        """Largest difference of a log-probability from the padded form, over the first samples."""
        with torch.no_grad():
            found = {name: policy(batch).logprobs_N for name, batch in self.forms(self.sizes.answers[1]).items()}
        return {n: (found[n] - found["padded"]).abs().max().item() for n in ("packed", "shared")}

    # ---- inputs

    def samples(self, prompt: int, answers: list[int], group: str) -> list[Any]:
        """Random tokens: answers of these lengths to one prompt, drawn from a policy that knows nothing.

        Rewards are random and several an answer, so that no advantage is zero: a card multiplies zeros faster.
        """
        from rollcast_learners.types import Prompt, Stream, Trajectory, Turn, VersionSpan

        rng = np.random.default_rng([prompt, *group.encode()])
        vocabulary = self.sizes.shapes["0.6b"]["vocab_size"]
        asked = rng.integers(0, vocabulary, prompt)
        items = []
        for number, length in enumerate(answers):
            ends = np.linspace(prompt, prompt + length, TURNS + 1).astype(int).tolist()
            tokens = np.concatenate([asked, rng.integers(0, vocabulary, length)]).astype(np.int32)
            trained = np.arange(len(tokens)) >= prompt
            logprobs = np.where(trained, -np.log(vocabulary), 0).astype(np.float32)
            stream = Stream(tokens, trained, logprobs, (VersionSpan(0, prompt, len(tokens)),))
            turns = [Turn(0, start, end, "", "", rng.normal(), "stop") for start, end in pairwise(ends)]
            items.append(Trajectory(Prompt(f"{group}.{number}", group, "gpu", 0), (stream,), tuple(turns), True, False))
        return items

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def collated(groups: list[list[Any]]) -> Any:
    from rollcast_learners.batch import collate

    return collate([item for items in groups for item in items])


def side_by_side(alone: list[Any], length: int = 0) -> Any:
    """Batches of one episode each as one batch in which nothing is shared; each padded to `length` rows, if that is
    more. Padding is rows of which nothing is asked."""
    from rollcast_learners.batch import NO_ROW

    rows = [max(batch.tokens, length) for batch in alone]
    starts = (np.cumsum(rows) - rows).astype(np.int32)
    fresh = [np.pad(batch.tokens_T, (0, count - batch.tokens)) for batch, count in zip(alone, rows, strict=True)]
    columns = {
        "tokens_T": np.concatenate(fresh),
        "positions_T": np.concatenate([np.arange(count, dtype=np.int32) for count in rows]),
        "segment_length_S": np.array(rows, np.int32),
        "segment_above_S": np.full(len(alone), NO_ROW, np.int32),
        "stream_segment_L": np.arange(len(alone), dtype=np.int32),
        "stream_episode_L": np.arange(len(alone), dtype=np.int32),
        "row_N": np.concatenate([batch.row_N + start for batch, start in zip(alone, starts, strict=True)]),
        "bootstrap_row_E": np.full(len(alone), NO_ROW, np.int32),
        "index_E": np.arange(len(alone), dtype=np.int32),
        "episodes_total": len(alone),
    }
    others = ("target_N", "old_logprobs_N", "rewards_N", "loss_mask_N", "episode_length_E", "group_E")
    columns |= {name: np.concatenate([getattr(batch, name) for batch in alone]) for name in others}
    return replace(alone[0], **columns)


def as_written(policy: Any, step: Callable[[], Any]) -> Callable[[], None]:
    """The step of a policy with compiled layers, without compiling."""
    from rollcast_learners.compiled import uncompiled

    def run() -> None:
        with uncompiled(policy):
            step()

    return run


def twice_the_pairs(prompt: int, answers: list[int]) -> int:
    """sum(S^2) of a sequence, and the like of a prompt with answers that each see it and themselves."""
    return prompt**2 + sum(2 * prompt * length + length**2 for length in answers)


def step_flops(shape: dict[str, Any], policy: Any, batch: Any, lengths: list[int]) -> float:
    layers = sum(weight.numel() for weight in policy.lm.base_model.layers.parameters() if weight.dim() == 2)
    head = shape["vocab_size"] * shape["hidden_size"]
    squares = sum(length**2 for length in lengths)
    heads = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"]
    return 6.0 * (layers * batch.tokens + head * batch.trained_tokens + heads * squares)


def speed(side: dict[str, Any], tokens: int, flops: float | None) -> dict[str, Any]:
    if "seconds" not in side:
        return {}
    found: dict[str, Any] = {"tokens_per_s": tokens / side["seconds"]}
    if flops is not None:
        peak = peak_flops()
        found |= {"tflops": flops / side["seconds"] / 1e12}
        found |= {"mfu": flops / side["seconds"] / peak if peak else None}
    return found


def ratio(name: str, slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast the second is, turn by turn."""
    if "turns" not in slow or "turns" not in fast:
        return {name: None}
    return {name: median(a / b for a, b in zip(slow["turns"], fast["turns"], strict=True))}


if __name__ == "__main__":
    main()
