"""What an implementation of an operation is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llama_jax.targets import Target


def _always(target: Target, *args: Any, **kwargs: Any) -> str | None:
    return None


def _none(target: Target, *args: Any, **kwargs: Any) -> Iterable[Any]:
    return ()


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
      run: takes the operation's arguments, and returns what its reference returns. Where `tiles` is set it also takes
        the keyword `tiles`, one of these or None for its own choice.
      unsupported: takes the target and the operation's arguments; why this backend cannot run them there, or None.
      tiles: a frozen dataclass of integers, what there is to tune; its field names are the keys in the tables.
      candidates: takes the target and the operation's arguments; the tiles that are worth measuring there.
      interpreted: whether it runs in an interpreter, for tests: on a GPU it is neither checked nor tuned.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = _always
    tiles: Callable[..., Any] | None = None
    candidates: Callable[..., Iterable[Any]] = _none
    interpreted: bool = False
