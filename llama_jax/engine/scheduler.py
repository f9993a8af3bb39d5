from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llama_jax.engine.steps import *


@dataclass(frozen=True)
class Limits:
    rows: int
    pages: int
    page_size: int
    pages_per_row: int
    budget: int
    chunk_rows: int
    waiting: int | None = None
    steps: int = 1
    boundary: int | None = None
    prefix_cache: bool = True


class Scheduler:
    def __init__(self, limits):
        self.l = limits
        self.n = 0
        self.waiting = deque()
        self.running = {}
        self.leaving = []
        self.free = deque(range(limits.pages))
        self.rows = list(range(limits.rows))[::-1]

    def add(self, s):
        self.waiting.append(s)

    def cancel(self, id):
        self._end(id)

    def finish(self, id, *, keep=True):
        self._end(id)

    def _end(self, id):
        self.waiting = deque(s for s in self.waiting if s.id != id)
        s = self.running.pop(id, None)
        if s:
            self.free.extend(s.pages)
            self.rows.append(s.row)
            self.leaving.append(s.row)

    def drawn(self, id, tokens):
        if id in self.running:
            self.running[id].tokens.extend(tokens)

    def ended(self, n):
        pass

    def schedule(self):
        l = self.l
        pages = []
        chunks = []
        joining = []
        left = l.budget
        dec = [s for s in self.running.values() if s.computed >= s.prompt_length and 0 < s.drawn < s.limit]
        k = l.steps if not self.waiting and all(s.computed >= s.prompt_length for s in self.running.values()) else 1
        for s in dec:
            while len(s.pages) * l.page_size < s.computed + k:
                pages.append((s.row, len(s.pages), self.free.popleft()))
                s.pages.append(pages[-1][2])
        left -= len(dec)

        def chunk(s):
            nonlocal left
            n = min(left, s.prompt_length - s.computed)
            chunks.append(Chunk(s, s.row, s.computed, n, s.limit > 0 and s.computed + n == s.prompt_length))
            s.computed += n
            left -= n
            s.drawn += chunks[-1].draws

        for s in self.running.values():
            if s.computed < s.prompt_length and left and len(chunks) < l.chunk_rows:
                chunk(s)
        while (
            self.waiting
            and self.rows
            and left
            and len(chunks) < l.chunk_rows
            and len(self.free) * l.page_size >= len(self.waiting[0].tokens) + 1
        ):
            s = self.waiting.popleft()
            s.row = self.rows.pop()
            self.running[s.id] = s
            joining.append(Joining(s.row, s, 0))
            for i in range(-(-len(s.tokens) // l.page_size)):
                s.pages.append(self.free.popleft())
                pages.append((s.row, i, s.pages[-1]))
            chunk(s)
        for s in dec:
            s.computed += k
            s.drawn += k
        if not chunks and not dec:
            return None
        self.n += 1
        leaving, self.leaving = tuple(self.leaving), []
        return Step(self.n, leaving, tuple(joining), tuple(pages), tuple(chunks), tuple(dec), 1 if chunks else k)
