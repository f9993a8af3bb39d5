"""The description of a Llama-shaped model as data: `LlamaConfig` and the specs it consists of.

Nothing here knows a model family. A family is a way to fill in these fields (`llama_jax.config.hf`); the model reads
only these fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from llama_jax.errors import UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
AttentionKind = Literal["full", "sliding", "chunked"]
QkNorm = Literal["none", "rms", "l2"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context extensions.

    Attributes:
      theta: base of the frequencies.
      kind: "linear" (kaiokendev 2023), "dynamic" (NTK-aware, the base grows with the length), "yarn"
        (arXiv:2309.00071), "llama3" (Llama 3.1 model card).
      factor: context extension factor of every kind but "default".
      original_max_positions: positions seen in pre-training, for "dynamic", "yarn" and "llama3".
      low_freq_factor, high_freq_factor: "llama3" only.
      beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: "yarn" only.
      interleaved: rotate pairs (2i, 2i + 1) instead of (i, i + head_dim / 2).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    interleaved: bool = False


@dataclass(frozen=True)
class QueryScale:
    """Position-dependent query scale, 1 + scale * log(1 + floor((pos + 1) / floor)) (arXiv:2501.19399)."""

    scale: float
    floor: int


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts in place of a dense MLP.

    Attributes:
      router: "softmax" weighs the outputs of the top_k experts by their renormalised softmax probabilities;
        "sigmoid" scales the experts' inputs by the sigmoid of their logits.
      intermediate_size: width of each routed expert.
      shared_intermediate_size: width of the expert that every token passes through; 0 for none.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    shared_intermediate_size: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block.

    Attributes:
      attention: "full", "sliding" (each query sees the last `window` positions, itself included), or "chunked" (each
        query sees the positions of its own chunk of `window`).
      rope: whether queries and keys are rotated.
      qk_norm: "rms" is a learned norm of each head before rope, "l2" an unlearned one after it.
      query_scale: position-dependent query temperature, or None.
      mlp: width of the dense MLP, or the mixture of experts in its place.
    """

    attention: AttentionKind = "full"
    window: int | None = None
    rope: bool = True
    qk_norm: QkNorm = "none"
    query_scale: QueryScale | None = None
    mlp: int | MoeSpec = 0


@dataclass(frozen=True)
class LlamaConfig:
    """Everything `forward` needs to know about a model besides its weights. Hashable, so it can be a static argument.

    Attributes:
      family: name of the source family, kept so that `config_to_hf` can write it back; the model never reads it.
      hf_mlp_module: what the family's Hugging Face checkpoints call a layer's MLP.
      layers: one `LayerSpec` per block, in order.
      num_kv_heads: key/value heads; num_heads is a multiple of it (GQA; equal for MHA, 1 for MQA).
      qkv_bias, o_bias, mlp_bias: whether those projections carry a bias.
      max_position_embeddings: the context length the model was made for, in tokens.
      dtype: dtype of the source weights.
      eos_token_ids: every id that ends a text.
      schemes: pairs of a leaf ("layers.0.attn.q_proj") and the scheme that stores its weight (`llama_jax.schemes`), for
        leaves that are not plain. A checkpoint records them with its tensors, not in config.json.
      activations: what inputs of quantised weights are rounded to, one of `recipe.ACTIVATIONS`; None leaves them in
        floating point. Of a model that is loaded; files have none.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec = RopeSpec()
    rms_norm_eps: float = 1e-5
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    family: str = "llama"
    hf_mlp_module: str = "mlp"
    schemes: tuple[tuple[str, str], ...] = ()
    activations: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise UnsupportedModel(
                    f"{name} must be a positive integer, got {value!r}",
                    hint="sizes are from 1 to 2147483647",
                )
        if not self.layers:
            raise UnsupportedModel("the model has no layers", hint="give `layers` one LayerSpec at least")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
                hint="every key/value head serves equally many query heads",
            )
        if self.head_dim % 2 and any(layer.rope for layer in self.layers):
            raise UnsupportedModel(
                f"rope needs an even head_dim, got {self.head_dim}", hint="rope turns pairs of numbers"
            )
        for i, layer in enumerate(self.layers):
            if layer.attention != "full" and not (layer.window and layer.window > 0):
                raise UnsupportedModel(
                    f"layer {i} has {layer.attention} attention with window {layer.window!r}",
                    hint="give its LayerSpec a window",
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def context_length(self) -> int:
        """Tokens that the model can attend to; "dynamic" rope extends its trained length."""
        stretch = self.rope.factor if self.rope.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def replace(self, **changes: object) -> LlamaConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
