"""Mistakes that an implementation of these models can make, each with the tests that have to notice it.

A mutation is one change of the source text. `tests/test_mutations.py` runs the named tests in a process that reads the
changed text in place of the file: a mutation that survives is a hole in the tests.

Not here, since they change no result: the place of the unlearned head norm relative to rope (a rotation keeps the
length), a softmax over all experts in place of the chosen ones (the weights are divided by their sum afterwards), and
the absolute positions of a plain rope model's prompt (only differences count).
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "tests/test_model.py"
SAMPLING = "tests/test_sampling.py"
DECODE = "tests/test_decode.py"
NORM = "tests/test_kernels_norm.py"
QUANTIZATION = "tests/test_quantization.py"
TRAINING = "tests/test_training.py"
QUANTISED_CACHE_TESTS = "tests/test_quantised_cache.py"


@dataclass(frozen=True)
class Mutation:
    """One wrong version of the source.

    Attributes:
      name: what is wrong with it.
      file: path of the changed file, from the root of the repository.
      old: text that occurs exactly once in the file.
      new: what stands there instead.
      killers: ids of the tests that must fail, every one of them.
    """

    name: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]


def golden(*cases: str) -> tuple[str, ...]:
    """Logits of these cases against Hugging Face transformers."""
    return tuple(f"{MODEL}::test_golden[{case}]" for case in cases)


ROPE: tuple[Mutation, ...] = (
    Mutation(
        "rope theta ignored",
        "llama_jax/model/rope.py",
        "powers = np.float32(spec.theta) ** exponents",
        "powers = np.float32(10_000.0) ** exponents",
        golden("mixtral-moe", "smollm3-nope"),
    ),
    Mutation(
        "llama3 scaling ignored",
        "llama_jax/model/rope.py",
        "return _llama3(spec, inv_freq), 1.0",
        "return inv_freq, 1.0",
        golden("llama3.1-rope"),
    ),
    Mutation(
        "llama3 middle frequencies not interpolated",
        "llama_jax/model/rope.py",
        "return np.where(is_between, between, out).astype(np.float32)",
        "return out.astype(np.float32)",
        golden("llama3.1-rope"),
    ),
    Mutation(
        "linear factor ignored",
        "llama_jax/model/rope.py",
        "return inv_freq / np.float32(spec.factor), 1.0",
        "return inv_freq, 1.0",
        golden("llama-rope-linear", "llama-old-config"),
    ),
    Mutation(
        "yarn attention factor dropped",
        "llama_jax/model/rope.py",
        "return inv_freq.astype(np.float32), factor",
        "return inv_freq.astype(np.float32), 1.0",
        golden("llama-rope-yarn", "llama-rope-yarn-attention-factor"),
    ),
    Mutation(
        "yarn mscale ignored",
        "llama_jax/model/rope.py",
        "if spec.mscale and spec.mscale_all_dim:",
        "if False:",
        golden("llama-rope-yarn-mscale"),
    ),
    Mutation(
        "yarn ramp always rounded to whole dimensions",
        "llama_jax/model/rope.py",
        "if spec.truncate:",
        "if True:",
        golden("llama-rope-yarn-mscale"),
    ),
    Mutation(
        "dynamic rope without its exponent",
        "llama_jax/model/rope.py",
        "base = spec.theta * stretch ** (head_dim / (head_dim - 2))",
        "base = spec.theta * stretch",
        golden("llama-rope-dynamic"),
    ),
    Mutation(
        "dynamic rope grows while decoding",
        "llama_jax/model/transformer.py",
        "return given[:, None] if rows is None else",
        "return jnp.max(positions, axis=1, keepdims=True) + 1 if rows is None else",
        (f"{MODEL}::test_golden_token_by_token[llama-rope-dynamic]",),
    ),
    Mutation(
        "neighbours rotated instead of halves, and the other way round",
        "kernels/rope/reference.py",
        "    if interleaved:\n",
        "    if not interleaved:\n",
        golden("llama2-mha", "llama4-scout-like"),
    ),
    Mutation(
        "rotation in the wrong direction",
        "kernels/rope/reference.py",
        "out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)",
        "out = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)",
        ("tests/test_rope.py::test_rotation_is_multiplication_of_complex_numbers[False]",),
    ),
    Mutation(
        "layers without rope rotated",
        "llama_jax/model/layers.py",
        "if spec.rope:",
        "if True:",
        golden("smollm3-nope", "llama4-interleaved"),
    ),
)

LAYERS: tuple[Mutation, ...] = (
    Mutation(
        "norm's epsilon wrong",
        "kernels/norm/reference.py",
        "keepdims=True) + eps)).astype(x.dtype)",
        "keepdims=True) + 1e-6)).astype(x.dtype)",
        golden("llama-gelu"),
    ),
    Mutation(
        "final norm without what the last MLP adds",
        "llama_jax/model/transformer.py",
        '_, h = add_norm(x, delta, params["final_norm"]',
        '_, h = add_norm(x, None, params["final_norm"]',
        golden("llama2-mha"),
    ),
    Mutation(
        "the last layer's queries at the places of the first tokens",
        "llama_jax/model/transformer.py",
        "x, q, queries = _tokens((x, q, tokens), at)",
        "(x, q), queries = _tokens((x, q), at), tokens\n"
        "        queries = queries if at is None else queries._replace(positions=queries.positions[:, :2])",
        (f"{MODEL}::test_logits_at",),
    ),
    Mutation(
        "captured output of a layer without what its MLP adds",
        "llama_jax/model/transformer.py",
        'total = tap("out", x + delta)',
        'total = tap("out", x)',
        (f"{MODEL}::test_capture",),
    ),
    Mutation(
        "patched output of a layer added to what it replaces",
        "llama_jax/model/transformer.py",
        "x, delta = total, jnp.zeros_like(total)",
        "x = total",
        ("tests/test_patch.py::test_activations_of_another_text[plain]",),
    ),
    Mutation(
        "attention maps of tokens that are not seen",
        "llama_jax/model/attention_map.py",
        "jnp.where(see, logits, MASKED)",
        "logits",
        ("tests/test_patch.py::test_attention_maps_by_hand",),
    ),
    Mutation(
        "digest without the numbers",
        "llama_jax/receipts/making.py",
        "whole.update(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8))",
        "del leaf",
        ("tests/test_receipts.py::test_digest_is_of_all_parameters",),
    ),
    Mutation(
        "mean square over the columns of a program",
        "kernels/norm/pallas_triton.py",
        "jnp.sum(wide * wide, axis=1) * (1 / hidden)",
        "jnp.sum(wide * wide, axis=1) * (1 / width)",
        (f"{NORM}::test_gradients",),
    ),
    Mutation(
        "gradient of the residual sum only through its norm",
        "kernels/norm/gradient.py",
        "for_terms = for_total + through_norm",
        "for_terms = through_norm",
        (f"{NORM}::test_gradients",),
    ),
    Mutation(
        "query, key and value biases missing",
        "llama_jax/model/weights.py",
        "linear(x, params[part], adapters.of(part)",
        'linear(x, {"weight": params[part]["weight"]}, adapters.of(part)',
        golden("qwen2-bias", "llama-biases"),
    ),
    Mutation(
        "fused query, key and value biases missing",
        "llama_jax/model/fuse.py",
        "for member in parts[0]}",
        'for member in ("weight",)}',
        (f"{MODEL}::test_golden_fused[qwen2-bias]",),
    ),
    Mutation(
        "fused keys and values swapped",
        "llama_jax/model/fuse.py",
        "for x in (q, k, v)]",
        "for x in (q, v, k)]",
        (f"{MODEL}::test_golden_fused[llama-mqa]",),
    ),
    Mutation(
        "bias of the projection that a part of a block ends with missing",
        "llama_jax/model/layers.py",
        "return linear(x, params[name], adapters.of(name)",
        'return linear(x, {"weight": params[name]["weight"]}, adapters.of(name)',
        golden("llama-biases", "smollm3-window"),
    ),
    Mutation(
        "bias of a projection that a kernel adds to the residual missing",
        "llama_jax/model/weights.py",
        "if bias is not None or adapters.tree or in_use()",
        "if adapters.tree or in_use()",
        ("tests/test_kernels_fused.py::test_a_model_computes_with_them[plain]",),
    ),
    Mutation(
        "gates and others swapped in fused products",
        "llama_jax/kernels/quantized_matmul/kernel.py",
        "gate, other = apart",
        "other, gate = apart",
        ("tests/test_kernels_fused.py::test_against_float64[plain-1-gate]",),
    ),
    Mutation(
        "a fused norm's mean over too few numbers",
        "llama_jax/kernels/quantized_matmul/kernel.py",
        "fold, size = tiles.fold, x.shape[1]",
        "fold, size = tiles.fold, x.shape[1] - SQUARED",
        ("tests/test_kernels_fused.py::test_against_float64[int8-6-norm]",),
    ),
    Mutation(
        "gate and up swapped",
        "llama_jax/model/weights.py",
        "return activation(gate) * up",
        "return gate * activation(up)",
        golden("llama2-mha"),
    ),
    Mutation(
        "the other approximation of gelu",
        "llama_jax/model/layers.py",
        "jax.nn.gelu(x, approximate=True)",
        "jax.nn.gelu(x, approximate=False)",
        golden("llama-gelu"),
    ),
    Mutation(
        "head norm after rope",
        "llama_jax/model/layers.py",
        """\
    if spec.qk_norm == "rms":
        q = rms_norm(q, norm_weight(params["q_norm"]), dims.rms_norm_eps)
        k = rms_norm(k, norm_weight(params["k_norm"]), dims.rms_norm_eps)
    if spec.rope:
        q = rotate(q, *angles, interleaved=dims.interleaved)
        k = rotate(k, *angles, interleaved=dims.interleaved)
""",
        """\
    if spec.rope:
        q = rotate(q, *angles, interleaved=dims.interleaved)
        k = rotate(k, *angles, interleaved=dims.interleaved)
    if spec.qk_norm == "rms":
        q = rms_norm(q, norm_weight(params["q_norm"]), dims.rms_norm_eps)
        k = rms_norm(k, norm_weight(params["k_norm"]), dims.rms_norm_eps)
""",
        golden("qwen3-qknorm"),
    ),
    Mutation(
        "unlearned head norm dropped",
        "llama_jax/model/layers.py",
        'if spec.qk_norm == "l2":',
        "if False:",
        golden("llama4-scout-like"),
    ),
    Mutation(
        "query temperature counts positions from zero",
        "llama_jax/model/layers.py",
        "(positions.astype(jnp.float32) + 1.0) / spec.query_scale.floor",
        "positions.astype(jnp.float32) / spec.query_scale.floor",
        golden("llama4-interleaved"),
    ),
    Mutation(
        "output projection of an untied model ignored",
        "llama_jax/model/weights.py",
        'params["embed" if tied else "lm_head"]',
        'params["embed"]',
        golden("llama2-mha"),
    ),
)

ATTENTION: tuple[Mutation, ...] = (
    Mutation(
        "scale from the hidden size instead of the head size",
        "llama_jax/model/transformer.py",
        "dims.head_dim**-0.5,\n            in_order",
        "(x.shape[-1] // q.shape[2]) ** -0.5,\n            in_order",
        golden("llama-head-dim"),
    ),
    Mutation(
        "attention scale dropped",
        "kernels/attention/reference.py",
        "logits = logits * rule.scale\n",
        "logits = logits * 1.0\n",
        golden("llama2-mha"),
    ),
    Mutation(
        "causal mask shows the next token",
        "kernels/attention/reference.py",
        "see = (kv_position >= 0) & (kv_position <= q_position)",
        "see = (kv_position >= 0) & (kv_position <= q_position + 1)",
        golden("llama2-mha"),
    ),
    Mutation(
        "causal mask hides the token itself",
        "kernels/attention/reference.py",
        "see = (kv_position >= 0) & (kv_position <= q_position)",
        "see = (kv_position >= 0) & (kv_position < q_position)",
        golden("llama2-mha"),
    ),
    Mutation(
        "padding visible",
        "kernels/attention/reference.py",
        "see = (kv_position >= 0) & (kv_position <= q_position)",
        "see = kv_position <= q_position",
        golden("llama2-mha"),
    ),
    Mutation(
        "sliding window one too wide",
        "kernels/attention/reference.py",
        "see &= q_position - kv_position < visibility.window",
        "see &= q_position - kv_position <= visibility.window",
        golden("mistral-short-window", "smollm3-window"),
    ),
    Mutation(
        "sliding window one too narrow",
        "kernels/attention/reference.py",
        "see &= q_position - kv_position < visibility.window",
        "see &= q_position - kv_position < visibility.window - 1",
        golden("mistral-short-window"),
    ),
    Mutation(
        "chunks begin one token early",
        "kernels/attention/reference.py",
        "see &= q_position // visibility.window == kv_position // visibility.window",
        "see &= (q_position + 1) // visibility.window == (kv_position + 1) // visibility.window",
        golden("llama4-interleaved"),
    ),
    Mutation(
        "query heads given to key heads in turn instead of in groups",
        "kernels/attention/reference.py",
        "q.reshape(batch, q_len, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)",
        "q.reshape(batch, q_len, -1, kv_heads, head_dim).transpose(0, 3, 2, 1, 4)",
        golden("smollm2-odd-heads"),
    ),
    Mutation(
        "packed texts see each other",
        "kernels/attention/reference.py",
        "see &= q_segment == kv_segment",
        "see &= q_segment >= 0",
        (f"{MODEL}::test_packing[every-visibility]",),
    ),
    Mutation(
        "new keys and values one slot late",
        "llama_jax/cache/dense.py",
        "length=self.length + tokens)._laid_out(), self.length",
        "length=self.length + tokens)._laid_out(), self.length + 1",
        (f"{MODEL}::test_golden_token_by_token[llama2-mha]",),
    ),
)

EXPERTS: tuple[Mutation, ...] = (
    Mutation(
        "weights of the chosen experts do not sum to one",
        "llama_jax/model/layers.py",
        "output_scale = weights / jnp.sum(weights, axis=-1, keepdims=True)",
        "output_scale = weights",
        golden("mixtral-moe"),
    ),
    Mutation(
        "sigmoid router scales the output instead of the input",
        "llama_jax/model/layers.py",
        "input_scale = jax.nn.sigmoid(top_logits)",
        "output_scale = jax.nn.sigmoid(top_logits)",
        golden("llama4-scout-like"),
    ),
    Mutation(
        "softmax in place of the router's sigmoid",
        "llama_jax/model/layers.py",
        "input_scale = jax.nn.sigmoid(top_logits)",
        "input_scale = jax.nn.softmax(top_logits, axis=-1)",
        golden("llama4-interleaved"),
    ),
    Mutation(
        "slot 0 of adapters is used",
        "kernels/lora/reference.py",
        "used = (ids[..., None] == jnp.arange(len(scale))) & (ids[..., None] > 0)",
        "used = ids[..., None] == jnp.arange(len(scale))",
        ("tests/test_kernels_lora.py::test_against_numpy[7]",),
    ),
    Mutation(
        "an adapter of a joint projection is added to the one before",
        "kernels/lora/reference.py",
        "[(first, out.shape[-2] - last), (0, 0)]",
        "[(first - 1, out.shape[-2] - last + 1), (0, 0)]",
        ("tests/test_kernels_lora.py::test_against_numpy[2]", "tests/test_kernels_lora.py::test_against_numpy[7]"),
    ),
    Mutation(
        "an adapters' kernel adds up all shares of a sum but the first",
        "kernels/lora/kernel.py",
        "sum(parts[1:], parts[0]) * scale",
        "sum(parts[1:]) * scale",
        ("tests/test_kernels_lora.py::test_shares_of_a_sum",),
    ),
    Mutation(
        "low-rank weights of experts read expert by expert",
        "llama_jax/adapters/files.py",
        'b = members["a"].reshape(count, rank, into), members["b"].reshape(out, rank, count)',
        'b = members["a"].reshape(count, rank, into), members["b"].reshape(out, count, rank).swapaxes(1, 2)',
        ("tests/test_adapters_peft.py::test_attached_adapters_compute_what_peft_does[experts-mixtral]",),
    ),
    Mutation(
        "DoRA's norm of the base alone",
        "llama_jax/adapters/attaching.py",
        "jnp.linalg.norm(moved, axis=1)",
        "jnp.linalg.norm(weight, axis=1)",
        ("tests/test_adapters_peft.py::test_attached_adapters_compute_what_peft_does[dora-llama]",),
    ),
    Mutation(
        "prefixes of one slot found by its next adapter",
        "llama_jax/generation/jobs.py",
        'domain = held.slot, (*domain, ("adapter", str(held.number)))',
        'domain = held.slot, (*domain, ("adapter", str(held.slot)))',
        ("tests/test_adapters_engine.py::test_adapters_come_and_go",),
    ),
    Mutation(
        "shared expert dropped",
        "llama_jax/model/layers.py",
        "return out if shared is None else out + mlp(tokens, shared, dims, Adapters(adapters, adapter_ids))",
        "return out",
        golden("llama4-scout-like"),
    ),
    Mutation(
        "expert weights not transposed in the product",
        "kernels/moe/reference.py",
        "jnp.swapaxes(weight, 1, 2)",
        "weight.reshape(weight.shape[0], weight.shape[2], weight.shape[1])",
        golden("mixtral-moe"),
    ),
    Mutation(
        "experts' results added to the wrong tokens",
        "kernels/moe/reference.py",
        "jnp.zeros_like(rows).at[order].set(rows)",
        "rows[order]",
        golden("mixtral-window-3of8"),
    ),
)

CONVERSION: tuple[Mutation, ...] = (
    Mutation(
        "output projection transposed",
        "convert/hf.py",
        "            self._weights[made.sources[0]].read_into(out)\n",
        "            self._weights[made.sources[0]].read_into(out)\n"
        '            if ".attn.o_proj.weight" in spec.name:\n'
        "                out = np.ascontiguousarray(out.T)\n",
        ("tests/test_verification.py::test_golden[llama2-mha]",),
    ),
    Mutation(
        "fused expert weights not transposed",
        "convert/hf.py",
        "out[expert] = buffer[:, first : first + width].T",
        "out[expert] = buffer[:, first : first + width].reshape(out[expert].shape)",
        ("tests/test_verification.py::test_golden[llama4-scout-like]",),
    ),
    Mutation(
        "fused gate and up experts swapped",
        "convert/hf.py",
        "first = (made.part or 0) * width",
        "first = (made.part == 0) * width",
        ("tests/test_verification.py::test_golden[llama4-scout-like]",),
    ),
    Mutation(
        "GGUF queries left in llama.cpp's order",
        "convert/gguf.py",
        "return array if heads is None else half_rotation(array, heads)",
        "return array",
        ("tests/test_convert_gguf.py::test_unquantised_files[f32]",),
    ),
    Mutation(
        "GGUF keys put in order by the number of query heads",
        "convert/gguf.py",
        'return config.num_kv_heads if leaf.endswith(".attn.k_proj") else None',
        'return config.num_heads if leaf.endswith(".attn.k_proj") else None',
        ("tests/test_convert_gguf.py::test_unquantised_files[f32]",),
    ),
    Mutation(
        "GPTQ zeros not raised by 1",
        "convert/quantized/gptq.py",
        "words.view(np.uint32) + np.uint32(0xFFFFFFFF // largest)",
        "words.view(np.uint32)",
        ("tests/test_convert_quantized.py::test_weights_are_those_of_the_library[gptq-int4]",),
    ),
    Mutation(
        "GPTQ inputs not in the order of activations",
        "convert/quantized/gptq.py",
        "zeros.T, groups)",
        "zeros.T, None)",
        ("tests/test_convert_quantized.py::test_weights_are_those_of_the_library[gptq-int4-act-order]",),
    ),
    Mutation(
        "AWQ outputs in the order of their words",
        "convert/quantized/awq.py",
        "for i, position in enumerate(_POSITION):",
        "for i, position in enumerate(range(8)):",
        ("tests/test_convert_quantized.py::test_weights_are_those_of_the_library[awq]",),
    ),
    Mutation(
        "bitsandbytes nibbles swapped",
        "convert/quantized/bitsandbytes.py",
        "[packed >> 4, packed & np.uint8(15)]",
        "[packed & np.uint8(15), packed >> 4]",
        ("tests/test_convert_quantized.py::test_weights_are_those_of_the_library[bnb-nf4]",),
    ),
    Mutation(
        "zero points of packed weights along the wrong axis",
        "convert/quantized/compressed_tensors.py",
        "unpack(zeros.T, group.bits, rows).T",
        "unpack(zeros, group.bits, rows * zeros.shape[1] // zeros.shape[0]).reshape(grid)",
        ("tests/test_convert_quantized.py::test_weights_are_those_of_the_library[ct-int4-group-asymmetric]",),
    ),
    Mutation(
        "Llama 3.2 Vision with the rope base of Llama 2",
        "llama_jax/config/multimodal.py",
        '"rope_theta": 500_000.0',
        '"rope_theta": 10_000.0',
        ("tests/test_convert_multimodal.py::test_mllama_defaults",),
    ),
    Mutation(
        "exported gate and up experts swapped",
        "convert/export/hf.py",
        "for leaf in leaves])",
        "for leaf in leaves[::-1]])",
        ("tests/test_export_hf.py::test_the_bytes_of_every_golden_come_back[llama4-text]",),
    ),
    Mutation(
        "exported queries left in our order",
        "convert/export/gguf.py",
        "return array if heads is None else pair_rotation(array, heads)",
        "return array",
        ("tests/test_export_gguf.py::test_goldens_are_what_llama_cpp_makes_of_them[llama2-mha]",),
    ),
    Mutation(
        "GGUF export of models that llama.cpp computes otherwise",
        "convert/export/gguf_metadata.py",
        "    if differing:",
        "    if differing and not found:",
        ("tests/test_export_gguf.py::test_models_that_llama_cpp_computes_otherwise_are_refused[llama-gelu]",),
    ),
    Mutation(
        "damaged small files exported",
        "convert/export/source.py",
        "if digest(found[name]) != expected:",
        "if not expected:",
        ("tests/test_export_hf.py::test_damaged_checkpoints_are_named_and_leave_nothing[changed small file]",),
    ),
    Mutation(
        "digest of a tensor not compared",
        "llama_jax/checkpoint/read.py",
        "if found != expected:",
        "if not found:",
        (
            "tests/test_verification.py::test_flipped_bit[False]",
            "tests/test_checkpoint.py::test_damage_is_named[flipped bit]",
        ),
    ),
    Mutation(
        "digest of a small file not compared",
        "llama_jax/checkpoint/lock.py",
        'return None if found == expected else f"{path} has digest {found}, expected',
        'return None if found else f"{path} has digest {found}, expected',
        ("tests/test_checkpoint.py::test_verify_checks_the_small_files",),
    ),
)

TEXT: tuple[Mutation, ...] = (
    Mutation(
        "BOS doubled",
        "llama_jax/text/tokenizer/tokenizer.py",
        "while add_special_tokens and self._adds_bos and ids[:2] == [self.bos_token_id] * 2:",
        "while False:",
        ("tests/test_tokenizer.py::test_bos_is_never_doubled",),
    ),
    Mutation(
        "BOS dropped",
        "llama_jax/text/tokenizer/tokenizer.py",
        "ids = self._encode(escape(_valid(text)), add_special_tokens)",
        "ids = self._encode(escape(_valid(text)), False)",
        (
            "tests/test_tokenizer.py::test_bos_is_never_doubled",
            "tests/test_tokenizer.py::test_post_processor_of_the_file_is_used_without_flags",
        ),
    ),
    Mutation(
        "prompts padded with the wrong positions",
        "llama_jax/decode/prefill.py",
        "positions[row, length - len(ids) :] = np.arange(len(ids))",
        "positions[row, length - len(ids) :] = np.arange(1, len(ids) + 1)",
        (f"{DECODE}::test_prompts_are_padded_on_the_left",),
    ),
    Mutation(
        "first generated token one position late",
        "llama_jax/decode/loop.py",
        "positions=prompt_lengths - 1,",
        "positions=prompt_lengths,",
        (f"{DECODE}::test_greedy_tokens_equal_transformers",),
    ),
    Mutation(
        "a draft kept as a whole",
        "llama_jax/engine/programs.py",
        "going & (part.tokens == following) & ~part.done",
        "going & (following >= 0) & ~part.done",
        ("tests/test_engine_drafts.py::test_wrong_guesses_change_nothing[7]",),
    ),
    Mutation(
        "tokens of a draft that did not come are not taken back",
        "llama_jax/engine/scheduler.py",
        "1 + draft.length - len(tokens)",
        "0",
        ("tests/test_engine_scheduler.py::test_traffic",),
    ),
    Mutation(
        "a draft is found in a text that lacks what other steps have drawn",
        "llama_jax/engine/planner.py",
        "elif not plan.drafts:",
        "elif plan.drafts:",
        ("tests/test_engine_scheduler.py::test_traffic",),
    ),
    Mutation(
        "what a row has drawn is not found by its next draft",
        "llama_jax/engine/programs.py",
        '.set(progress.tokens, mode="drop")',
        '.set(-1, mode="drop")',
        ("tests/test_engine_drafts.py::test_right_guesses_save_steps",),
    ),
    Mutation(
        "first stop id forgotten",
        "llama_jax/decode/loop.py",
        "hit_stop = jnp.any(tokens[:, None] == sampler.stop_ids, axis=1)",
        "hit_stop = jnp.any(tokens[:, None] == sampler.stop_ids[:, 1:], axis=1)",
        ("tests/test_mutation_gaps.py::test_every_stop_id_ends_a_row[first]",),
    ),
    Mutation(
        "last stop id forgotten",
        "llama_jax/decode/loop.py",
        "hit_stop = jnp.any(tokens[:, None] == sampler.stop_ids, axis=1)",
        "hit_stop = jnp.any(tokens[:, None] == sampler.stop_ids[:, :-1], axis=1)",
        ("tests/test_mutation_gaps.py::test_every_stop_id_ends_a_row[last]",),
    ),
    Mutation(
        "min_tokens bars one token too many",
        "llama_jax/sampling/sampler.py",
        "return state.count < state.min_tokens",
        "return state.count <= state.min_tokens",
        (f"{SAMPLING}::test_no_end_before_min_tokens[fields1-want1]",),
    ),
    Mutation(
        "stop id shown as text",
        "llama_jax/generation/outputs.py",
        "if self._detokenizer and not ended and token_id < self._known_ids:",
        "if self._detokenizer and token_id < self._known_ids:",
        ("tests/test_outputs.py::test_stop_id_is_kept_in_the_ids_and_has_no_text",),
    ),
)

SAMPLER: tuple[Mutation, ...] = (
    Mutation(
        "top_p leaves out the token that reaches it",
        "llama_jax/sampling/truncation.py",
        "nucleus = _nucleus(order, weights, limits.top_p * reductions.total(weights, axis), axis)",
        "nucleus = 1 + _nucleus(order, weights, limits.top_p * reductions.total(weights, axis), axis)",
        (f"{SAMPLING}::test_distribution[steps-top_p]",),
    ),
    Mutation(
        "top_p keeps one token more when the sum is exact",
        "llama_jax/sampling/truncation.py",
        "weights, 0.0), axis) >= enough, order.shape[0]",
        "weights, 0.0), axis) > enough, order.shape[0]",
        ("tests/test_mutation_gaps.py::test_top_p_that_the_likeliest_tokens_reach_exactly",),
    ),
    Mutation(
        "top_k keeps one token more",
        "llama_jax/sampling/truncation.py",
        "reductions.total(order >= cut[:, None], axis) >= k",
        "reductions.total(order >= cut[:, None], axis) > k",
        (f"{SAMPLING}::test_distribution[steps-top_k]",),
    ),
    Mutation(
        "top_p is a share of what top_k left out too",
        "llama_jax/sampling/truncation.py",
        """\
    weights = jnp.where(order >= kth[:, None], jnp.exp(logits - best), 0.0)
    nucleus = _nucleus(order, weights, limits.top_p * reductions""",
        """\
    weights = jnp.exp(logits - best)
    nucleus = _nucleus(order, weights, limits.top_p * reductions""",
        (f"{SAMPLING}::test_min_p_comes_after_temperature_and_top_p_after_top_k",),
    ),
    Mutation(
        "rows that have ended go on storing",
        "llama_jax/decode/loop.py",
        "positions = jnp.where(state.done, -1, state.positions)",
        "positions = state.positions",
        (f"{DECODE}::test_a_dense_row_that_has_ended_stores_nothing_visible",),
    ),
    Mutation(
        "rows that do not draw go on counting",
        "llama_jax/sampling/sampler.py",
        "count=state.count + drawing",
        "count=state.count + 1",
        ("tests/test_engine.py::test_sizes_change_nothing[{'steps': 4}]",),
    ),
    Mutation(
        "a row's only token is in no block",
        "kernels/attention/packed.py",
        "least=1 if alike else 2",
        "least=2",
        ("tests/test_llm.py::test_outputs_in_the_order_of_the_prompts",),
    ),
    Mutation(
        "what a kernel writes for padding is left to chance",
        "kernels/attention/packed.py",
        "padding=indexed)",
        "padding=False)",
        ("tests/test_kernels_attention_packed.py::test_backends[window-pallas_interpret]",),
    ),
    Mutation(
        "blocks are put in order, and the rows that they read are not",
        "kernels/attention/packed.py",
        "pieces.token[order], pieces.row[order]",
        "pieces.token[order], pieces.row",
        ("tests/test_kernels_attention_packed.py::test_backends[window-pallas_interpret]",),
    ),
    Mutation(
        "the first share of a row is read as one of the row before",
        "kernels/attention/decode/partition.py",
        "until <= index[:, None]",
        "until < index[:, None]",
        ("tests/test_decode_attention.py::test_shares_cover_each_block_once",),
    ),
    Mutation(
        "a fork copies no partial page",
        "llama_jax/cache/paged.py",
        "to = jnp.where(partial & booked, new, self.pages)",
        "to = jnp.where(partial & booked, self.pages, self.pages)",
        ("tests/test_paged_cache.py::test_forked_rows_diverge",),
    ),
    Mutation(
        "packed tokens of a row all take its first free slot",
        "llama_jax/cache/pages.py",
        "rank = ranks(row[0], len(lengths)).rank[None]",
        "rank = jnp.zeros_like(rows)",
        ("tests/test_paged_cache.py::test_packed_tokens_are_separate_calls[llama2-mha]",),
    ),
    Mutation(
        "repetition penalty pulls negative logits up",
        "llama_jax/sampling/sampler.py",
        "jnp.where(logits > 0, logits / factor, logits * factor)",
        "logits / factor",
        (f"{SAMPLING}::test_repetition_penalty_pushes_negative_logits_down",),
    ),
    Mutation(
        "repetition penalty spares the prompt",
        "llama_jax/sampling/sampler.py",
        "factor = jnp.where(generated | state.in_prompt,",
        "factor = jnp.where(generated,",
        (f"{SAMPLING}::test_penalties_and_bias[fields6-prompt6-want6]",),
    ),
    Mutation(
        "presence penalty counts occurrences",
        "llama_jax/sampling/sampler.py",
        "state.presence[:, None] * generated",
        "state.presence[:, None] * state.seen",
        (f"{SAMPLING}::test_penalties_and_bias[fields1-prompt1-want1]",),
    ),
    Mutation(
        "every step draws the same noise",
        "llama_jax/sampling/sampler.py",
        "jax.random.fold_in(key, count)",
        "jax.random.fold_in(key, 0)",
        (f"{SAMPLING}::test_sampler_is_pure_and_differs_by_count",),
    ),
    Mutation(
        "log-probabilities of the penalised logits",
        "llama_jax/sampling/sampler.py",
        "token_logprobs(logits, tokens, MAX_LOGPROBS)",
        "token_logprobs(_change(logits, state, drawing), tokens, MAX_LOGPROBS)",
        (f"{SAMPLING}::test_log_probabilities_are_of_the_raw_logits",),
    ),
    Mutation(
        "the only token that is allowed is as impossible as the others",
        "llama_jax/sampling/sampler.py",
        "jnp.maximum(logits, _UNLIKELY), -jnp.inf)",
        "logits, -jnp.inf)",
        ("tests/test_sampling_work.py::test_masks_of_random_bits",),
    ),
    Mutation(
        "a mask that allows nothing goes unnoticed",
        "llama_jax/sampling/sampler.py",
        "return rows | state.restricted & ~token_mask.any_allowed(state.allowed, logits.shape[1])",
        "return rows",
        ("tests/test_sampling_work.py::test_masks_of_random_bits",),
    ),
    Mutation(
        "noise is drawn for greedy batches",
        "llama_jax/sampling/sampler.py",
        "jax.lax.switch(way, ways, logits)",
        "ways[2](logits)",
        ("tests/test_sampling_work.py::test_nothing_as_wide_as_the_vocabulary_is_computed_unasked[sampling]",),
    ),
    Mutation(
        "of equal tokens that of the likelier block comes first",
        "llama_jax/sharding/reductions.py",
        "jnp.sort(jax.lax.top_k(jnp.max(x, axis=2), k)[1], axis=1)",
        "jax.lax.top_k(jnp.max(x, axis=2), k)[1]",
        ("tests/test_sampling_work.py::test_the_most_likely_tokens_of_many",),
    ),
    Mutation(
        "a bad word counts wherever its tokens stood",
        "llama_jax/sampling/bad_words.py",
        "if text[len(text) - len(before) :] == before:",
        "if set(before) <= set(text):",
        ("tests/test_bad_words.py::test_no_text_ever_holds_a_bad_word",),
    ),
)

CONSTRAINTS = (
    Mutation(
        "rows without drafts pay nothing for those of others",
        "llama_jax/engine/drafting.py",
        "> others * max(",
        "> 0 * max(",
        ("tests/test_engine_draft_model.py::test_rows_without_drafts_pay_for_those_of_others",),
    ),
    Mutation(
        "a token is drawn before the host has had its say",
        "llama_jax/engine/planner.py",
        "[s for s in self.queues.decoding if not s.held]",
        "list(self.queues.decoding)",
        ("tests/test_engine_constraints.py::test_the_next_step_does_not_wait_for_the_host",),
    ),
    Mutation(
        "several tokens are drawn where the host has a say in each",
        "llama_jax/engine/planner.py",
        "elif any(s.paced or s.streamed for s in self.queues.decoding):",
        "elif not rows:",
        ("tests/test_engine_constraints.py::test_one_step_at_a_time",),
    ),
    Mutation(
        "every place of a draft has the mask of the first",
        "llama_jax/engine/programs.py",
        "dynamic_index_in_dim(masks, at, axis=1",
        "dynamic_index_in_dim(masks, 0, axis=1",
        ("tests/test_engine_lookahead.py::test_guesses_under_constraints_change_nothing",),
    ),
    Mutation(
        "a draft goes on behind the end of a text",
        "llama_jax/engine/rules.py",
        "if any(fork.ended for fork in forks):",
        "if not forks:",
        ("tests/test_engine_lookahead.py::test_a_draft_ends_before_the_end_of_a_text_and_before_dead_ends",),
    ),
    Mutation(
        "rows wait for constraints that hang",
        "llama_jax/engine/planner.py",
        "sum(s.held and not s.pending for s in self.queues.decoding)",
        "sum(s.held for s in self.queues.decoding)",
        ("tests/test_engine_lookahead.py::test_no_step_draws_for_one_that_is_pending",),
    ),
    Mutation(
        "a dead end may go on with any token",
        "llama_jax/engine/rules.py",
        "np.zeros_like(mask)[None]",
        "np.ones_like(mask)[None]",
        ("tests/test_engine_constraints.py::test_a_dead_end_ends_its_sequence_alone[error]",),
    ),
    Mutation(
        "texts of one grammar share its state",
        "llama_jax/text/grammar.py",
        "tuple(eos_token_ids)).deep_copy())",
        "tuple(eos_token_ids)))",
        ("tests/test_grammar.py::test_matchers_of_one_grammar_are_apart",),
    ),
    Mutation(
        "a control token counts as the letters of its name",
        "llama_jax/text/grammar.py",
        "sorted({i for i in tokenizer.special_ids if i < size} | {*eos_token_ids})",
        "[*eos_token_ids]",
        ("tests/test_grammar.py::test_the_tokens_of_a_text_are_in_its_grammar[tiktoken-names]",),
    ),
    Mutation(
        "JSON may be padded with white space",
        "llama_jax/text/grammar.py",
        '"whitespace_flexible": False',
        '"whitespace_flexible": True',
        ("tests/test_grammar.py::test_without_white_space_between_the_parts",),
    ),
)

QUANTISED: tuple[Mutation, ...] = (
    Mutation(
        "the first code of a byte in its high half",
        "llama_jax/quantized/layout.py",
        "nibbles[..., 0::2] | nibbles[..., 1::2] << 4",
        "nibbles[..., 1::2] | nibbles[..., 0::2] << 4",
        (f"{QUANTIZATION}::test_every_code_is_the_nearest[int4_g32]",),
    ),
    Mutation(
        "products as if codes were stored unsigned",
        "llama_jax/quantized/codes.py",
        "- layout.lowest * scales",
        "- 0 * scales",
        (f"{QUANTIZATION}::test_products_and_rows[int4_g64_min]",),
    ),
    Mutation(
        "a kernel's offsets left out",
        "kernels/quantized_matmul/kernel.py",
        "(more - added * scale) * sums",
        "(0 - added * scale) * sums",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g128_zero-5]",),
    ),
    Mutation(
        "a single row's shifts of the first groups left out",
        "kernels/quantized_matmul/shifts.py",
        "(at >= first) & (at < last))[None, :], jnp.sum",
        "(at > first) & (at < last))[None, :], jnp.sum",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g128_zero-1]",),
    ),
    Mutation(
        "the second halves of several rows' sums left out",
        "kernels/quantized_matmul/shifts.py",
        "pairs = ((0, 0), (0, 1), (1, 0))",
        "pairs = ((0, 0), (1, 0))",
        ("tests/test_kernels_quantized.py::test_by_bytes[int4_g64_min-3-1]",),
    ),
    Mutation(
        "the wrong one of two scales in a word",
        "kernels/quantized_matmul/groups.py",
        "[k % self.pair]",
        "[0]",
        ("tests/test_kernels_quantized.py::test_by_bytes[int4_g64_min-3-1]",),
    ),
    Mutation(
        "the wrong one of two scales in a word that multiply the weight",
        "kernels/quantized_matmul/scaled.py",
        "place = jax.lax.rem(first, packed) *",
        "place = jax.lax.rem(first, packed) * 0 *",
        ("tests/test_kernels_quantized.py::test_scales_multiply_the_weight[half-group-bfloat16]",),
    ),
    Mutation(
        "scales of whole rows left out where they multiply the weight",
        "kernels/quantized_matmul/scaled.py",
        "        if not group:\n            total *=",
        "        if group < 0:\n            total *=",
        ("tests/test_kernels_quantized.py::test_scales_multiply_the_weight[whole-rows-bfloat16]",),
    ),
    Mutation(
        "a weight without its minima where scales multiply it",
        "kernels/quantized_matmul/scaled.py",
        "both = [scale, *(weight.shift(scale, one) for one in offset)]",
        "both = [scale, *(one * 0 for one in offset)]",
        ("tests/test_kernels_quantized.py::test_scales_multiply_the_weight[minima-bfloat16]",),
    ),
    Mutation(
        "sums of squares of eight columns, however many a program has",
        "kernels/quantized_matmul/kernel.py",
        "squared = width // fold if columns % (width // fold) == 0 else SQUARED",
        "squared = SQUARED",
        ("tests/test_kernels_fused.py::test_a_sum_of_squares_for_each_program",),
    ),
    Mutation(
        "the last share of a row is what the others leave",
        "kernels/attention/decode/partition.py",
        "if cut.length:\n            return",
        "if cut.length >= 0:\n            return",
        ("tests/test_decode_attention.py::test_shares_cover_each_block_once",),
    ),
    Mutation(
        "a kernel's scales of the group by bytes, not by codes",
        "kernels/quantized_matmul/kernel.py",
        "i * (tiles.inner * per_byte) // group",
        "i * tiles.inner // group",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g32-1]",),
    ),
    Mutation(
        "scales of the step before taken where others begin",
        "kernels/quantized_matmul/kernel.py",
        "window * window != first",
        "window * window == first",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g32-1]",),
    ),
    Mutation(
        "a single row's numbers in the sum of another group",
        "kernels/quantized_matmul/kernel.py",
        "of_group[None, :] == row[:, None]",
        "of_group[None, :] == row[::-1, None]",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g64_min-1]",),
    ),
    Mutation(
        "codes of a word in another order than the input",
        "kernels/quantized_matmul/unpack.py",
        "(0, 4, 8, 12)",
        "(0, 8, 4, 12)",
        ("tests/test_kernels_quantized.py::test_against_float64[int4_g128_zero-2]",),
    ),
    Mutation(
        "zeros of other programs taken as signed",
        "convert/quantized/members.py",
        "(by_row(codes.zeros).astype(np.int16) - half)",
        "by_row(codes.zeros).astype(np.int16)",
        ("tests/test_convert_kept.py::test_weights_are_those_of_the_library[awq]",),
    ),
    Mutation(
        "scales of blocks in turn, row by row",
        "convert/quantized/members.py",
        "blocks[np.arange(rows) // codes.block[0]]",
        "blocks[np.arange(rows) % len(blocks)]",
        ("tests/test_convert_kept.py::test_weights_are_those_of_the_library[fp8-block]",),
    ),
    Mutation(
        "a mesh may cut through groups",
        "llama_jax/layout.py",
        "    check_groups(config, by)",
        "    ...",
        (f"{QUANTIZATION}::test_no_mesh_cuts_through_a_group",),
    ),
)

QUANTISED_CACHE: tuple[Mutation, ...] = (
    Mutation(
        "kernels leave scales out",
        "kernels/attention/codes.py",
        "return x if scales is None else x * scales[None, :]",
        "return x",
        (f"{QUANTISED_CACHE_TESTS}::test_whole_or_in_pieces[paged-k8v4-pallas_interpret]",),
    ),
    Mutation(
        "values are scaled by the scales of keys",
        "kernels/attention/blocked.py",
        "weights * v_scale[:, :, None]",
        "weights * k_scale[:, :, None]",
        (f"{QUANTISED_CACHE_TESTS}::test_whole_or_in_pieces[paged-int4-auto]",),
    ),
    Mutation(
        "a fork copies codes without their scales",
        "llama_jax/cache/paged.py",
        "**stored.changed(self, copy),",
        "**(stored.changed(self, copy) | {'k_scale': self.k_scale}),",
        (f"{QUANTISED_CACHE_TESTS}::test_scales_go_where_their_codes_go[paged-int8]",),
    ),
    Mutation(
        "pages are cleared of codes alone",
        "llama_jax/cache/stored.py",
        "for each in (cache, *others))) for name in FIELDS}",
        "for each in (cache, *others))) for name in FIELDS[:2]}",
        (f"{QUANTISED_CACHE_TESTS}::test_cleared_pages_have_no_scales",),
    ),
    Mutation(
        "products of parts of columns are not added up",
        "llama_jax/model/weights.py",
        "(*lead, *out), summed=inner",
        "(*lead, *out)",
        ("tests/test_quantization.py::test_on_a_mesh",),
    ),
    Mutation(
        "the kernel stores what was not rotated",
        "kernels/rope/kernel.py",
        "((k_out, key), (v_out, value)):",
        "((k_out, value), (v_out, value)):",
        ("tests/test_kernels_rope.py::test_against_complex_numbers[False-pallas_interpret]",),
    ),
    Mutation(
        "queries are not rotated",
        "kernels/rope/coding.py",
        "(hadamard(q) / block(q.shape[-1])).astype(q.dtype), hadamard(k)",
        "q, hadamard(k)",
        (
            f"{QUANTISED_CACHE_TESTS}::test_packed_tokens[int8]",
            f"{QUANTISED_CACHE_TESTS}::test_whole_or_in_pieces[dense-int8-auto]",
        ),
    ),
    Mutation(
        "one scale for all heads of a token",
        "kernels/rope/coding.py",
        ").astype(SCALES)",
        ").astype(SCALES)\n    scales = jnp.broadcast_to(scales[..., :1], scales.shape)",
        (f"{QUANTISED_CACHE_TESTS}::test_whole_or_in_pieces[dense-int8-auto]",),
    ),
    Mutation(
        "what attention makes of rotated values is not turned back",
        "llama_jax/cache/stored.py",
        "return (hadamard(out) / block(q.shape[-1])).astype(dtype) if turned else out, fields",
        "return out, fields",
        (f"{QUANTISED_CACHE_TESTS}::test_whole_or_in_pieces[paged-int4-auto]",),
    ),
    Mutation(
        "numbers of the assembly are half of what codes of four bits stand for",
        "kernels/attention/assembly.py",
        "(Field(0x0F, 2, 15), Field(0xF0, 2 / 16, 15))",
        "(Field(0x0F, 1, 7), Field(0xF0, 1 / 16, 7))",
        (f"{QUANTISED_CACHE_TESTS}::test_what_the_assembly_multiplies_and_adds[uint8]",),
    ),
)

LEARNING = (
    Mutation(
        "the last token of a packed text predicts the next text's first",
        "llama_jax/training/batch.py",
        "learned &= jnp.roll(batch.segments, -1, axis=1) == batch.segments",
        "pass",
        (f"{TRAINING}::test_no_text_sees_another_and_none_predicts_the_next_ones_first_token",),
    ),
    Mutation(
        "tokens that are not learned have a gradient",
        "llama_jax/training/loss.py",
        "(slope * learned[..., None]).astype",
        "slope.astype",
        (f"{TRAINING}::test_loss_and_gradient_are_those_of_each_text_alone[tied-mqa]",),
    ),
    Mutation(
        "the loss is a mean over all tokens, learned or not",
        "llama_jax/training/step.py",
        "scale = 1 / jnp.maximum(jnp.sum(jax.vmap(objective.count)(batch)), 1)",
        "scale = 1 / batch.tokens.size",
        (f"{TRAINING}::test_steps_are_those_of_peft[train-llama]",),
    ),
    Mutation(
        "a rejected answer is preferred",
        "llama_jax/training/preference.py",
        "margin = chosen - rejected",
        "margin = rejected - chosen",
        ("tests/test_training_preference.py::test_loss_and_gradient_are_those_of_each_text_alone[plain]",),
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    *(*ROPE, *LAYERS, *ATTENTION, *EXPERTS, *CONVERSION, *TEXT, *SAMPLER, *CONSTRAINTS),
    *QUANTISED,
    *QUANTISED_CACHE,
    *LEARNING,
)
