"""Batch generation from a file: JSON lines in, JSON lines out, resumable after any interruption.

`BatchFile` reads requests (`lines`; our own format in `own`, OpenAI's in `openai`), runs them on an engine
(`generation.llm`), and keeps the results in a `journal` that survives a kill at any moment. `llama-jax batch` is its
command line.
"""

from __future__ import annotations

from llama_jax.batch_file.lines import Findings
from llama_jax.batch_file.runner import BatchFile, Status, Summary, run

__all__ = ["BatchFile", "Findings", "Status", "Summary", "run"]
