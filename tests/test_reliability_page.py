"""docs/reliability.md, held to the tests: each that it names is there, and is where it says."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.compile(r"`(test_\w+)`( \(soak\))?")


def soak_by_name() -> dict[str, bool]:
    found = {}
    for file in TESTS.rglob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        whole = (
            any("soak" in ast.unparse(n) for n in tree.body if isinstance(n, ast.Assign)) or file.parent.name == "soak"
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[node.name] = whole or "pytest.mark.soak" in map(ast.unparse, node.decorator_list)
    return found


def test_every_promise_names_tests_that_are_there() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    said = {name: bool(soak) for name, soak in NAMED.findall(page)}
    known = soak_by_name()
    assert len(said) > 40
    assert said == {name: known.get(name) for name in said}
