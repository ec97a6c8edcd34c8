"""Python functions to write, with checks: HumanEval for test, functions of free libraries to train on (see SOURCE.md).

`problems.jsonl` has the records and `build.py` makes them.
"""
