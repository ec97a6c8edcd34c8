"""The house plan, held to the code: who may import what, how light a type is to load, and what is never called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"rollcast_envs": "envs", "rollcast_learners": "learners", "rollcast": "services"}
FILES = sorted(file for package, root in PACKAGES.items() for file in (ROOT / root / package).rglob("*.py"))
MAX_LINES = 600

# package -> module that is not for all of it -> the files that may import it.
ONLY_IN: dict[str, dict[str, tuple[str, ...]]] = {
    "rollcast_envs": dict.fromkeys(("torch", "ray", "vllm", "transformers", "rollcast", "rollcast_learners"), ()),
    "rollcast_learners": {
        "ray": ("rllib.py",),
        "gymnasium": ("rllib.py",),
        **dict.fromkeys(("vllm", "rollcast", "rollcast_envs"), ()),
    },
    "rollcast": {
        "vllm": ("vllm_*.py",),
        # Whoever starts the torch engine sets the number of its threads; the demo prepares a model.
        "torch": ("torch_sampler.py", "vllm_*.py", "engines.py", "demo.py"),
    },
}
# What can be read, tested and imported without a cluster or a model.
PLAIN = (
    *("buffer", "chat", "config", "environments", "episode", "errors"),
    *("interpreter", "ledger", "plan", "preflight", "prompts", "restarts", "rundir", "sampler", "submitted", "worker"),
)
HEAVY = ("torch", "ray", "vllm", "transformers")

UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
# Only there is code run that a model wrote: in a process sealed by seccomp, which is what the sandbox is for.
SANDBOXED = {"envs/rollcast_envs/sandbox_child.py": {"exec"}}
UNSAFE_FLAGS = {"shell", "allow_pickle", "trust_remote_code"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(tree: ast.Module) -> set[str]:
    """Top-level names of everything imported, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules}


def unsafe(tree: ast.Module) -> Iterator[str]:
    yield from sorted(imports(tree) & UNSAFE_MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                if keyword.arg in UNSAFE_FLAGS and getattr(keyword.value, "value", None) is True:
                    yield f"{keyword.arg}=True"
        elif isinstance(node, ast.ImportFrom):
            yield from UNSAFE_CALLS & {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "0.0.0.0" in node.value:
            yield "0.0.0.0"


def test_there_is_something_to_hold() -> None:
    assert {package for package in PACKAGES for file in FILES if package in file.parts} == set(PACKAGES)


@pytest.mark.parametrize("package", ONLY_IN)
def test_imports_keep_to_the_house_plan(package: str) -> None:
    folder = ROOT / PACKAGES[package] / package
    broken = [
        f"{name_of(file)} imports {module}; it is for {allowed or 'no file here'}"
        for file in sorted(folder.rglob("*.py"))
        for module, allowed in ONLY_IN[package].items()
        if module in imports(parse(file)) and not any(fnmatch(file.name, pattern) for pattern in allowed)
    ]
    assert not broken


@pytest.mark.parametrize("package", ["rollcast_learners", "rollcast"])
def test_package_files_import_nothing(package: str) -> None:
    assert imports(parse(ROOT / PACKAGES[package] / package / "__init__.py")) == set()


def test_plain_parts_load_neither_torch_nor_ray_nor_an_engine() -> None:
    modules = ["rollcast_learners.types", "rollcast_learners.batch", *(f"rollcast.{part}" for part in PLAIN)]
    assert heavy_in(modules) == "[]"


def test_the_small_actors_load_ray_alone() -> None:
    """The control of a run, and the weight agent of each node."""
    assert heavy_in(["rollcast.control", "rollcast.weights"]) == "['ray']"


def heavy_in(modules: list[str]) -> str:
    """Which of `HEAVY` a fresh process holds after it imported `modules`."""
    script = f"import sys, {', '.join(modules)}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(str(ROOT / root) for root in PACKAGES.values()), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_plain_parts_say_so_in_their_imports() -> None:
    """Chat alone names transformers, inside the function that reads a tokenizer."""
    for part in PLAIN:
        found = imports(parse(ROOT / "services" / "rollcast" / f"{part}.py")) & set(HEAVY)
        assert found <= ({"transformers"} if part == "chat" else set()), part


def test_nothing_unsafe_is_called() -> None:
    found = [(name_of(file), what) for file in FILES for what in unsafe(parse(file))]
    assert not [f"{name}: {what}" for name, what in found if what not in SANDBOXED.get(name, ())]


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    import pickle",
        "from pickle import loads as innocent",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "host = 'http://0.0.0.0:80'",
    ],
)
def test_the_lint_sees(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["model.eval()", "json.load(file)", "run(line, shell=False)", "load(path, trust_remote_code=asked)"]
)
def test_the_lint_lets_pass(code: str) -> None:
    assert not list(unsafe(ast.parse(code)))


def test_no_file_is_too_long_to_read() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
