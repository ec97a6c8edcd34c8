"""Which answers of a model may reach a judge that evaluates them as Python.

Owns: the two small languages of such answers. Does not know tasks. Nothing is evaluated here.

Some judges of other packages call Python's or sympy's evaluation on the answer, so that a model could run code in
the process that plays it. What is let through has neither names of more than a letter, apart from a few functions, nor
attributes, and no power that takes for ever to compute.
"""

import ast

MAX_EXPRESSION = 300
MAX_LITERAL = 20_000
MAX_DIGITS = 30
MAX_EXPONENT = 20
FUNCTIONS = frozenset(("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt"))
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UAdd, ast.USub, ast.Pow)
UNPARSABLE = (SyntaxError, ValueError, MemoryError, RecursionError)


def is_literal(answer: str) -> bool:
    """Whether it is a list, a string or the like, as Python writes them.

    >>> is_literal("[[1, 2], [3, 4]]"), is_literal("__import__('os')")
    (True, False)
    """
    if len(answer) > MAX_LITERAL:
        return False
    try:
        ast.literal_eval(answer)
    except (*UNPARSABLE, TypeError):
        return False
    return True


def is_expression(answer: str) -> bool:
    """Whether it is arithmetic over numbers, variables of one letter and the usual functions.

    >>> is_expression("-2*x**3*cos(x) + C"), is_expression("().__class__"), is_expression("9**9**9")
    (True, False, False)
    """
    if len(answer) > MAX_EXPRESSION:
        return False
    try:
        return _fine(ast.parse(answer.strip(), mode="eval").body)
    except UNPARSABLE:
        return False


def _fine(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float) and len(str(node.value)) <= MAX_DIGITS
    if isinstance(node, ast.Name):
        return len(node.id) == 1
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, OPERATORS) and _fine(node.operand)
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        return named and not node.keywords and len(node.args) == 1 and _fine(node.args[0])
    if isinstance(node, ast.BinOp) and isinstance(node.op, OPERATORS) and _fine(node.left) and _fine(node.right):
        return not isinstance(node.op, ast.Pow) or (_small(node.right) and not _has_power(node.left))
    return False


def _small(exponent: ast.expr) -> bool:
    """A number such as 3, -2 or 3/2."""
    if isinstance(exponent, ast.UnaryOp):
        return _small(exponent.operand)
    if isinstance(exponent, ast.BinOp):
        return isinstance(exponent.op, ast.Div) and _small(exponent.left) and _small(exponent.right)
    return isinstance(exponent, ast.Constant) and abs(exponent.value) <= MAX_EXPONENT  # type: ignore[arg-type]


def _has_power(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Pow) for part in ast.walk(node))
