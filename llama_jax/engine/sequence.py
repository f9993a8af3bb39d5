from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    id: int
    tokens: list[int]
    prompt_length: int
    limit: int
    priority: int = 0
    domain: tuple = ()
    reuse: bool = True
    row: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    drawn: int = 0
