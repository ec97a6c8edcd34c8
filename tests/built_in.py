"""The built-in environments and all their data, for tests that hold for every one of them.

Environments of other packages are left out: they need those packages. So is Feedback-v0, which has no data of its own
(tests/envs/test_feedback.py).
"""

from typing import Any

import gymnasium

import rollcast_envs  # noqa: F401  (registers them)
from rollcast_envs.tasks.single_turn import SingleTurnTask

IDS = [
    spec.id
    for spec in gymnasium.registry.values()
    if spec.namespace == "rollcast"
    and spec.id != "rollcast/Feedback-v0"
    and not str(spec.entry_point).startswith("rollcast_envs.adapters.")
]
PATIENT = {"rollcast/Code-v0": {"timeout_s": 60.0}}
"""Arguments with which a busy machine changes no episode."""


def other_data() -> list[tuple[str, dict[str, Any]]]:
    """All built-in data sets: those of the tasks on data by name, and both directions of each language."""
    found: list[tuple[str, dict[str, Any]]] = []
    for env_id in IDS:
        creator: Any = gymnasium.envs.registration.load_env_creator(str(gymnasium.spec(env_id).entry_point))
        named = creator.built_in if issubclass(creator, SingleTurnTask) else {"": ""}
        for name in named:
            if env_id == "rollcast/Translation-v0":
                found += [(env_id, {"source": "en", "target": name}), (env_id, {"source": name, "target": "en"})]
            else:
                found.append((env_id, {"data": name} if name else {}))
    return found


def make(env_id: str, **kwargs: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make(env_id, **PATIENT.get(env_id, {}), **kwargs)
