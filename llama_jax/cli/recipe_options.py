"""Options for quantising weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import gathered
from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.recipe import Recipe


@dataclass(frozen=True)
class RecipeOptions:
    """Values of `recipe_options`."""

    weights: str | None
    group: int | None
    symmetric: bool
    lm_head: str | None
    embed: str | None
    ignore: tuple[str, ...]

    def recipe(self, method: str = "rtn") -> Recipe | None:
        """The recipe, None without `--weights`. Imports jax.

        Args:
          method: the method that finds codes.

        Raises:
          RequestError: see `llama_jax.recipe.recipe`; or other options are given without `--weights`.
        """
        tops = {name: value for name in ("lm_head", "embed") if (value := getattr(self, name)) is not None}
        if self.weights is None:
            if self.group is not None or self.symmetric or tops or self.ignore:
                raise RequestError(
                    "nothing says what weights are to be stored in",
                    param="weights",
                    hint="add --weights, e.g. --weights int4",
                )
            return None
        from llama_jax.recipe import recipe

        symmetric = True if self.symmetric else None
        return recipe(self.weights, group=self.group, symmetric=symmetric, ignore=self.ignore, method=method, **tops)


recipe_options = gathered(
    RecipeOptions,
    "wanted",
    click.option("--weights", metavar="LAYOUT", help="int8, int4 or fp8, or a full name such as int4_g128_zero."),
    click.option(
        "--group",
        type=int,
        metavar="N",
        help="Numbers of a row that share a scale; -1 for the whole row. [default: 64 for int4, else the whole row]",
    ),
    click.option("--symmetric", is_flag=True, help="int4 without minima: smaller, less exact."),
    click.option(
        "--lm-head",
        metavar="LAYOUT",
        help="Layout of the output projection, or of the embedding that it is tied to; bf16 leaves it unquantised. "
        "[default: int8]",
    ),
    click.option("--embed", metavar="LAYOUT", help="Layout of an untied embedding. [default: bf16]"),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave these weights unquantised, e.g. 'layers.0.*'. Repeatable.",
    ),
)
"""`--weights` and what completes it: a command's argument `wanted`, of `RecipeOptions`."""
