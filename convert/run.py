"""The conversion itself: open a source, copy tensor by tensor, give the result its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.checkpoint.format import FORMAT_VERSION, Progress, digest
from llama_jax.checkpoint.source import InOrder, ModelSource, provenance, tell_notes, weight_files
from llama_jax.checkpoint.values import is_matrix, zeros_warning
from llama_jax.convert.announce import announce
from llama_jax.convert.casting import storage_dtype
from llama_jax.convert.opening import open_model, open_source
from llama_jax.convert.weight_file import closed_on_error
from llama_jax.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import numpy as np

    from llama_jax.checkpoint.lock import Origin, SourceFile
    from llama_jax.checkpoint.write import CheckpointWriter
    from llama_jax.convert.file_hashes import FileHashes
    from llama_jax.convert.leaves import Leaf
    from llama_jax.params import ParamSpec
    from llama_jax.recipe import Recipe
    from llama_jax.sharding import DeviceMesh


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    recipe: Recipe | None = None,
    calibration: str | None = None,
    mesh: DeviceMesh | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    warn_larger: bool = True,
    name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    quantised: Callable[[str, float], None] | None = None,
    wrap: Callable[[ModelSource], ModelSource] | None = None,
) -> Path:
    """Converts a model to a checkpoint of this package.

    Tensors are converted one by one, in the order of the source's files: the host holds the largest of them or 768 MiB,
    whatever the model's size. `dst` appears only once it is complete. An interrupted conversion leaves its work in
    `<dst>.partial`; the same call checks the digests there, resumes, and gives the same result. A second conversion to
    the same place waits for the first.

    Args:
      src: a Hugging Face folder (config.json and safetensors or .bin), a folder of Meta (params.json and
        consolidated.*.pth) or a GGUF file; with a recipe or `wrap` also a checkpoint.
      dst: the checkpoint's folder.
      dtype: float32, bfloat16 or float16 for all tensors that are not quantised. When None, their own dtype; bfloat16
        with a recipe; float32 for decoded tensors of a GGUF file.
      dequantize: whether to decode quantised weights. By default they keep their precision, if a layout of
        `llama_jax.quantized` can hold it.
      recipe: quantises weights (and requantises those of a quantised source).
      calibration: a text, for a recipe whose method needs one.
      mesh: devices of this process that quantise, by default one. They share the rows of each weight and of the
        calibration text, whatever the mesh's axes. Without calibration the result is the same on any number of them.
      overwrite: whether a checkpoint at `dst` may be replaced; it stays until the new one is complete.
      allow_nonfinite: whether to accept NaN, infinite and subnormal weights, and zeros in most of the matrices.
      warn_larger: whether to tell `notify` if the checkpoint will be more than twice as large as the source.
      name: the model's name in the metadata, instead of that of the folder or file.
      revision: the source's commit or digest, for the metadata.
      progress: called after each tensor.
      notify: called with a sentence on sizes and free space, waits, anything left out or strange, and work left to
        resume from.
      quantised: called at the end with each quantised leaf and its root-mean-square error relative to the weight; for a
        calibrated leaf, that of its outputs over the text.
      wrap: turns the opened source into another one to store; its attribute `change` identifies the change, so that an
        interrupted conversion is recognised.

    Returns:
      `dst`, absolute.

    Raises:
      ModelNotFound: nothing is at `src`.
      UnsupportedModel: the model needs something that this package does not compute.
      RequestError: an unknown dtype, the recipe does not fit the model, or its method the calibration text; a mesh has
        nothing to quantise, or devices of other processes.
      CheckpointError: the source is damaged or incomplete, changes meanwhile, or holds NaN; names file and tensor.
      StorageError, DoesNotFit: `dst` exists or cannot be written, or the disk is too small.
    """
    # Imported here, since these bring jax and orbax, which opening and listing models do not need.
    from llama_jax.checkpoint.write import CheckpointWriter, batches, layer_batches
    from llama_jax.convert.file_hashes import FileHashes
    from llama_jax.convert.leaves import AHEAD_BYTES, in_file_order, memory, read_ahead, read_leaf, stored_dtype
    from llama_jax.disk import fits_file_cache
    from llama_jax.params import param_specs
    from llama_jax.recipe import NEAREST

    dtype = "bfloat16" if dtype is None and recipe is not None else dtype
    wanted = None if dtype is None else storage_dtype(dtype)
    with closing(_opened(Path(src), name, revision, dequantize, recipe, calibration, mesh, wanted, wrap)) as model:
        in_order = isinstance(model, InOrder)
        ordered = param_specs(model.config) if in_order else in_file_order(model, param_specs(model.config))
        specs = {spec.name: spec for spec in ordered}
        weights = weight_files(model, specs.values())
        before = _stamps(weights)
        identity = {
            "format_version": FORMAT_VERSION,
            "source": [model.source.kind, str(model.path.absolute()), before],
            "config": digest(repr(model.config).encode()),
            "options": [dtype, allow_nonfinite],
            "weights": "as they are" if recipe is None else recipe.method,
            **({"change": change} if (change := getattr(model, "change", "")) else {}),
            "calibration": None if calibration is None else digest(calibration.encode()),
        }
        dtypes = {spec: stored_dtype(model, spec, wanted) for spec in specs.values()}
        sizes = {spec.name: spec.size * dtype.itemsize for spec, dtype in dtypes.items()}
        total = sum(sizes.values())
        # Read first: a model without a usable tokenizer should fail before, not after, an hour of copying.
        files, generation_config = model.files, model.generation_config
        matrices = sum(map(is_matrix, specs.values()))
        say: Callable[[str], None] = notify or (lambda _: None)
        tell_notes(model, say)
        announce(model, Path(dst).absolute(), dtypes, weights, say, warn_larger=warn_larger)

        def read(name: str) -> Leaf:
            return read_leaf(model, specs[name], wanted, allow_nonfinite=allow_nonfinite, hashes=hashes)

        with CheckpointWriter(
            dst, total_bytes=total, overwrite=overwrite, identity=identity, progress=progress, notify=say
        ) as writer:
            done = sum(sizes[name] for name in writer.written)
            group = layer_batches if in_order else batches
            left = group({name: size for name, size in sizes.items() if name not in writer.written})
            if isinstance(model, InOrder):
                model.resume(writer.read)
            with (
                FileHashes(weights, _known(writer.notes, weights), keep=fits_file_cache(total)) as hashes,
                read_ahead(left, read, lambda name: memory(model, specs[name], wanted), AHEAD_BYTES) as leaves,
            ):
                for batch, names in zip(leaves, left, strict=True):
                    _write(writer, batch, hashes, _errors(model, batch))
                    for name in names:
                        done += sizes[name]
                        if progress:
                            progress(done, total, name)
                sha256 = hashes.finish()
            if _stamps(weights) != before:
                raise CheckpointError(
                    f"a file of {model.path} was changed while it was read", hint="convert it again when it is complete"
                )
            if warning := zeros_warning(_zeros(writer), matrices, model.path, refuse=not allow_nonfinite):
                say(warning)
            digests = {name: value for note in writer.notes for name, value in note["source_digests"].items()}
            errors = {leaf: value for note in writer.notes for leaf, value in note["errors"].items()}
            path = writer.commit(
                model.config,
                source=model.source,
                generation_config=generation_config,
                files=files,
                source_files=locked_files(sha256),
                origins=origins(model, specs.values(), digests),
                dtype=dtype,
                method=None if recipe is None or recipe.method == NEAREST else recipe.method,
            )
        if quantised is not None:
            for leaf in dict.fromkeys(spec.leaf for spec in param_specs(model.config)):
                if leaf in errors:
                    quantised(leaf, errors[leaf])
        return path


def _opened(
    src: Path,
    name: str | None,
    revision: str | None,
    dequantize: bool,
    recipe: Recipe | None,
    calibration: str | None,
    mesh: DeviceMesh | None,
    dtype: np.dtype | None,
    wrap: Callable[[ModelSource], ModelSource] | None,
) -> ModelSource:
    if mesh is not None and recipe is None:
        raise RequestError("a mesh was given, but nothing is quantised", param="mesh", hint="give a recipe, or no mesh")
    if wrap is not None:
        source = open_model(src, name=name, revision=revision, dequantize=dequantize)
        with closed_on_error(source.close):
            return wrap(source)
    if recipe is None:
        return open_source(src, name=name, revision=revision, dequantize=dequantize)
    from llama_jax.convert.calibrating import CalibratedSource, rows_of_text
    from llama_jax.convert.quantizing import QuantizedSource
    from llama_jax.recipe import schemes
    from llama_jax.sharding import RowSplit

    devices = RowSplit.over(mesh)
    recipe.check_text(given=calibration is not None)
    source = open_model(src, name=name, revision=revision, dequantize=True)
    with closed_on_error(source.close):
        if calibration is None:
            return QuantizedSource(source, schemes(source.config, recipe), recipe.method, devices)
        assert dtype is not None
        return CalibratedSource(source, recipe, rows_of_text(source, calibration), dtype, devices)


def _errors(model: ModelSource, batch: Sequence[Leaf]) -> dict[str, float]:
    """Measures the quantisation error of each leaf of a batch."""
    found: Mapping[str, float] = getattr(model, "errors", {})
    return {leaf.spec.leaf: found[leaf.spec.leaf] for leaf in batch if leaf.spec.leaf in found}


def _write(writer: CheckpointWriter, batch: Sequence[Leaf], hashes: FileHashes, errors: Mapping[str, float]) -> None:
    """Writes leaves, and records what model.lock.json needs. Keeps no reference to them."""
    note = {
        "source_digests": {leaf.spec.name: leaf.source_digest for leaf in batch},
        "zeros": [leaf.spec.name for leaf in batch if leaf.zero],
        "sha256": {file.name: value for file, value in hashes.done.items()},
        "errors": errors,
    }
    writer.write({leaf.spec.name: leaf.array for leaf in batch}, note)


def _zeros(writer: CheckpointWriter) -> list[str]:
    """The all-zero matrices written so far, also by earlier conversions."""
    return [name for note in writer.notes for name in note.get("zeros", ())]


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and modification time of each file, by which a resumed conversion recognises the same files."""
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _known(notes: Sequence[Mapping[str, Any]], weights: Sequence[Path]) -> dict[Path, str]:
    """The files that an earlier conversion has hashed to their ends."""
    found = {name: value for note in notes for name, value in note["sha256"].items()}
    return {file: found[file.name] for file in weights if file.name in found}


def locked_files(sha256: Mapping[Path, str]) -> tuple[SourceFile, ...]:
    """The source's weight files for model.lock.json, by name."""
    from llama_jax.checkpoint.lock import SourceFile

    return tuple(SourceFile(file.name, file.stat().st_size, value) for file, value in sorted(sha256.items()))


def origins(model: ModelSource, specs: Iterable[ParamSpec], digests: Mapping[str, str]) -> dict[str, Origin]:
    """The origin of each leaf, for model.lock.json.

    Args:
      digests: of the leaves' values before any cast.
    """
    from llama_jax.checkpoint.lock import Origin

    return {
        spec.name: Origin(tuple((t.name, t.file.name) for t in provenance(model, spec)), digests[spec.name])
        for spec in specs
    }
