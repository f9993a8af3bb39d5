"""Prefill and decode on the device: token ids in, token ids out.

`buckets` defines the shapes, `prefill` puts prompts into a cache, `loop` holds the decode step and the loop that runs
it, `graphs` the compiler options of multi-step programs.
"""

from __future__ import annotations
