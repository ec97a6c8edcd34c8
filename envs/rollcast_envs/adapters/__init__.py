"""Tasks and environments of other packages, played as text environments; each needs its package only when used."""
