"""The peer's side of `end_to_end.py`: TRL's GRPOTrainer or RLOOTrainer on the same questions, model and sizes.

Runs in an environment of its own (trl==1.16.0), so it imports nothing of rollcast. `--turns` above 1 plays `quiz.py`
through GRPOTrainer's `rollout_func`: all episodes of a step together, turn by turn, each turn generated as TRL itself
generates (`_generate_single_turn`). `--environments` says how their steps are called: `in-turn`, one after the other,
as TRL's own loop over tools and environments calls them (`_tool_call_loop`, asynchronous ones too), or `at-once`, in
threads, as an author of a `rollout_func` may write it.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset
from peer_task import Steps, reward_of, rows_of
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

steps = Steps()


def reward(
    completions: list[list[dict[str, str]]], completion_ids: list[list[int]], references: list[list[str]], **_: Any
) -> list[float]:
    answers = [completion[0]["content"] for completion in completions]
    rewards = [reward_of(answer, right) for answer, right in zip(answers, references, strict=True)]
    steps.note(rewards, [len(ids) for ids in completion_ids])
    return rewards


def reward_of_episode(completions: list[Any], episode_reward: list[float], lengths: list[int], **_: Any) -> list[float]:
    steps.note(episode_reward, lengths)
    return episode_reward


class Clock(TrainerCallback):
    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
        steps.end(state.global_step)


class Rollout:
    """Plays a step's episodes of `quiz.py` in lock-step."""

    def __init__(self, questions: Path, turns: int, at_once: bool) -> None:
        from quiz import QuizEnv

        self.make = lambda: QuizEnv(str(questions), turns)
        self.index = {row["prompt"][1]["content"]: index for index, row in enumerate(rows_of(questions))}
        self.turns = turns
        self.threads = ThreadPoolExecutor(64) if at_once else None
        self.environments: list[Any] = []

    def __call__(self, prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        tokenizer = trainer.processing_class
        while len(self.environments) < len(prompts):
            self.environments.append(self.make())
        playing = self.environments[: len(prompts)]
        for environment, prompt in zip(playing, prompts, strict=True):
            environment.reset(options={"index": self.index[prompt[1]["content"]]})
        asked = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
        prompt_ids: list[list[int]] = asked["input_ids"]
        streams: list[list[int]] = [[] for _ in prompts]
        masks: list[list[int]] = [[] for _ in prompts]
        rewards = [0.0] * len(prompts)
        for turn in range(self.turns):
            so_far = [ask + stream for ask, stream in zip(prompt_ids, streams, strict=True)]
            answers, _ = trainer._generate_single_turn(so_far, None, {}, 1)
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            each = self.threads.map if self.threads is not None else map
            results = list(each(lambda pair: pair[0].step(pair[1]), zip(playing, texts, strict=True)))
            for i, (answer, (observation, value, *_)) in enumerate(zip(answers, results, strict=True)):
                rewards[i] += value
                streams[i] += answer
                masks[i] += [1] * len(answer)
                if turn + 1 < self.turns:
                    ended = answer[-1] == tokenizer.eos_token_id
                    suffix = self._next_turn(tokenizer, observation, ended)
                    streams[i] += suffix
                    masks[i] += [0] * len(suffix)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": streams,
            "logprobs": None,  # Generation by transformers has none.
            "env_mask": masks,
            "episode_reward": rewards,
            "lengths": [sum(mask) for mask in masks],
        }

    @staticmethod
    def _next_turn(tokenizer: Any, observation: str, ended: bool) -> list[int]:
        """The answer's end, if the policy did not write it, and the next question, as the chat template has them."""
        end = "" if ended else tokenizer.eos_token
        text = f"{end}\n<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", choices=["grpo", "rloo"], default="grpo")
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--samples", type=int, default=64, help="samples of a step")
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer of a turn")
    parser.add_argument("--microbatch", type=int, help="samples of a forward pass; without it, all of a step")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--environments", choices=["in-turn", "at-once"], default="in-turn")
    arguments = parser.parse_args()
    microbatch = arguments.microbatch or arguments.samples
    trainer_of, config_of = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[arguments.algorithm]
    config = config_of(
        output_dir="/tmp/trl-peer",
        use_cpu=True,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=arguments.samples // microbatch,
        num_generations=arguments.group,
        max_completion_length=arguments.tokens,
        beta=0.0,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        max_steps=arguments.steps,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    more: dict[str, Any] = {"reward_funcs": reward}
    if arguments.turns > 1:
        rollout = Rollout(arguments.questions, arguments.turns, arguments.environments == "at-once")
        more = {"reward_funcs": reward_of_episode, "rollout_func": rollout}
    trainer_of(
        arguments.model,
        args=config,
        train_dataset=Dataset.from_list(rows_of(arguments.questions)),
        callbacks=[Clock()],
        **more,
    ).train()


if __name__ == "__main__":
    main()
