"""Tool calls and reasoning in a model's text, in the formats of different model families.

`formats` holds one `ToolFormat` per format: its incremental parser, and the grammar that constrains a text to it. The
model's own chat template determines the format; other packages can add more (docs/plugins.md).
"""

from __future__ import annotations

from llama_jax.text.tools.deltas import Arguments, Call, Delta, Reasoning, Text
from llama_jax.text.tools.formats import FORMATS, ToolFormat, format_named, format_of
from llama_jax.text.tools.parser import ToolParser
from llama_jax.text.tools.reasoning import Place, ReasoningParser, place_of, reasoning_of
from llama_jax.text.tools.tool import Tool, tools_of

__all__ = [
    "FORMATS",
    "Arguments",
    "Call",
    "Delta",
    "Place",
    "Reasoning",
    "ReasoningParser",
    "Text",
    "Tool",
    "ToolFormat",
    "ToolParser",
    "format_named",
    "format_of",
    "place_of",
    "reasoning_of",
    "tools_of",
]
