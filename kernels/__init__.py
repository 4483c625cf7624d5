"""Implementations of the four functions between which the collectives sit; see `seam.py` for what
they exchange."""
