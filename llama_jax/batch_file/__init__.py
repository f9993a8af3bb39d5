"""Generation over a file: JSON lines in, JSON lines out, resumable after any interruption.

`run` reads requests (`lines`), generates them in batches of similar length, and keeps the results in a `journal` that
survives a kill at any moment. `scripts/batch_generate.py` is its command line.
"""

from __future__ import annotations

from llama_jax.batch_file.runner import Status, Summary, run

__all__ = ["Status", "Summary", "run"]
