"""The peer's side of `end_to_end.py ppo`: TRL's PPOTrainer on the same questions, model and sizes.

Runs in an environment of its own (trl==1.12.0, the last with a PPOTrainer), so it imports nothing of rollcast. Policy,
value and reference model are three of the same size, as TRL wants them. The reward is the rule that the other side has,
dressed as a reward model: it costs next to nothing.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peer_task import Steps, reward_of, rows_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

PAD = "<|endoftext|>"
"""SmolLM2 pads with the token that ends an answer, and TRL's PPO would then mask that token out."""
steps = Steps()


class Backbone(torch.nn.Module):
    """Hands the token ids on as if they were hidden states."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids])


class Rule(torch.nn.Module):
    """The reward rule in the shape that `get_reward` of TRL asks for; notes rewards and lengths on the way."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, questions: Path) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.references = {row["prompt"][1]["content"]: row["references"] for row in rows_of(questions)}

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        rewards, lengths = [], []
        for row in ids.tolist():
            start = self._answer_start(row)
            answer = [token for token in row[start:] if token != self.tokenizer.pad_token_id]
            question = self.tokenizer.decode(row[:start]).partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            said = self.tokenizer.decode(answer, skip_special_tokens=True)
            rewards.append(reward_of(said, self.references[question]))
            lengths.append(len(answer))
        steps.note(rewards, lengths)
        return torch.tensor(rewards)[:, None, None].expand(-1, ids.shape[1], 1)

    def _answer_start(self, row: list[int]) -> int:
        size = len(self.opening)
        return next(i + size for i in range(len(row)) if row[i : i + size] == self.opening)


class Clock(TrainerCallback):
    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
        steps.end(state.global_step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--samples", type=int, default=64, help="samples of a step, each of another question")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--microbatch", type=int, help="samples of a forward pass; without it, all of a step")
    arguments = parser.parse_args()
    microbatch = arguments.microbatch or arguments.samples
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left", pad_token=PAD)
    rows = [
        {"input_ids": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)}
        for row in rows_of(arguments.questions)
    ]
    bf16 = {"dtype": torch.bfloat16}
    config = PPOConfig(
        output_dir="/tmp/trl-peer",
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=arguments.samples // microbatch,
        total_episodes=arguments.samples * arguments.steps,
        response_length=arguments.tokens,
        stop_token="eos",
        temperature=1.0,
        num_ppo_epochs=1,
        num_mini_batches=1,
        kl_coef=0.05,
        lam=1.0,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    PPOTrainer(
        config,
        tokenizer,
        model=AutoModelForCausalLM.from_pretrained(arguments.model, **bf16),
        ref_model=AutoModelForCausalLM.from_pretrained(arguments.model, **bf16),
        reward_model=Rule(tokenizer, arguments.questions),
        value_model=AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, **bf16),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    ).train()


if __name__ == "__main__":
    main()
