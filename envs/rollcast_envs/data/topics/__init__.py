"""Definitions and what sort of thing each defines, from WordNet 3.0 (see SOURCE.md).

The folder holds the data and what built them; the classification task asks for the sort.
"""
