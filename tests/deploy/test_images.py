"""The Dockerfiles: made of the lock files and of nothing else, and not run as root."""

import fnmatch
import re
from pathlib import Path

import pytest

from deployment import DEPLOY, ROOT

IMAGES = {"cpu": ["requirements-torch-cpu.lock", "requirements-cpu.lock"], "cuda": ["requirements-nvidia.lock"]}
LOCKED = re.compile(r"^[a-z0-9][a-z0-9._-]*==[\w.+!]+ --hash=sha256:[0-9a-f]{64}$")


def instructions(kind: str) -> list[tuple[str, str]]:
    text = (DEPLOY / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied(kind: str) -> list[str]:
    """What is copied out of the build context."""
    found = [rest.split() for word, rest in instructions(kind) if word == "COPY" and "--from" not in rest]
    return [source for words in found for source in words[:-1]]


def reaches_the_build(path: str) -> bool:
    """Whether .dockerignore lets a path of the checkout through; the last rule that fits decides."""
    let_through = True
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)]
        if (
            rule
            and not rule.startswith("#")
            and any(fnmatch.fnmatch(part, pattern) for part in (*parts, Path(path).name))
        ):
            let_through = rule.startswith("!")
    return let_through


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(LOCKED.match(line) for line in lines), name
    return dict(line.split(" ")[0].split("==", 1) for line in lines)


@pytest.mark.parametrize("kind", IMAGES)
def test_the_base_is_a_version_and_can_be_a_digest(kind: str) -> None:
    arguments = [rest for word, rest in instructions(kind) if word == "ARG"]
    assert [re.sub(r"\d+\.\d+\.\d+", "N", argument) for argument in arguments] == ["BASE=python:N-slim-bookworm"]
    assert {rest.split(" ")[0] for word, rest in instructions(kind) if word == "FROM"} == {"${BASE}"}


@pytest.mark.parametrize("kind", IMAGES)
def test_it_does_not_run_as_root(kind: str) -> None:
    last = [word for word, _ in instructions(kind)].index("USER")
    assert instructions(kind)[last] == ("USER", "1000:1000")
    assert {word for word, _ in instructions(kind)[last + 1 :]} <= {"CMD"}


@pytest.mark.parametrize("kind", IMAGES)
def test_what_it_copies_is_there_and_reaches_the_build(kind: str) -> None:
    assert copied(kind)
    for source in copied(kind):
        assert (ROOT / source).exists(), source
        assert reaches_the_build(source), source


@pytest.mark.parametrize(
    "path",
    [
        *("deploy/secrets", "deploy/secrets/token", ".git", ".venv", "runs", "models", "tests", "benchmarks/results"),
        *("services/rollcast/__pycache__", "services/rollcast/x.pyc"),
    ],
)
def test_secrets_and_baggage_stay_outside(path: str) -> None:
    assert not reaches_the_build(path)


def test_git_does_not_take_secrets_either() -> None:
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("kind", IMAGES)
def test_packages_come_from_the_locks_by_their_digests(kind: str) -> None:
    runs = " && ".join(rest for word, rest in instructions(kind) if word == "RUN").split("&&")
    installs = [step.strip() for step in runs if "pip install" in step]
    assert all("--no-deps" in step for step in installs)
    own = [step for step in installs if step.endswith(" .")]
    assert len(own) == 1
    assert all("--require-hashes" in step and " -r " in step for step in installs if step not in own)
    assert [source.removeprefix("deploy/") for source in copied(kind) if source.endswith(".lock")] == IMAGES[kind]


@pytest.mark.parametrize("kind", IMAGES)
def test_the_locks_have_all_that_rollcast_needs(kind: str) -> None:
    import tomllib

    packages = {name: version for lock in IMAGES[kind] for name, version in locked(lock).items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = "cpu" if kind == "cpu" else "nvidia"
    for requirement in [*project["dependencies"], *project["optional-dependencies"][extra], "setuptools", "hatchling"]:
        assert re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-") in packages, requirement
    for left_out in re.findall(
        r"grep -vE '\^\(([^)]*)\)==", (DEPLOY / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    ):
        assert set(left_out.split("|")) <= packages.keys()


def test_the_cuda_build_of_torch_has_the_libraries_that_it_asks_for() -> None:
    """A lock resolved beside a CPU build of torch had none of them."""
    packages = locked("requirements-nvidia.lock")
    assert packages["torch"] == "2.13.0"
    assert packages["triton"] == "3.7.1"
    assert {
        "nvidia-cublas",
        "nvidia-cudnn-cu13",
        "nvidia-nccl-cu13",
        "nvidia-cusparse",
        "cuda-toolkit",
    } <= packages.keys()


def test_both_images_are_the_same_rollcast() -> None:
    cpu, cuda = (set(copied(kind)) for kind in IMAGES)
    assert cpu ^ cuda <= {f"deploy/{lock}" for locks in IMAGES.values() for lock in locks}
