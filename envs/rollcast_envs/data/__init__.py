"""Data shipped with the environments; each folder has a SOURCE.md and the script that built it."""
