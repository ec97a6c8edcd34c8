"""What all tests share: quiet threads, tiny models on disk, and one Ray cluster for the session.

Owns: fixtures. Environment variables are set on import, before torch and Ray read theirs.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("services", "learners", "envs", "tests")

# Spinning threads of several processes on two cores make everything ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Token authentication with a token of this session's own: nothing is written to the home directory.
if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny_fp32(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model in float32."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-fp32", dtype="float32"))


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model in bfloat16."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-bf16"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local Ray cluster of 4 CPUs; yields its namespace. Mark tests that use it with `ray`."""
    import ray

    namespace = f"rollcast-tests-{os.getpid()}"
    folder = tempfile.mkdtemp(prefix="rc-", dir="/tmp")  # Ray's socket names leave no room for a longer path.
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        namespace=namespace,
        object_store_memory=256 * 1024 * 1024,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in SOURCES),
                "OMP_WAIT_POLICY": "PASSIVE",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
        },
    )
    yield namespace
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
