"""Benchmarks are run by hand: here only that their scripts parse, their parts are there, and peers stand alone."""

import ast
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
PEERS = [file for file in SCRIPTS if file.name.startswith("trl_")]
SHARED = [BENCHMARKS / "peer_task.py", BENCHMARKS / "quiz.py"]


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "end_to_end", raising=False)
    import end_to_end

    return end_to_end


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_every_script_parses_and_says_what_it_is_for(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    compile(source, str(file), "exec")  # Raises `SyntaxError` for more than the parser does.
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("file", [*PEERS, *SHARED], ids=lambda file: file.name)
def test_a_peer_runs_without_rollcast(file: Path) -> None:
    assert not imported(file) & {"rollcast", "rollcast_envs", "rollcast_learners", "end_to_end"}


def test_every_workload_has_its_files(end_to_end: object) -> None:
    for workload in end_to_end.WORKLOADS.values():  # type: ignore[attr-defined]
        scripts = {script[0] for script in workload.peers.values()}
        assert scripts <= {file.name for file in PEERS}
        assert (BENCHMARKS / workload.config).is_file()
