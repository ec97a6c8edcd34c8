"""The peer's side of `end_to_end.py`: TRL's GRPOTrainer on the same questions, model and sizes.

Runs in an environment of its own (trl==1.16.0), so it imports nothing of rollcast. Prints the time after each step.
"""

import argparse
import json
import re
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

QUESTIONS = {
    "capital": "What is the capital of {}?",
    "continent": "On which continent is {}?",
    "currency": "What is the currency of {}?",
    "country": "In which country is the city of {}?",
}


def words(text: str) -> list[str]:
    return [w for w in re.sub(r"[^\w\s]", "", text.lower()).split() if w not in {"a", "an", "the"}]


def f1(answer: str, reference: str) -> float:
    said, right = words(answer), words(reference)
    common = sum(min(said.count(w), right.count(w)) for w in set(said))
    return 2 * common / (len(said) + len(right)) if common else 0.0


def reward(
    prompts: list[object], completions: list[list[dict[str, str]]], references: list[list[str]], **_: object
) -> list[float]:
    answers = [completion[0]["content"] for completion in completions]
    return [max(f1(a, r) for r in rs) - 0.001 * len(a) for a, rs in zip(answers, references, strict=True)]


class Clock(TrainerCallback):
    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        print(json.dumps({"step": state.global_step, "time": time.time()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    facts = [json.loads(line) for line in arguments.facts.read_text(encoding="utf-8").splitlines()]
    system = {"role": "system", "content": "Answer with the name only."}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": QUESTIONS[fact["kind"]].format(fact["subject"])}],
            "references": fact["references"],
        }
        for fact in facts
    ]
    config = GRPOConfig(
        output_dir="/tmp/trl-grpo",
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=32,
        learning_rate=3e-5,
        max_steps=arguments.steps,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        arguments.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
    )
    trainer.train()


if __name__ == "__main__":
    main()
