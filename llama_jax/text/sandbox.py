"""The Jinja environment of chat templates: that of transformers, with a few limits."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llama_jax.errors import TemplateError

if TYPE_CHECKING:
    import jinja2

MAX_OUTPUT = 1 << 20
"""Characters that a template may write beyond four times the size of its messages."""


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> jinja2.Template:
    """Compile a template, with caching.

    Raises:
      TemplateError: it has a syntax error; the message gives the line.
    """
    import jinja2

    try:
        return environment().from_string(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}", hint="correct the template"
        ) from error
    except RecursionError as error:
        raise TemplateError("the chat template is nested too deeply", hint="use another template") from error


@functools.lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The sandboxed environment of transformers' `apply_chat_template` (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here that text is written unchanged."""

        tags = {"generation"}  # noqa: RUF012 (as its base class declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in transformers: variables set in the body are local to it.
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Callable[[], str]) -> str:
            return caller()

    class SafeNamespace(Namespace):
        """A namespace without underscore names, which would expose Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args  # allows an attribute named "self"
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                SafeNamespace.check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class Sandbox(ImmutableSandboxedEnvironment):
        """A sandbox that also refuses products and powers that would exhaust memory, such as 'a' * 10**9."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
            too_large = False
            if all(isinstance(size, int) for size in sizes):
                of_numbers = isinstance(left, int) and isinstance(right, int)
                too_large = sizes[1] > 1000 if operator == "**" else not of_numbers and sizes[0] * sizes[1] > MAX_OUTPUT
            if too_large:
                raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Dict:
        """The `dict` of templates: a function, not the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, dict=Dict(), namespace=SafeNamespace)
    return sandbox


@functools.lru_cache(maxsize=16)
def template_literals(template: str) -> tuple[str, ...]:
    """All text literals of a template: its raw text and its string constants.

    Raises:
      TemplateError: the template has a syntax error.
    """
    from jinja2 import nodes

    compile_template(template)
    tree = environment().parse(template)
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return tuple(sorted(texts))
