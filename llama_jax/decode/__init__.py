"""Prefill and decode on the device: token ids in, token ids out.

`buckets` says which shapes there are, `prefill` puts prompts into a cache, `loop` holds the decode step and the loop
that runs it, `graphs` the compiler options of many steps.
"""

from __future__ import annotations
