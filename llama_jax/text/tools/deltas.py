"""Pieces of what the text of a model turns out to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what precedes the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call of the tool `name`; calls follow one another, none is inside of another."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of the last `Call`: a part of the text of a JSON object."""

    text: str


Delta = Text | Reasoning | Call | Arguments
