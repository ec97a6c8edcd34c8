"""What a run is told: the settings and their bounds.

Owns: every key of a run's configuration, and which settings contradict each other. The keys of [learner] and [kl] are
the learner's own; here they only get stricter. Does not know files and command lines (`config_file.py`), the machine
(plan.py asks whether it has what is wanted) nor what the settings are used for.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rollcast.config_feedback import FeedbackSection
from rollcast.config_serve import ServeSection
from rollcast.config_tune import TuneSection
from rollcast.section import STRICT, AtLeastOne, NotNegative, Positive, Section, UpToOne, ZeroOrMore, refusal
from rollcast_learners.algorithms import ALGORITHMS, OVER_GROUPS
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings, LoraSettings

MOST_RANK = 512
# They cut or bend the distribution: the log-probabilities of what was sampled are then not the policy's own.
SAMPLING_KEYS = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# Engine arguments that rollcast sets itself, and the key that decides each.
OWNED_ENGINE_ARGS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "max_model_len": "rollout.max_model_len",
    "logprobs_mode": "nothing: training needs processed_logprobs",
}
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def sampling_refusal(path: str) -> tuple[str, str, str]:
    why = "training needs the log-probabilities of the very distribution that was sampled from"
    return path, why, "remove it; rollout.temperature is the only sampling setting in training"


class RunSection(Section):
    """The run as a whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run and its folder (letters, digits, `.`, `-`, `_`); without it, that of the file."""
    steps: AtLeastOne
    """How many learner steps the run takes."""
    seed: NotNegative = 0
    """Where the prompt order, the environments and the value head start from."""
    dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of all runs, absolute or relative to where the command was typed."""
    every: Annotated[str, Field(pattern=r"^[1-9][0-9]*[smhd]$")] | None = None
    """With --from-run: time from the beginning of one round to that of the next, such as `30m`, `6h` or `1d`."""
    below: UpToOne | None = None
    """With --from-run: mean live rating below which a round begins before its time; docs/continual.md."""
    rounds: NotNegative = 0
    """With --from-run: rounds after which it ends; 0 never ends."""
    margin: ZeroOrMore = 0.0
    """With --from-run: by how much a round has to beat eval.best_metric of the policy it began from."""

    @property
    def every_s(self) -> float | None:
        """`every` in seconds."""
        return None if self.every is None else int(self.every[:-1]) * UNITS_S[self.every[-1]]


class ModelSection(Section):
    """The policy that is trained."""

    path: Annotated[str, Field(min_length=1)]
    """Folder of a Hugging Face causal language model, or its hub id `org/name`."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type to compute in; `auto` is bfloat16 where the processor has it. Master weights are float32."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run on your machines."""
    chat_template: str | None = None
    """File with a Jinja chat template to use in place of the model's own."""

    @field_validator("chat_template")
    @classmethod
    def _is_a_file(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_file():
            why = f"there is no file {path!r}"
            raise refusal("model.chat_template", why, "name a Jinja file, or leave it out")
        return path


class LoraSection(LoraSettings):
    """Low-rank adapters (LoRA) in place of training every weight."""

    model_config = STRICT


class RewardSection(Section):
    """A reward function on top of an environment's own reward."""

    function: Annotated[str, Field(min_length=1)]
    """A built-in one (docs/rewards.md), or yours: `package.module:function` or `path/to/file.py:function`."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """What it is called in figures; without it, the function's own name."""
    weight: float = 1.0
    """What its value is multiplied with; negative for a penalty."""
    timeout_s: Positive = 10.0
    """Seconds that one call may take before its process is ended and the sample counted as failed."""
    retries: NotNegative = 1
    """Further tries after an exception, a timeout or a dead process."""
    processes: AtLeastOne = 2
    """Processes of a rollout worker that run this function."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the function."""


class EnvSection(Section):
    """One environment to play; several are mixed by weight."""

    id: Annotated[str, Field(min_length=1)]
    """Gymnasium id, such as `rollcast/QA-v0` or `module:Id-v0`."""
    weight: Positive = 1.0
    """Share of the prompts that this environment gets, relative to the others."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `gymnasium.make`."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """What it is called in figures; without it, the last part of its id."""

    rewards: Annotated[tuple[RewardSection, ...], Field(strict=False)] = ()
    """Reward functions added to the environment's own reward, each `[[env.rewards]]`."""
    own_reward_weight: float = 1.0
    """What the environment's own reward is multiplied with; 0 leaves the reward to `rewards` alone."""

    @property
    def label(self) -> str:
        """The environment in names of metrics."""
        return self.name or self.id.rsplit("/", 1)[-1]

    @property
    def scoring(self) -> dict[str, Any] | None:
        """The rewards of the run, as they travel with a prompt."""
        if not self.rewards and self.own_reward_weight == 1.0:
            return None
        rewards = [reward.model_dump(exclude_none=True, exclude_unset=True) for reward in self.rewards]
        return {"rewards": rewards, "own_weight": self.own_reward_weight}


class WorkerRange(Section):
    """Bounds of a fleet that follows what the learner waits for (docs/fleet.md), in place of a number of workers."""

    min: NotNegative
    """The fewest rollout workers; 0 lets a paused run rest without any."""
    max: AtLeastOne
    """The most rollout workers, as far as the cluster holds them."""

    @model_validator(mode="after")
    def _fits_together(self) -> "WorkerRange":
        if self.min > self.max:
            raise refusal("rollout.workers.min", f"it is above max = {self.max}", "lower it, or raise max")
        return self


def _kind_of_workers(value: object) -> str:
    return WORKER_KINDS[isinstance(value, dict | WorkerRange)]


WORKER_KINDS = ("N", "{min, max}")
Workers = Annotated[
    Annotated[AtLeastOne, Tag(WORKER_KINDS[0])] | Annotated[WorkerRange, Tag(WORKER_KINDS[1])],
    Discriminator(_kind_of_workers),
]


class RolloutSection(Section):
    """How the policy plays: workers, their engines, and the bounds of an episode."""

    workers: Workers = 1
    """Rollout workers, each with an engine of its own: a number, or `{min = N, max = M}`."""
    engine: Literal["vllm", "torch", "scripted"] = "vllm"
    """What samples: `vllm`; `torch`, slow and plain; or `scripted`, a fake without a model for tests."""
    group_size: AtLeastOne = 8
    """Samples of each prompt."""
    max_new_tokens: AtLeastOne = 32
    """Longest answer of one turn, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature of training; evaluation is greedy."""
    concurrency: AtLeastOne = 64
    """Episodes that a worker plays at once."""
    gpus_per_worker: ZeroOrMore = 0.0
    """GPUs reserved for each worker; a share below 1 lets workers divide one."""
    cpus_per_worker: AtLeastOne = 1
    """CPUs reserved for each worker."""
    tensor_parallel: AtLeastOne = 1
    """GPUs over which one engine splits the model."""
    max_model_len: Annotated[int, Field(ge=2)] = 512
    """Longest prompt and answer together, in tokens; a longer prompt becomes a counted error."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine; sampling settings are refused."""
    env_timeout_s: Positive = 30.0
    """Seconds that one reset or step of an environment may take."""
    lease_s: Positive = 120.0
    """Seconds that a worker has for a prompt before another worker gets it."""
    max_attempts: AtLeastOne = 3
    """Tries for an episode before it is given up as an error."""
    max_turns: AtLeastOne = 16
    """Turns after which an episode is truncated."""
    start_timeout_s: Positive = 900.0
    """Seconds that a worker may take from its place on a node to its first policy before it is replaced."""
    drain_s: Positive = 60.0
    """Seconds that a worker which is not wanted any more may play on before it hands back what it has not finished."""
    max_error_share: UpToOne = 0.2
    """Share of episodes that may end in an error before the run stops with the first cause."""

    @field_validator("engine_args")
    @classmethod
    def _leave_ours_alone(cls, engine_args: dict[str, Any]) -> dict[str, Any]:
        for path in _nested_keys(engine_args):
            if path[-1] in SAMPLING_KEYS:
                raise refusal(*sampling_refusal(".".join(("rollout", "engine_args", *path))))
        for key in OWNED_ENGINE_ARGS.keys() & engine_args.keys():
            path_here = f"rollout.engine_args.{key}"
            raise refusal(path_here, "rollcast sets it", f"remove it; what decides is {OWNED_ENGINE_ARGS[key]}")
        return engine_args

    @model_validator(mode="after")
    def _fits_together(self) -> "RolloutSection":
        if self.max_new_tokens >= self.max_model_len:
            why = f"max_model_len = {self.max_model_len} leaves no room for a prompt"
            raise refusal("rollout.max_new_tokens", why, "lower it, or raise rollout.max_model_len")
        if self.engine != "vllm" and (self.engine_args or self.tensor_parallel > 1):
            why = f"engine = {self.engine!r} has neither engine_args nor tensor_parallel"
            raise refusal("rollout.engine", why, 'set it to "vllm", or remove the two')
        if 0 < self.gpus_per_worker < self.tensor_parallel and self.tensor_parallel > 1:
            why = f"an engine over {self.tensor_parallel} GPUs needs as many in its worker"
            fix = f"set it to {self.tensor_parallel}, or rollout.tensor_parallel to 1"
            raise refusal("rollout.gpus_per_worker", why, fix)
        return self

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        return _whole_gpus("rollout.gpus_per_worker", gpus)

    @property
    def fleet_bounds(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        if isinstance(self.workers, WorkerRange):
            return self.workers.min, self.workers.max
        return self.workers, self.workers

    @property
    def first_workers(self) -> int:
        """How many workers a run starts with; without them it could not start."""
        fewest, most = self.fleet_bounds
        return min(max(fewest, 1), most)


class LearnerSection(LearnerSettings):
    """How the policy learns."""

    model_config = STRICT

    @field_validator("gpus_per_learner")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        return _whole_gpus("learner.gpus_per_learner", gpus)

    @model_validator(mode="after")
    def _fits_together(self) -> "LearnerSection":
        algorithm = ALGORITHMS[self.algorithm]
        for key, values in algorithm.allowed.items():
            value = getattr(self, key)
            if value not in values:
                usual = algorithm.presets.get(key, values[0])
                choices = " or ".join(f'"{other}"' for other in values)
                why = f"{self.algorithm} ({algorithm.paper}) has {choices} there, not {value!r}"
                fix = f'leave it out (it is then "{usual}"), or choose another learner.algorithm'
                raise refusal(f"learner.{key}", why, fix)
        if self.sharding != "none" and self.num_learners < 2:
            why = f"a policy is shared out among learners, and learner.num_learners = {self.num_learners}"
            raise refusal("learner.sharding", why, 'set learner.num_learners to 2 or more, or this to "none"')
        if self.critic == "none" and self.on_length == "bootstrap":
            why = "without a critic there is no value to bootstrap from"
            raise refusal("learner.on_length", why, 'use "zero" or "mask", or learner.critic = "head"')
        if self.head == "triton" and not self.gpus_per_learner:
            why = '"triton" is made of kernels for an NVIDIA GPU, and learner.gpus_per_learner = 0'
            raise refusal("learner.head", why, 'set it to "chunked", or learner.gpus_per_learner to 1')
        return self


class KLSection(KLSettings):
    """The pull back to the model that training began from."""

    model_config = STRICT

    @model_validator(mode="after")
    def _fits_together(self) -> "KLSection":
        if self.coef > 0 and self.kind == "none":
            raise refusal("kl.coef", 'kl.kind = "none" measures no divergence', 'set kl.kind, say to "k3"')
        if self.target is not None and not self.coef > 0:
            raise refusal("kl.target", "a weight of 0 cannot adapt itself", "set kl.coef to where it starts, say 0.05")
        return self


class BufferSection(CorrectionSettings):
    """What waits between workers and learner, and how samples of older policies count."""

    model_config = STRICT

    max_staleness: NotNegative = 2
    """How many versions old a sample may be when it is trained on; 0 is synchronous training."""


class WeightsSection(Section):
    """How a new policy reaches the workers, and how it is proved to have arrived."""

    transport: Literal["shm"] = "shm"
    """Shared memory on each node, the object store between nodes."""
    probe_tokens: Annotated[int, Field(ge=2)] = 512
    """Fixed tokens on which engine and learner are compared after every update."""
    probe_max_gap: Positive = 0.08
    """Mean difference of log-probabilities, in nat, from which an update counts as failed."""


class EvalSection(Section):
    """Greedy evaluation, before the first step and in between."""

    every: NotNegative = 8
    """Steps between evaluations; 0 turns them off."""
    split: Annotated[str, Field(min_length=1)] = "validation"
    """Split of each environment's data to play."""
    samples: NotNegative = 0
    """Episodes of each environment; 0 plays the whole split."""
    sampled: NotNegative = 0
    """Further answers to each question at rollout.temperature, for avg@k and pass@k; 0 is greedy only."""
    restrict_answers: bool = False
    """Whether answers are restricted to the choices that an environment lists (vLLM's structured output)."""
    best_metric: Annotated[str, Field(pattern=r"^[^/]+/.+$")] | None = None
    """The figure by which the best policy is kept, such as `QA-v0/f1`; without it, none is."""
    patience: NotNegative = 0
    """Evaluations without a better eval.best_metric after which the run stops; 0 never stops."""


class CheckpointSection(Section):
    """What a restart goes on from."""

    every: AtLeastOne = 10
    """Steps between checkpoints: the most that a crash can lose."""
    keep_last: AtLeastOne = 2
    """Newest checkpoints that stay on disk."""


class TrackingSection(Section):
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    """Whether TensorBoard files are written."""


class RunConfig(Section):
    """All settings of one run, resolved."""

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection.model_validate({})
    env: Annotated[tuple[EnvSection, ...], Field(min_length=1, strict=False)]
    rollout: RolloutSection = RolloutSection()
    learner: LearnerSection = LearnerSection.model_validate({})
    kl: KLSection = KLSection.model_validate({})
    buffer: BufferSection = BufferSection()
    weights: WeightsSection = WeightsSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    serve: ServeSection = ServeSection()
    tracking: TrackingSection = TrackingSection()
    tune: TuneSection = TuneSection()
    feedback: FeedbackSection = FeedbackSection()

    @property
    def samples_per_step(self) -> int:
        """Trajectories that one learner step trains on."""
        return self.learner.prompts_per_step * self.rollout.group_size

    @property
    def adapter(self) -> LoraSettings | None:
        """The adapters that are trained, if any."""
        return self.lora if self.lora.rank else None

    @property
    def published_kind(self) -> Literal["full", "adapter"]:
        """What a new policy travels as."""
        return "adapter" if self.lora.rank and self.lora.publish == "adapter" else "full"

    def without_rollouts(self) -> "RunConfig":
        """The same for a run that plays nothing and needs no critic (`sft`): no worker, no engine."""
        rollout = self.rollout.model_copy(update={"workers": 0, "engine": "scripted"})
        learner = self.learner.model_copy(update={"critic": "none"})
        return self.model_copy(update={"rollout": rollout, "learner": learner})

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        shares = self.learner.minibatches * max(1, self.learner.num_learners)
        if shares > self.samples_per_step:
            why = f"{self.samples_per_step} samples a step cannot be cut into {shares} (with all learners)"
            raise refusal("learner.minibatches", why, "lower it, or raise learner.prompts_per_step")
        self._check_evaluation()
        self._check_rewards()
        self._check_algorithm()
        self._check_adapter()
        self._check_search()
        return self

    def _check_algorithm(self) -> None:
        learner, algorithm = self.learner, ALGORITHMS[self.learner.algorithm]
        if learner.normalize_advantages in OVER_GROUPS and self.rollout.group_size == 1:
            why = f"learner.normalize_advantages = {learner.normalize_advantages!r} compares samples of one prompt"
            fix = 'set it to 2 or more, or learner.normalize_advantages to "batch" where the algorithm can do with it'
            raise refusal("rollout.group_size", why, fix)
        if learner.dynamic_sampling and self.rollout.group_size == 1:
            why = "a single sample is always as good as itself, and every prompt would be replaced"
            raise refusal("learner.dynamic_sampling", why, "set it to false, or raise rollout.group_size")
        if algorithm.needs_reference and not self.kl.coef > 0:
            why = f"{learner.algorithm} has kl.coef as its temperature, and a reference to measure from"
            raise refusal("kl.coef", why, 'set kl.kind = "k1" and kl.coef, say to 0.1')
        if self.buffer.correction != "none" and algorithm.needs_reference:
            why = f"{learner.algorithm} learns from samples of any policy as they are"
            raise refusal("buffer.correction", why, 'set it to "none"')
        if self.buffer.correction != "none" and self.rollout.engine == "scripted":
            why = "the scripted engine has no log-probabilities of its own to correct by"
            raise refusal("buffer.correction", why, 'set it to "none", or rollout.engine to "vllm" or "torch"')

    def _check_search(self) -> None:
        if self.tune.metric is not None and self.tune.metric.partition("/")[0] not in [env.label for env in self.env]:
            why = f"{self.tune.metric!r} names none of the environments: {', '.join(env.label for env in self.env)}"
            raise refusal("tune.metric", why, f'write ENVIRONMENT/METRIC, such as "{self.env[0].label}/reward"')
        for number, env in enumerate(self.env):
            if self.tune.folds > 1 and "split" in env.kwargs:
                why = "tune.folds trains on parts of the train split"
                raise refusal(f"env.{number}.kwargs.split", why, "remove it, or set tune.folds to 0")
        if self.tune.folds > 1 and self.eval.patience:
            why = "tune.folds compares all folds at the same steps, so none may stop early"
            raise refusal("eval.patience", why, "set it to 0, or tune.folds to 0")

    def _check_adapter(self) -> None:
        if self.published_kind == "adapter" and self.rollout.engine == "vllm" and self.lora.rank > MOST_RANK:
            why = f"vLLM takes adapters up to rank {MOST_RANK}"
            raise refusal("lora.rank", why, 'lower it, or set lora.publish to "merged"')

    def _check_evaluation(self) -> None:
        labels = [env.label for env in self.env]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            why = f"two environments are called {twice!r}, and their figures could not be told apart"
            raise refusal("env.name", why, "give one of them another name")
        if self.eval.patience and self.eval.best_metric is None:
            raise refusal("eval.patience", "no eval.best_metric says what better is", f'set it: "{labels[0]}/reward"')
        if self.eval.best_metric is not None and self.eval.best_metric.partition("/")[0] not in labels:
            why = f"{self.eval.best_metric!r} names none of the environments: {', '.join(labels)}"
            raise refusal("eval.best_metric", why, f'write ENVIRONMENT/METRIC, such as "{labels[0]}/reward"')
        for key in ("every", "below"):
            if getattr(self.run, key) is not None and (self.eval.best_metric is None or not self.eval.every):
                why = "a round is promoted by eval.best_metric alone"
                raise refusal(f"run.{key}", why, f'set eval.every, and eval.best_metric to "{labels[0]}/reward"')
        if self.eval.restrict_answers and self.rollout.engine != "vllm":
            why = f"the {self.rollout.engine} engine has no structured output"
            raise refusal("eval.restrict_answers", why, 'set it to false, or rollout.engine to "vllm"')

    def _check_rewards(self) -> None:
        for number, env in enumerate(self.env):
            for place, reward in enumerate(env.rewards):
                longest = reward.timeout_s * (reward.retries + 1)
                if longest >= self.rollout.env_timeout_s:
                    why = f"{reward.retries + 1} tries of {reward.timeout_s:g} s do not fit into one step's time"
                    fix = f"lower it or retries, or raise rollout.env_timeout_s above {longest:g}"
                    raise refusal(f"env.{number}.rewards.{place}.timeout_s", why, fix)

    def to_toml(self) -> str:
        """The resolved settings as a file that loads to the same."""
        return tomlkit.dumps(self.model_dump(by_alias=True, exclude_none=True))


def _whole_gpus(path: str, gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise refusal(path, f"{gpus} is neither a share of one GPU nor a whole number", "use 0.5, 1, 2, ...")
    return gpus


def _nested_keys(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield (*path, str(key))
            yield from _nested_keys(below, (*path, str(key)))
