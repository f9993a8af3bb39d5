"""Small schedulers and sequences for single cases."""

from __future__ import annotations

from typing import Any

from scheduler_host import Host

from llama_jax.engine.limits import Limits
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.steps import Step


def host(ahead: int = 1, **changes: Any) -> Host:
    sizes: dict[str, Any] = {"rows": 4, "pages": 64, "page_size": 4, "pages_per_row": 64, "budget": 16, "chunk_rows": 4}
    return Host(Limits(**(sizes | changes)), ahead)


def sequence(id: int, prompt: int | list[int], limit: int = 4, **changes: Any) -> Sequence:
    """With a prompt of that many tokens, different from those of other sequences."""
    tokens = [id + 100] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence(id, tokens, len(tokens), limit, **changes)


def planned(step: Step | None) -> Step:
    assert step is not None
    return step


def ids(step: Step | None) -> tuple[list[int], list[int]]:
    """Whose prompts a step computes, and who decodes in it."""
    step = planned(step)
    return [chunk.sequence.id for chunk in step.chunks], [s.id for s in step.decoding]


def step_now(host: Host) -> Step:
    """Plans a step, and has all in flight end."""
    step = planned(host.schedule())
    while host.flights:
        host.deliver()
    host.audit()
    return step
