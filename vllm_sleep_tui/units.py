"""Units and how they are written: bytes in GiB, seconds; one way for every face."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30


def gib(size: float) -> str:
    """Bytes as people read them: 18.5 GiB."""
    return f"{size / GIB:.1f} GiB"


def time_text(seconds: float) -> str:
    """A measured or expected time as people read it: 0.48 s, 12 s."""
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
