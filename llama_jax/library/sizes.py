"""Sizes as people write them."""

from __future__ import annotations


def size_text(nbytes: int) -> str:
    """Bytes for people, in powers of ten: "269 MB"."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1000
    return f"{value:.3g} TB"
