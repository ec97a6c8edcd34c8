"""Finds functions that stand alone in a library's source, and the checks in their docstrings.

Owns: what stands alone, what is a check, and the prompt without what it hides. Reads source as text: nothing of a
library is imported or run here. Does not know libraries (`build.py` does), nor whether a check holds.
"""

import ast
import builtins
import doctest
import re
import textwrap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

from rollcast_envs.sandbox_child import MODULES, THROUGH

MAX_LINES = 60
"""Lines of a function with all that it needs."""
MAX_RANGE = 30
"""The longest `range` that is written out as a list."""
MAX_TEXT = 600
"""Characters of a check's arguments or of its expected value."""


LEADS_NOWHERE = re.compile(
    r"^[ \t]*(?:(?:for )?examples?|doctests?|usage)\b[\w ]{0,20}:*\n(?:[ \t]*[-=~]+$)?|^[ \t]*\.\. version\w+::.*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Headings of examples, which are taken out."""
POINTS_ELSEWHERE = re.compile(r"^[ \t]*(?:see also|references?):?\n.*\Z", re.IGNORECASE | re.MULTILINE | re.DOTALL)
"""Last sections that help nobody to write the function."""


class Check(NamedTuple):
    """One call and what it gives, as literals. Docstring -> problem."""

    args: str
    """As they stand between the parentheses of a call."""
    expected: str
    through: str = ""
    """What the result is passed through, such as `list`; "" for nothing."""


@dataclass(frozen=True)
class Found:
    """A function that stands alone. Library -> problem."""

    name: str
    preamble: str
    """Imports and helpers that it needs, in order; "" for none."""
    signature: str
    """From `def` to the colon."""
    source: str
    """The whole function, without its docstring."""
    docstring: str
    """Dedented, with its examples."""
    checks: tuple[Check, ...]
    """In the order of the docstring."""

    def prompt(self, shown: Check) -> str:
        """Signature and docstring, with one example and without all others."""
        text = textwrap.indent(described(self.docstring, self.name, shown), "    ")
        return f'{self.signature}\n    """\n{text}\n    """\n'


def functions(source: str) -> Iterator[Found]:
    """The public functions of a file that stand alone and have at least two checks."""
    tree = ast.parse(source)
    parts = {name: node for node in tree.body for name in _names_bound(node)}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
            continue
        docstring = ast.get_docstring(node)
        checks = tuple(checks_of(docstring, node.name)) if docstring else ()
        needed = _needed(node, parts)
        if docstring and len(checks) >= 2 and needed is not None:
            yield _found(node, needed, docstring, checks)


def _found(node: ast.FunctionDef, needed: list[ast.stmt], docstring: str, checks: tuple[Check, ...]) -> Found:
    bare = _without_annotations(node)
    del bare.body[0]
    bare.body = bare.body or [ast.Pass()]
    source = ast.unparse(bare)
    return Found(
        name=node.name,
        preamble="\n".join(ast.unparse(part) for part in needed),
        signature=source.splitlines()[0],
        source=source,
        docstring=docstring,
        checks=checks,
    )


def _without_annotations(node: ast.FunctionDef) -> ast.FunctionDef:
    """A copy whose signature has no types: they name what only the library has."""
    bare = deepcopy(node)
    bare.returns = None
    arguments = bare.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return bare


def _names_bound(node: ast.stmt) -> list[str]:
    """What a statement at the top of a file defines, if it is one that a function may need."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        return [node.name]
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
        return [node.targets[0].id]
    return []


def _needed(function: ast.FunctionDef, parts: Mapping[str, ast.stmt]) -> list[ast.stmt] | None:
    """The other statements of the file without which the function does not run; None if it does not stand alone."""
    needed: dict[ast.stmt, None] = {}
    waiting: list[ast.stmt] = [function]
    lines = 0
    while waiting:
        node = waiting.pop()
        lines += (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
        if lines > MAX_LINES:
            return None
        for name in sorted(_names_used(node)):
            part = parts.get(name)
            if part is None or (isinstance(part, ast.Import | ast.ImportFrom) and not _is_standard(part)):
                return None
            if part is not function and part not in needed:
                needed[part] = None
                waiting.append(part)
    return sorted((_stripped(part) for part in needed), key=lambda part: part.lineno)


def _stripped(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, ast.FunctionDef):
        return node
    bare = _without_annotations(node)
    if _docstring_lines(node):
        del bare.body[0]
        bare.body = bare.body or [ast.Pass()]
    return bare


def _docstring_lines(node: ast.stmt) -> int:
    if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def _names_used(node: ast.stmt) -> set[str]:
    """Names that a statement takes from its file: neither built in nor bound within."""
    node = _without_annotations(node) if isinstance(node, ast.FunctionDef) else node
    if isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    bound: set[str] = set()
    used: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            (used if isinstance(child.ctx, ast.Load) else bound).add(child.id)
        elif isinstance(child, ast.arg):
            bound.add(child.arg)
        elif isinstance(child, ast.FunctionDef | ast.ClassDef) and child is not node:
            bound.add(child.name)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            bound.update(_names_bound(child) if _is_standard(child) else ())
        elif isinstance(child, ast.ExceptHandler) and child.name:
            bound.add(child.name)
    return used - bound - set(dir(builtins)) - ({node.name} if isinstance(node, ast.FunctionDef) else set())


def _is_standard(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    level = node.level if isinstance(node, ast.ImportFrom) else 0
    return level == 0 and set(names) <= set(MODULES)


def checks_of(docstring: str, name: str) -> Iterator[Check]:
    """The examples of a docstring that are one call of `name` with literals, whose result is a literal."""
    known: dict[str, ast.expr] = {}
    seen = set()
    for example in examples_of(docstring):
        node = _parsed(example.source)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = node.value
        check = _check(node.value, example.want, name, known) if isinstance(node, ast.Expr) else None
        if check and check.args not in seen and max(len(check.args), len(check.expected)) <= MAX_TEXT:
            seen.add(check.args)
            yield check


def examples_of(docstring: str) -> list[doctest.Example]:
    try:
        return doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # An example that is written wrongly.
        return []


def _parsed(source: str) -> ast.stmt | None:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return None
    return body[0] if len(body) == 1 else None


def _check(node: ast.expr, want: str, name: str, known: Mapping[str, ast.expr]) -> Check | None:
    match _Substitute(known).visit(deepcopy(node)), want:
        case ast.Compare(call, [ast.Eq()], [expected]), "True\n":
            want = ast.unparse(expected)
        case call, _:
            pass
    through = ""
    match call:
        case ast.Call(ast.Name(outer), [inner], []) if outer in THROUGH:
            through, call = outer, inner
    match call:
        case ast.Call(ast.Name(called), args, keywords) if called == name:
            values = [*args, *(keyword.value for keyword in keywords)]
            expected_text = _literal_text(want)
            if expected_text and all(map(is_literal, values)) and all(keyword.arg for keyword in keywords):
                return Check(ast.unparse(call)[len(name) + 1 : -1], expected_text, through)
    return None


class _Substitute(ast.NodeTransformer):
    """Puts in what the docstring's variables stand for, and writes out short ranges."""

    def __init__(self, known: Mapping[str, ast.expr]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self._known.get(node.id)
        return value if value is not None and is_literal(value) else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "range" and all(map(is_literal, node.args)):
            numbers = [ast.literal_eval(argument) for argument in node.args]
            if (
                numbers
                and all(type(number) is int and abs(number) <= 1000 for number in numbers)
                and 0 not in numbers[2:]
            ):
                items = range(*numbers)
                if len(items) <= MAX_RANGE:
                    return ast.List([ast.Constant(item) for item in items], ast.Load())
        return node


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _literal_text(want: str) -> str:
    """An expected output as the text of a literal; "" if it is none."""
    text = want.strip()
    try:
        return ast.unparse(ast.parse(text, mode="eval")) if is_literal(ast.parse(text, mode="eval").body) else ""
    except SyntaxError:
        return ""


def described(docstring: str, name: str, shown: Check) -> str:
    """The docstring with one check as its only example, and without what only led to the others."""
    lines = docstring.splitlines()
    hidden = {number for example in examples_of(docstring) for number in _lines_of(example)}
    prose = "".join(f"{line.rstrip()}\n" for number, line in enumerate(lines) if number not in hidden)
    prose = LEADS_NOWHERE.sub("", POINTS_ELSEWHERE.sub("", prose))
    prose = re.sub(r"\n{3,}", "\n\n", prose).strip()
    call = f"{name}({shown.args})"
    call = f"{shown.through}({call})" if shown.through else call
    return f"{prose}\n\n>>> {call}\n{shown.expected}"


def _lines_of(example: doctest.Example) -> range:
    return range(example.lineno, example.lineno + example.source.count("\n") + example.want.count("\n"))
