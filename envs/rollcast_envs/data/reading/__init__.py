"""Questions on the place or person that a sentence names, derived from WordNet 3.0 (see SOURCE.md).

The folder holds the data and what built them; the question-answering task asks them.
"""
