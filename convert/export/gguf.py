"""A checkpoint as a GGUF file for llama.cpp and the programs around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llama_jax.checkpoint.format import Progress
from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.config import LlamaConfig
from llama_jax.convert.casting import cast, row_blocks
from llama_jax.convert.export.gguf_metadata import architecture, model_metadata, rope_factors
from llama_jax.convert.export.gguf_tokenizer import no_tokenizer, tokenizer_metadata
from llama_jax.convert.export.gguf_writer import GgufPlan, GgufWriter, Value, data_bytes
from llama_jax.convert.export.source import Exported, PlainSource
from llama_jax.convert.export.staging import staged
from llama_jax.convert.gguf import pair_rotation, rotated_heads
from llama_jax.convert.gguf_config import PERMUTED, ROPE_FACTORS
from llama_jax.convert.gguf_layouts import EXACT, blocks, layout_of
from llama_jax.errors import RequestError
from llama_jax.params import ParamSpec
from llama_jax.quantized import Layout

_DTYPES = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16), Kind.BF16: BFLOAT16}
_EXACT: Mapping[Layout | None, Kind] = {layout_of(kind): Kind(kind) for kind in EXACT}
_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
GGUF_TYPES: Mapping[str, gguf.LlamaFileType] = MappingProxyType(
    {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
        "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
        "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
)
"""Types of the weights in an exported file, those that the gguf package can make, with the numbers of the files."""


def export_gguf(
    checkpoint: str | Path,
    dst: str | Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes a checkpoint as a GGUF file, with its tokenizer and chat template.

    Matrices are stored in the requested type; norms, biases and routers in float32, which llama.cpp needs; embedding
    and output projection in q8_0 at least, since four bits do them the most harm, unless they are stored in four.
    Weights that are stored in the layout of their type keep their codes and scales. Without a type, no number of the
    others changes. Tensors pass one by one, so that memory is needed for the largest tensor only. `dst` appears only
    once it is complete.

    Args:
      checkpoint: its folder.
      dst: the file to make; its name ends in .gguf.
      kind: a key of GGUF_TYPES; that of most of the checkpoint's weights when None.
      overwrite: whether a GGUF file at `dst` may be replaced; it stays until the new one is complete.
      progress: called after each tensor, with bytes of its values.

    Raises:
      ModelNotFound, CheckpointError: no checkpoint, it is damaged, or a value is too large for the type; names it.
      UnsupportedModel: llama.cpp has no such model or tokenizer; says what.
      RequestError: an unknown type, or a name that does not end in .gguf.
      StorageError, DoesNotFit: `dst` exists or cannot be written, or the disk is too small.
    """
    dst = Path(dst).absolute()
    if dst.suffix != ".gguf":
        raise RequestError(f"{dst.name} does not end in .gguf", param="dst", hint="GGUF export makes a single file")
    source = PlainSource(checkpoint, "float32")  # the input of GGUF's roundings
    kind = kind or _own(source)
    if kind not in GGUF_TYPES:
        raise RequestError(f"GGUF type {kind!r} is not known", param="kind", hint=f"one of {', '.join(GGUF_TYPES)}")
    config = source.config
    plan, notes = _plan(source, kind)
    metadata, more = _metadata(source, kind)
    factors = rope_factors(config)
    with (
        staged(dst, needed=data_bytes(plan), overwrite=overwrite, replaceable=_is_gguf) as partial,
        GgufWriter(partial, metadata, plan) as writer,
    ):
        if factors is not None:
            _write(writer, ROPE_FACTORS, factors, Kind.F32, source)
        done, total = 0, source.nbytes
        for spec in source.specs:
            used = plan[spec.gguf].kind
            if _EXACT.get(source.layout(spec)) == used:
                writer.write(_rotated(spec, config, blocks(source.members(spec), used)))
                writer.end_tensor()
            else:
                _write(writer, spec.gguf, _rotated(spec, config, source.read(spec)), used, source)
            done += spec.size * source.dtype(spec).itemsize
            if progress:
                progress(done, total, spec.name)
    return Exported(dst, (dst.name,), len(plan), sum(tensor.nbytes for tensor in plan.values()), kind, (*more, *notes))


def _own(source: PlainSource) -> str:
    """The type that most of a checkpoint's weights have."""
    sizes = Counter[Layout | None]()
    for spec in source.specs:
        sizes[source.layout(spec)] += spec.size
    kind = _EXACT.get(sizes.most_common(1)[0][0])
    return _STORED[source.checkpoint.dtype] if kind is None else kind.name.lower()


def _plan(source: PlainSource, kind: str) -> tuple[dict[str, GgufPlan], list[str]]:
    """Type and shape of every tensor; and a note if some cannot have the type."""
    plan, kept = {}, 0
    factors = rope_factors(source.config)
    if factors is not None:
        plan[ROPE_FACTORS] = GgufPlan(Kind.F32, factors.shape)
    wanted = Kind[kind.upper()]
    for spec in source.specs:
        used = wanted
        if len(spec.shape) == 1 or spec.name.endswith(".router.weight"):
            used = Kind.F32
        elif "vocab" in spec.axes and wanted not in _DTYPES:
            used = _EXACT.get(source.layout(spec), Kind.Q8_0)
        if spec.shape[-1] % gguf.GGML_QUANT_SIZES[used][0]:
            used, kept = Kind.F16, kept + 1
        plan[spec.gguf] = GgufPlan(used, spec.shape)
    if not kept:
        return plan, []
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return plan, [f"{kept} tensors are stored as f16, since their rows do not divide into {kind}'s blocks of {block}"]


def _metadata(source: PlainSource, kind: str) -> tuple[dict[str, Value], list[str]]:
    checkpoint = source.checkpoint
    config = source.config
    notes = []
    metadata: dict[str, Value] = {
        "general.architecture": architecture(config),
        "general.type": "model",
        "general.name": checkpoint.source.name or checkpoint.path.name,
        "general.size_label": _size_label(source.specs),
    }
    if checkpoint.source.licence:
        metadata["general.license"] = checkpoint.source.licence
    metadata |= model_metadata(config)
    metadata["general.file_type"] = int(GGUF_TYPES[kind])
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    windows = {layer.window for layer in config.layers if layer.window}
    if any(window < config.context_length for window in windows):
        notes.append(
            f"llama.cpp ignores this model's sliding window: beyond {min(windows)} tokens its results will differ"
        )
    more_ends = checkpoint.generation_config.get("eos_token_id")
    eos = (*config.eos_token_ids, *(more_ends if isinstance(more_ends, list) else [more_ends]))
    eos = tuple(dict.fromkeys(i for i in eos if i is not None))
    if any(name in checkpoint.file_digests for name in ("tokenizer.json", "tokenizer.model")):
        keys, more = tokenizer_metadata(checkpoint.path, config.vocab_size, eos)
    else:
        keys, more = no_tokenizer(config.bos_token_id, eos, config.pad_token_id), ["the checkpoint has no tokenizer"]
    return metadata | keys, notes + more


def _size_label(specs: Sequence[ParamSpec]) -> str:
    """ "8B", or "8x7B" for a mixture of experts: the size of one expert and all that is not in experts."""
    stacks = [spec for spec in specs if "expert" in spec.axes and len(spec.shape) == 3]
    total, routed = sum(spec.size for spec in specs), sum(spec.size for spec in stacks)
    count = stacks[0].shape[0] if stacks else 0
    return gguf.size_label(total, total - routed, routed // count if count else 0, count)


def _rotated(spec: ParamSpec, config: LlamaConfig, array: np.ndarray) -> np.ndarray:
    heads = rotated_heads(spec.leaf, config) if architecture(config) in PERMUTED else None
    return array if heads is None else pair_rotation(array, heads)


def _write(writer: GgufWriter, name: str, array: np.ndarray, kind: Kind, source: PlainSource) -> None:
    for _, block in row_blocks(array):
        if kind in _DTYPES:
            writer.write(cast(name, block, _DTYPES[kind], source.checkpoint.path))
        else:
            writer.write(gguf.quantize(block.astype(np.float32), kind))
    writer.end_tensor()


def _is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, or the empty beginning of one."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"GGUF", b"")
