"""Server routes added by other packages: the group `llama_jax.endpoints` of `llama_jax.plugins`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.routing import compile_path

from llama_jax import plugins
from llama_jax.plugins import Plugin
from llama_jax.server.operations import Operation


def operations() -> tuple[Operation, ...]:
    """Return the operations of sound plugins."""
    return tuple(operation for plugin in plugins.sound(plugins.ENDPOINTS) for operation in _of(plugin.value))


def plugin_problem(plugin: Plugin, earlier: Sequence[Plugin]) -> str:
    """Return the problem with a plugin of the group; "" if none."""
    made = _of(plugin.value)
    if not isinstance(made, tuple | list) or not all(isinstance(one, Operation) for one in made):
        return "it is neither a llama_jax.server.operations.Operation nor a tuple of them"
    if not made:
        return "it adds no route"
    for at, operation in enumerate(made):
        others = [one for other in earlier for one in _of(other.value)] + [*made[:at]]
        if problem := _problem(operation, others):
            return problem
    return ""


def _of(value: Any) -> Any:
    return (value,) if isinstance(value, Operation) else value


def _problem(operation: Operation, others: Iterable[Operation]) -> str:
    """The problem that would make it fail at its first request, or take requests from another route."""
    path = operation.path
    if operation.method not in ("GET", "POST"):
        return f"the method of {path} is {operation.method!r}, and neither GET nor POST"
    try:
        compile_path(path)
    except (AssertionError, ValueError, TypeError, AttributeError) as error:
        return f"{path!r} is not a path of a route: {error}"
    if not path.startswith("/"):
        return f"the path {path!r} does not begin with a slash"
    for kind in (operation.body, operation.answer):
        try:
            msgspec.json.schema_components([] if kind is None else [kind])
        except Exception as error:  # third-party field types may raise anything
            return f"{kind} cannot be described: {error}"
    if taken := next((core for core in _core_paths() if _meet(path, core)), None):
        return f"the route {path} meets {taken}, which is the server's own"
    if any(_meet(path, other.path) and other.method == operation.method for other in others):
        return f"there is another route {path}"
    return ""


def _core_paths() -> list[str]:
    from llama_jax.server import page
    from llama_jax.server.app import OPERATIONS  # which the application places before these

    return [*(operation.path for operation in OPERATIONS), *page.FILES]


def _meet(one: str, other: str) -> bool:
    """Whether both routes match a common path, judging by one example of each."""
    (this, this_example), (that, that_example) = _route(one), _route(other)
    return bool(this.match(that_example) or that.match(this_example))


def _route(path: str) -> tuple[Any, str]:
    """A route's pattern, and a path that it matches."""
    pattern, form, convertors = compile_path(path)
    return pattern, form.format(**dict.fromkeys(convertors, "0"))
