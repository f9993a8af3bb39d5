"""Packs a step into the one integer array that its program takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llama_jax.engine import programs
from llama_jax.engine.compiled import Programs
from llama_jax.engine.joining import Asked, Beginnings
from llama_jax.engine.program_set import Key
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import NO_ROW
from llama_jax.engine.steps import Step


@dataclass(frozen=True)
class Packed:
    """A program and its control array.

    Attributes:
      parts: views of the array by name; "pages" is still empty; size: tokens of one step of the program.
      rows: (line of the report, sequence) of those that draw, or that end with the step.
      masks: of the rows with rules, for `verify`; None if there are none.
      spans: (position in its text, first, last token of the step, sequence) of scored prompts.
    """

    key: Key
    control: np.ndarray
    parts: Mapping[str, np.ndarray]
    size: int
    rows: list[tuple[int, Sequence]]
    masks: np.ndarray | None = None
    spans: list[tuple[int, int, int, Sequence]] = field(default_factory=list)


def pack(
    step: Step,
    of: Programs,
    settings: EngineSettings,
    asked: Mapping[int, Asked],
    beginnings: Beginnings,
    *,
    greedy: bool,
) -> Packed:
    """The smallest program for a step, and its control array.

    Args:
      of: the engine's programs; asked: sequences by number.
      greedy: whether all rows that draw only take the most likely token.
    """
    if step.chunks:
        return _mixed(step, of, settings, asked, beginnings, greedy=greedy)
    if step.drafts:
        return _verify(step, of, settings, asked, greedy=greedy)
    return _decode(step, of, settings, greedy=greedy)


def _mixed(
    step: Step,
    of: Programs,
    settings: EngineSettings,
    asked: Mapping[int, Asked],
    beginnings: Beginnings,
    *,
    greedy: bool,
) -> Packed:
    def scores(sequence: Sequence) -> bool:
        return asked[sequence.id].params.prompt_logprobs is not None

    scored = any(scores(chunk.sequence) for chunk in step.chunks)
    rows = [*(sequence.row for sequence in step.decoding), *(chunk.row for chunk in step.chunks)]
    key = of.choose("scored" if scored else "mixed", step.tokens, greedy=greedy, rows=len(rows))
    control = programs.mixed_control(key.size, key.rows or settings.rows, beginnings.size)
    array, parts = control.new(positions=-1, lines=NO_ROW, rows=NO_ROW, pages=NO_ROW, at=key.size)
    packed = Packed(key, array, parts, key.size, [])
    beginnings.write(parts["joining"], step, asked)
    parts["rows"][: len(rows)] = rows
    lines = range(len(rows)) if key.rows else rows

    def draw(line: int, at: int) -> None:
        parts["at"][line], parts["draws"][line] = at, 1

    at = len(step.decoding)
    for place, (line, sequence) in enumerate(zip(lines[:at], step.decoding, strict=True)):
        parts["ids"][place], parts["lines"][place] = -1, line
        draw(line, place)
        packed.rows.append((line, sequence))
    for line, chunk in zip(lines[at:], step.chunks, strict=True):
        sequence, end = chunk.sequence, chunk.start + chunk.count
        here = slice(at, at + chunk.count)
        parts["ids"][here] = sequence.tokens[chunk.start : end]
        parts["positions"][here] = np.arange(chunk.start, end)
        parts["lines"][here] = line
        if scored:
            behind = sequence.tokens[chunk.start + 1 : end + 1]
            parts["next"][at : at + len(behind)] = behind
        if chunk.draws:
            draw(line, here.stop - 1)
        if chunk.draws or (sequence.limit == 0 and end == len(sequence.tokens)):
            packed.rows.append((line, sequence))
        if scores(sequence):
            last = at + min(chunk.count, sequence.prompt_length - 1 - chunk.start)
            packed.spans.append((chunk.start, at, last, sequence))
        at = here.stop
    return packed


def _decode(step: Step, of: Programs, settings: EngineSettings, *, greedy: bool) -> Packed:
    key = of.choose("decode", len(step.decoding), greedy=greedy)
    control = programs.decode_control(key.size)
    array, parts = control.new(rows=NO_ROW, pages=NO_ROW, steps=step.steps)
    rows = [sequence.row for sequence in step.decoding]
    parts["rows"][: len(rows)] = rows
    # The largest program computes all rows in place.
    lines = rows if key.size == settings.rows else range(len(rows))
    return Packed(key, array, parts, key.size, list(zip(lines, step.decoding, strict=True)))


def _verify(step: Step, of: Programs, settings: EngineSettings, asked: Mapping[int, Asked], *, greedy: bool) -> Packed:
    key = of.choose("verify", len(step.decoding), greedy=greedy)
    control = programs.verify_control(key.size, settings.drafts)
    array, parts = control.new(rows=NO_ROW, drafts=-1, pages=NO_ROW)
    rules = {sequence: rule for sequence in step.decoding if (rule := asked[sequence.id].rule)}
    masks = np.zeros(of.masks(key).shape, np.uint32) if rules else None
    for line, sequence in enumerate(step.decoding):
        draft = step.drafts.get(sequence)
        tokens = draft.tokens or () if draft else ()
        parts["rows"][line] = sequence.row
        parts["drafts"][line, : len(tokens)] = tokens
        parts["lookup"][line] = draft.length if draft and draft.tokens is None else 0
        if masks is not None and (rule := rules.get(sequence)):
            parts["masked"][line] = 1
            masks[line, : len(tokens) + 1] = rule.ahead.masks[: len(tokens) + 1]
    return Packed(key, array, parts, key.size * (1 + settings.drafts), list(enumerate(step.decoding)), masks)
