"""The prompt stream: group number in, prompts out; the same number always gives the same prompts.

Owns: which environment and which seed a group gets. Does not know leases, workers or results. Having no
state, it needs no checkpoint: the ledger's position is the stream's.
"""

import random
from collections.abc import Sequence

from rollcast.config import EnvSection
from rollcast_learners.types import Prompt


class PromptStream:
    """Draws environments by weight and seeds at random, from the run's seed and the group's number."""

    def __init__(self, envs: Sequence[EnvSection], group_size: int, seed: int) -> None:
        self.envs = list(envs)
        self.group_size = group_size
        self.seed = seed

    def group(self, number: int, attempt: int = 1) -> list[Prompt]:
        """The samples of group `number`: the same question `group_size` times."""
        draw = random.Random(f"{self.seed}/{number}")
        env = draw.choices(self.envs, [env.weight for env in self.envs])[0]
        seed = draw.randrange(2**31)
        return [
            Prompt(
                f"{number}.{attempt}.{sample}",
                str(number),
                env.id,
                seed,
                env.kwargs,
                env_name=env.label,
                scoring=env.scoring,
            )
            for sample in range(self.group_size)
        ]
