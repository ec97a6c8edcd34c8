"""Sentences with the people, places and organisations that they name, derived from WordNet 3.0 (see SOURCE.md).

The folder holds the data and what built them; the extraction task says what is asked.
"""
