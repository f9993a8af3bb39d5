"""`Llama` as a Flax Linen module: a thin wrapper of `param_specs` and `forward`, without any layers.

    model = Llama(config)
    variables = model.init(jax.random.key(0), tokens)
    logits, cache = model.apply(variables, tokens)

`variables["params"]` is the same tree that `init_params`, checkpoints and `forward` use, so weights can be used in
the functional and the module style alike.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.model import forward
from llama_jax.params import Params, abstract_params, init_params


class Llama(nn.Module):
    """A Llama whose parameters Flax manages.

    Attributes:
      config: what the model is.
      param_dtype: dtype of fresh parameters; the config's by default.
    """

    config: LlamaConfig
    param_dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array | None, positions: jax.Array | None = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        """Arguments and results of `llama_jax.forward`."""
        return forward(self._params(), self.config, tokens, positions, cache, **kwargs)

    def _params(self) -> Params:
        """The whole tree, one Linen parameter per top-level entry ("embed", "layers", ...)."""
        dtype = jnp.dtype(self.param_dtype or self.config.dtype)

        def entry(key: jax.Array, name: str) -> Any:
            # Every entry starts from the same key, as in init_params; jit leaves out what the others need.
            return jax.jit(lambda key: init_params(self.config, key, dtype)[name])(key)

        names = tuple(abstract_params(self.config))
        if not self.is_initializing():
            return {name: self.get_variable("params", name) for name in names}
        key = self.make_rng("params")
        return {name: self.param(name, lambda _, n=name: entry(key, n)) for name in names}
