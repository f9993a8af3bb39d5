"""A served model, and what every route needs of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from llama_jax.generation.engine import Engine
from llama_jax.server.metrics import ModelMetrics
from llama_jax.server.settings import ServerSettings
from llama_jax.text.chat import select_template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import ToolFormat, format_named, format_of, reasoning_of


@dataclass(frozen=True)
class Served:
    """An engine, and its identity for clients.

    Attributes:
      names: of the model; answers carry the first.
      created: when it was loaded, in seconds of Unix time.
      tool_parser: name of the model's `ToolFormat`; "" derives it from the chat template.
      adapter: name of the engine's adapter that requests use; "" for none.
    """

    engine: Engine
    tokenizer: Tokenizer
    names: tuple[str, ...]
    settings: ServerSettings
    metrics: ModelMetrics
    tool_parser: str = ""
    adapter: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def by(self, name: str | None) -> Served:
        """The model as it is called: by the name of an adapter, with that adapter."""
        if name is None or name in self.names:
            return self
        return replace(self, names=(name,), adapter=name)

    @property
    def capacity(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        return min(self.engine.settings.capacity, self.engine.model.config.context_length)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """Format of the model's tool calls; None if unknown, or if it has none.

        Raises:
          RequestError: there is no format named `tool_parser`.
        """
        if self.tool_parser:
            return format_named(self.tool_parser)
        return format_of(self._template(tools=True))

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return "tools" in self._template(tools=True)

    @cached_property
    def reasoning(self) -> tuple[str, str] | None:
        """Marks around the model's reasoning, if it has any."""
        return reasoning_of(self._template(tools=False))

    @cached_property
    def switches_reasoning(self) -> bool:
        """Whether the chat template lets a request turn reasoning on and off."""
        return "enable_thinking" in self._template(tools=False)

    def spelled(self, mark: str) -> str:
        """Return a mark as spelled in a Lark grammar: a control token by its id."""
        number = self.tokenizer.special_tokens.get(mark)
        return json.dumps(mark, ensure_ascii=False) if number is None else f"<[{number}]>"

    def _template(self, *, tools: bool) -> str:
        templates = self.tokenizer.chat_templates
        return select_template(templates, None, has_tools=tools) if templates else ""


def served_name(model: str) -> str:
    """Return the name of a model for clients: for a file or folder only its base name, without its location."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
