"""With which options of XLA many decode steps are compiled, where these are not XLA's own choice."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.doctor.report import Check


def check_graphs(graphs: Sequence[dict[str, str]]) -> list[Check]:
    """What `graph_options` gives on one device and, if there are several, for a model that is split over them."""
    return [
        Check("graphs", "ok", f"{what} of a batch are compiled with {' '.join(map('='.join, options.items()))}")
        for what, options in zip(("decode steps", "a split model's decode steps"), graphs, strict=False)
        if options
    ]
