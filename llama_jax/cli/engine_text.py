"""An engine's numbers for people: one line beside other progress, or a block of lines. Imports no jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_jax.cli.terminal import meter, ms_text

if TYPE_CHECKING:
    from llama_jax.engine.publishing import Published
    from llama_jax.engine.snapshot import Snapshot

_BAR = 24
_LABEL = 10


def engine_line(snapshot: Snapshot) -> str:
    """The line for progress, e.g. "312.5 tok/s, 8 running, 12 waiting, cache 34 % in use"."""
    counts = snapshot.counts
    waiting = f", {counts.waiting} waiting" if counts.waiting else ""
    return (
        f"{snapshot.tokens_per_s:.1f} tok/s, {counts.running} running{waiting}, "
        f"cache {snapshot.cache_use:.0%} in use".replace("%", " %")
    )


def engine_block(engine: Published) -> list[str]:
    """Lines with an engine's full report."""
    snapshot, counts = engine.snapshot, engine.snapshot.counts
    shares = [
        f"{name} {share:.2f}" for name, share in (("MBU", snapshot.mbu), ("MFU", snapshot.mfu)) if share is not None
    ]
    facts = {
        "requests": [
            f"{counts.running} running",
            f"{counts.waiting} waiting",
            f"{engine.rows} rows of {engine.context} tokens",
            f"{counts.preemptions} preemptions",
            f"{snapshot.failed} failed",
        ],
        "tokens": [
            f"{snapshot.tokens_per_s:.1f} a second",
            f"{snapshot.tokens_in} in",
            f"{snapshot.tokens_out} out",
            f"{counts.prefix_hit_tokens} found in the cache",
        ],
        "steps": [
            f"{snapshot.steps}",
            f"{ms_text(snapshot.step_s)} each",
            f"{snapshot.padding_share:.1%} padding",
            *([f"{' '.join(shares)} ({snapshot.peak})"] if shares else []),
        ],
        "pages": [
            f"[{meter(snapshot.cache_use, _BAR)}] {counts.pages_used} used",
            f"{counts.pages_cached} cached",
            f"{counts.pages_free + counts.pages_fenced} free",
            f"in {snapshot.kv_dtype}",
        ],
        "programs": [
            f"{snapshot.programs}",
            f"{snapshot.programs_from_cache} from the cache",
            *([f"{snapshot.programs_behind} compiling"] if snapshot.programs_behind else []),
            "not all compiled" if snapshot.ready_s is None else f"ready in {snapshot.ready_s:.1f} s",
            f"{snapshot.late_compilations} late compilations",
        ],
    }
    several = f"{engine.replicas} replicas  " * (engine.replicas > 1)
    head = f"{engine.model or 'model'}  {several}{engine.device}  {engine.dtype}  pid {engine.pid}"
    return [head, *(f"  {name:<{_LABEL}}{', '.join(parts)}" for name, parts in facts.items())]
