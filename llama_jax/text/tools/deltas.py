"""Pieces into which a model's text is parsed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of a call of the tool `name`; calls follow one another and are never nested."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of the last `Call`: a part of the text of a JSON object."""

    text: str


Delta = Text | Reasoning | Call | Arguments
