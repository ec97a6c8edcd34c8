"""The settings of the live policy, [serve].

Owns: its keys and their bounds, and which of them contradict each other. Does not know how a policy is served.
"""

import ipaddress
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rollcast.live.limits import Limits
from rollcast.section import AtLeastOne, Section, UpToOne, ZeroOrMore, refusal


class ServeSection(Section):
    """The live policy over HTTP, as OpenAI's API (docs/serving.md); model, engine and context are the run's own."""

    enabled: bool = False
    """Whether a training run serves its policy while it trains; `rollcast serve` serves any run."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; any but this machine's own (loopback) needs serve.keys_file."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    keys_file: str | None = None
    """File of API keys; without one anybody on this machine may ask, and nobody else."""
    mode: Literal["own", "shared"] = "own"
    """Whose engines answer: the replicas' own, or (shared) the rollout workers', where there is room for no more."""
    slots: AtLeastOne = 8
    """Answers that each rollout worker's engine has room for beside its rollouts, if serve.mode is shared."""
    min_replicas: AtLeastOne = 1
    """Replicas that are always there, each with an engine of its own."""
    max_replicas: AtLeastOne | None = None
    """Replicas that Ray Serve may start under load; without it, as many as serve.min_replicas."""
    cpus_per_replica: ZeroOrMore = 1.0
    """CPUs reserved for each replica."""
    gpus_per_replica: ZeroOrMore = 0.0
    """GPUs reserved for each replica."""
    keep_best: bool = True
    """Whether the best policy stays resident beside the newest; once they differ it has an engine of its own."""
    canary: UpToOne = 0.0
    """Share of what is asked of `policy@best` that the newest policy answers."""
    max_new_tokens: AtLeastOne = 1024
    """Longest answer that is given, in tokens."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, over those of rollout.engine_args."""
    limits: Limits = Limits()
    """What is taken on before requests are refused."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine is listened to."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def most_replicas(self) -> int:
        """Replicas under the heaviest load."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas

    @property
    def reserved(self) -> int:
        """Answers that a rollout worker's engine keeps room for."""
        return self.slots if self.mode == "shared" else 0

    @property
    def slots_of_replica(self) -> int:
        """The part of them that each replica may use."""
        return max(1, self.slots // self.most_replicas)

    @property
    def limits_of_replica(self) -> Limits:
        """A key's limits are shared out among the replicas that are always there; turns are each replica's own."""
        shared = self.limits.shared_by(self.min_replicas)
        return shared.model_copy(update={"ongoing": self.limits.ongoing, "queued": self.limits.queued})

    @model_validator(mode="after")
    def _fits_together(self) -> "ServeSection":
        if self.most_replicas < self.min_replicas:
            why = f"it is less than serve.min_replicas = {self.min_replicas}"
            raise refusal("serve.max_replicas", why, "raise it, or lower serve.min_replicas")
        if self.mode == "shared" and self.gpus_per_replica:
            why = "with serve.mode = 'shared' replicas have no engine: the rollout workers' answer"
            raise refusal("serve.gpus_per_replica", why, "leave it out")
        if self.mode == "shared" and self.canary:
            why = "with serve.mode = 'shared' the newest policy alone is resident, and nothing is shared out"
            raise refusal("serve.canary", why, "leave it out")
        if self.keys_file is None and not self.loopback:
            why = f"serve.host = {self.host!r} can be reached from other machines, and everybody there could ask"
            fix = "make a key with `rollcast keys add NAME --file KEYS`, and name the file here"
            raise refusal("serve.keys_file", why, fix)
        return self
