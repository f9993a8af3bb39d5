"""The interface of an operation's implementations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llama_jax.errors import KernelError
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
      indexed: of attention: whether it takes `Places.q_index`, and reads packed queries where they are.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = _always
    tiles: Callable[..., Any] | None = None
    candidates: Callable[..., Iterable[Any]] = _none
    interpreted: bool = False
    indexed: bool = False

    @classmethod
    def at(
        cls,
        module: str,
        *,
        candidates: Callable[..., Iterable[Any]] | None = None,
        interpreted: bool = False,
        indexed: bool = False,
        **options: Any,
    ) -> Backend:
        """A backend made of `run` and `unsupported` of a module, which is imported when one of them is first called.

        Args:
          module: its import name; Pallas, which takes 0.3 s to import, is loaded by those who run it.
          candidates, interpreted, indexed: as above; with candidates there is something to tune, the module's `Tiles`.
          options: further keywords of both functions.

        Raises:
          KernelError: by the first call: the module cannot be imported.
        """

        def function(name: str, **options: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    found = importlib.import_module(module)
                except ImportError as error:
                    raise KernelError(
                        f"the module {module!r} of a backend cannot be imported: {error}",
                        hint="install what it needs, or name another backend",
                    ) from error
                return getattr(found, name)(*args, **kwargs, **options)

            return call

        return cls(
            function("run", **options),
            function("unsupported", **options),
            tiles=None if candidates is None else function("Tiles"),
            candidates=candidates or _none,
            interpreted=interpreted,
            indexed=indexed,
        )
