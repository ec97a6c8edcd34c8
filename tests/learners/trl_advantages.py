"""What TRL 1.16's own trainers make of random rewards: writes trl_advantages.json, which test_advantages.py reads.

    PYTHON_WITH_TRL tests/learners/trl_advantages.py      (trl==1.16.0, transformers==5.19.0, datasets, accelerate)

Runs in an environment of its own, without rollcast. GRPOTrainer and RLOOTrainer train a tiny random model;
each sample's reward is drawn in advance, and what a trainer logs as advantages is written beside it.
"""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

GROUPS, SAMPLES, STEPS = 4, 6, 10
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
    "grpo_unscaled": (GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
    "rloo": (RLOOTrainer, RLOOConfig, {"normalize_advantages": False}),
}


def drawn(draw: random.Random) -> list[float]:
    """Rewards of one step: of groups that differ, that hardly do, and one where all samples are equally good."""
    spreads = [1.0, 0.01, 100.0, 0.0]
    return [draw.gauss(0.5, spread) for spread in spreads for _ in range(SAMPLES)]


def played(name: str, model: str, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[float]]]:
    trainer_class, config_class, settings = VARIANTS[name]
    draw, steps = random.Random(0), []

    def reward(completions: list[str], **_: object) -> list[float]:
        steps.append({"rewards": drawn(draw)})
        return list(steps[-1]["rewards"])

    class Copy(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            steps[-1]["advantages"] = [float(a) for a in trainer._logs["advantages"]]

    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=GROUPS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=2,
            max_steps=STEPS,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        rows = Dataset.from_list([{"prompt": "a b c"}] * 64)
        trainer = trainer_class(
            model, reward, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Copy()]
        )
        trainer.train()
    return steps


def main() -> None:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found: dict[str, Any] = {"trl": "1.16.0", "samples": SAMPLES}
    with tempfile.TemporaryDirectory() as model:
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(model)
        found |= {name: played(name, model, tokenizer) for name in VARIANTS}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
