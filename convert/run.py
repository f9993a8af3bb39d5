"""The conversion itself: open a source, copy tensor by tensor, give the result its name."""

from __future__ import annotations

from pathlib import Path

from llama_jax.checkpoint.format import Progress, is_checkpoint
from llama_jax.convert.casting import cast, storage_dtype
from llama_jax.convert.model_source import ModelSource, check_finite
from llama_jax.errors import ModelNotFound, UnsupportedModel


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Converts a model to a checkpoint of this package.

    Tensors pass one by one: the host holds the largest of them and a batch of 256 MiB, whatever the model's size.
    Nothing stands at `dst` before all is done; a conversion that was stopped can simply be run again.

    Args:
      src: a Hugging Face folder (config.json and safetensors) or a GGUF file.
      dst: the checkpoint's folder.
      dtype: stores all tensors as float32, bfloat16 or float16; their own dtype when None (float32 for quantised GGUF).
      overwrite: whether a checkpoint at `dst` may be replaced; it stays until the new one is complete.
      allow_nonfinite: whether weights may be NaN or infinite.
      name: name of the model in the checkpoint's metadata, instead of that of the folder or file.
      revision: the source's commit or digest, for the metadata.
      progress: called after each tensor.

    Returns:
      `dst`, absolute.

    Raises:
      ModelNotFound: nothing stands at `src`.
      UnsupportedModel: the model asks for something that this package does not compute.
      CheckpointError: the source is damaged or incomplete, or holds NaN; names file and tensor.
      StorageError, DoesNotFit: `dst` exists or cannot be written, or the disk is too small.
    """
    # Imported here, since these bring jax and orbax, which opening and listing models do not need.
    from llama_jax.checkpoint.write import CheckpointWriter
    from llama_jax.params import param_specs

    wanted = None if dtype is None else storage_dtype(dtype)
    model = open_source(Path(src), name=name, revision=revision)
    try:
        specs = param_specs(model.config)
        sizes = {spec.name: spec.size * (wanted or model.dtype(spec)).itemsize for spec in specs}
        total, done = sum(sizes.values()), 0
        # Read first: a model without a usable tokenizer should fail before, not after, an hour of copying.
        files, generation_config = model.files, model.generation_config
        with CheckpointWriter(dst, total_bytes=total, overwrite=overwrite) as writer:
            for spec in specs:
                array = model.read(spec)
                if not allow_nonfinite:
                    check_finite(spec.name, array, model.path)
                if wanted is not None and wanted != array.dtype:
                    array = cast(spec.name, array, wanted, model.path, allow_nonfinite=allow_nonfinite)
                writer.add(spec.name, array)
                done += sizes[spec.name]
                if progress:
                    progress(done, total, spec.name)
            return writer.commit(model.config, source=model.source, generation_config=generation_config, files=files)
    finally:
        model.close()


def open_source(path: Path, *, name: str | None = None, revision: str | None = None) -> ModelSource:
    """Opens whatever stands at `path` for conversion.

    Raises:
      ModelNotFound: nothing does.
      UnsupportedModel: something does that cannot be converted.
    """
    from llama_jax.convert.gguf import GgufModel
    from llama_jax.convert.hf import HuggingFaceFolder

    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if path.suffix.lower() == ".gguf" or magic == b"GGUF":
            return GgufModel(path, name=name, revision=revision)
        raise UnsupportedModel(
            f"{path} is not a GGUF file", hint="give the folder that holds config.json, or a .gguf file"
        )
    if not path.is_dir():
        raise ModelNotFound(f"no file or folder at {path}", hint="check the path")
    if is_checkpoint(path):
        raise UnsupportedModel(
            f"{path} is a converted checkpoint already",
            hint="use it as it is; --dtype of the other commands casts on load",
        )
    return HuggingFaceFolder(path, name=name, revision=revision)
