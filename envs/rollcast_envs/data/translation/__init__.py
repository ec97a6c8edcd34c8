"""English sentences and their German, Spanish and French translations, from free programs (see SOURCE.md).

Owns the names of the languages; `<language>.jsonl` has the records and `build.py` makes them.
"""

LANGUAGES = ("de", "es", "fr")
