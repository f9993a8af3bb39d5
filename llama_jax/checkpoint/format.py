"""The contents of a checkpoint folder, and opening one: reads three small JSON files and no tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama_jax.checkpoint.wrong_file import read_head, refuse, wrong_file
from llama_jax.config import LlamaConfig, config_from_hf
from llama_jax.errors import CheckpointError, ModelNotFound

FORMAT_VERSION = 1
"""Raised whenever a reader of the older version would misread the new one."""

MARKER = "llama_jax.json"
PARAMS = "params"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATES = "additional_chat_templates"
"""The one folder of small files, of Hugging Face's models with several chat templates."""
DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that plain tensors may have on disk, and that models compute in."""
ITEMSIZES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("float32", "int32", "uint32"), 4)
    | dict.fromkeys(("bfloat16", "float16"), 2)
    | dict.fromkeys(("int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1)
)
"""Bytes of a number of every dtype that a tensor may have on disk, those of schemes included."""
_MAX_DIMS = 8

# Where Orbax v1 keeps custom metadata and the arrays below the folder of a checkpoint.
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
_ORBAX_ARRAYS = "state"

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and the name of the tensor just finished."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
      shape: canonical shape, as in `llama_jax.params.ParamSpec`.
      dtype: numpy name of the dtype on disk.
      digest: "xxh3_128:" and the hash of its little-endian bytes in C order, in hexadecimal.
      scheme: name of the scheme that stores the weight that it is a member of (`llama_jax.schemes`).
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    scheme: str = "plain"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class Source:
    """The origin of the weights.

    Attributes:
      kind: "huggingface", "meta", "gguf" or "arrays".
      name: name of the model, its folder or its file.
      revision: commit or digest of the source, where known.
      licence: as the source states it, where it does.
      quantization: how the source stores its weights, in a few words; None if they are plain floats.
    """

    kind: str = "arrays"
    name: str = ""
    revision: str | None = None
    licence: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; only metadata has been read.

    Attributes:
      path: the folder.
      tensors: dotted name to shape, dtype and digest.
      generation_config: contents of generation_config.json, empty without one.
      dtype: dtype of most of the weights.
      tool: name and version of the program that wrote it.
      file_digests: digests of the small files beside the tensors, as they were written.
    """

    path: Path
    config: LlamaConfig
    tensors: Mapping[str, TensorInfo]
    source: Source
    dtype: str
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    tool: str = ""
    file_digests: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def weights_digest(self) -> str:
        """Of the tensors' names and digests: equal for checkpoints with the same weights."""
        return digest(json.dumps({name: t.digest for name, t in self.tensors.items()}, sort_keys=True).encode())

    @property
    def arrays_path(self) -> Path:
        """The OCDBT store that holds the arrays."""
        return self.path / PARAMS / _ORBAX_ARRAYS


class Digest:
    """An incremental digest of bytes: xxh3_128, which runs at memory speed and detects every flipped bit.

    It guards against faults of disks and transfers, not against an attacker, who could write a fitting digest as well.
    """

    def __init__(self) -> None:
        import xxhash

        self._hash = xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        """Takes the next contiguous buffer of bytes."""
        self._hash.update(data)

    def __str__(self) -> str:
        return "xxh3_128:" + self._hash.hexdigest()


def digest(data: Any) -> str:
    """The digest of one contiguous buffer."""
    whole = Digest()
    whole.update(data)
    return str(whole)


def is_checkpoint(path: str | Path) -> bool:
    """Returns whether a folder holds a finished checkpoint of this format (of any version)."""
    return (Path(path) / MARKER).is_file()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint folder without reading a tensor.

    Raises:
      ModelNotFound: no such folder.
      CheckpointError: not a finished checkpoint, of a newer format, or its metadata is damaged; names the file.
      UnsupportedModel: config.json requires something unsupported.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelNotFound(f"no checkpoint folder at {path}", hint="see `llama-jax list`")
    if not is_checkpoint(path):
        hint = "convert it first: `llama-jax convert SOURCE DESTINATION`"
        if (path / PARAMS).exists():
            hint = "its conversion did not finish; run it again"
        raise CheckpointError(f"{path} is not a finished checkpoint: it has no {MARKER}", hint=hint)
    marker = read_json(path / MARKER)
    version = _version(marker, path / MARKER)
    metadata_path = path / PARAMS / _ORBAX_METADATA
    custom = read_json(metadata_path).get("custom_metadata")
    if not isinstance(custom, dict):
        raise CheckpointError(f"{metadata_path} holds no metadata of llama_jax", hint=DAMAGED)
    _version(custom, metadata_path)
    tensors = _tensor_infos(custom, metadata_path)
    generation = path / GENERATION_CONFIG
    try:
        source = parse_source(marker.get("source", {}))
        dtype, files = marker["dtype"], dict(marker.get("files", {}))
        tool = " ".join(marker.get("tool", {}).values())
        if not all(isinstance(digest, str) for digest in files.values()) or dtype not in DTYPES:
            raise ValueError("a value has another type than it should")
        if strange := [name for name in files if not is_file_name(name)]:
            raise ValueError(f"file {strange[0]!r} leads out of the folder")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path / MARKER} is damaged ({type(e).__name__}: {e})", hint=DAMAGED) from e
    return Checkpoint(
        path=path,
        config=config_from_hf(read_json(path / CONFIG)).replace(schemes=_schemes(tensors, metadata_path)),
        tensors=tensors,
        source=source,
        dtype=dtype,
        generation_config=read_generation_config(generation) if generation.is_file() else {},
        tool=tool,
        file_digests=files,
        format_version=version,
    )


DAMAGED = "the checkpoint is damaged; convert it again, or copy it again from where it came"
UPGRADE = "upgrade llama-jax, or convert the model again with this version"
CORRECT = "correct the file, or get it again from where the model came"
"""The hint if a file of a source, which people edit, cannot be parsed."""
_MAX_JSON_BYTES = 32 << 20
"""Several times the largest index of a published model; parsed JSON takes up to 25 times the memory of its text."""


def read_json(path: Path, *, hint: str = DAMAGED) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
      hint: what helps where its contents are wrong: a file of a checkpoint has a digest, one of a source has not.

    Raises:
      CheckpointError: it is missing, unreadable, too large, not JSON or not an object.
    """
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes", hint=f"at most {_MAX_JSON_BYTES:,} can be read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing", hint=hint) from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", hint="check its permissions") from e
    except (ValueError, RecursionError) as e:
        refuse(path, wrong_file(*read_head(path), "json"), e)
        raise CheckpointError(f"{path} is not valid JSON ({e})", hint=hint) from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", hint=hint)
    return value


def read_generation_config(path: Path, *, hint: str = DAMAGED) -> dict[str, Any]:
    """Reads a generation_config.json; `hint` as for `read_json`.

    Raises:
      CheckpointError: see `read_json`; or eos_token_id is neither a token id nor a list of them.
    """
    values = read_json(path, hint=hint)
    eos = values.get("eos_token_id")
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        # Old files write -1 for none.
        if type(token) is not int or not -1 <= token < 2**31:
            raise CheckpointError(f"{path}: eos_token_id is not a token id: {token!r}", hint="correct it in the file")
    return values


def parse_source(value: Mapping[str, Any]) -> Source:
    """The source that a JSON object names.

    Raises:
      TypeError, ValueError: it has other keys, or values that are no texts.
    """
    source = Source(**value)
    named = {key: text for key, text in asdict(source).items() if text is not None}
    if not {"kind", "name"} <= named.keys() or not all(isinstance(text, str) for text in named.values()):
        raise ValueError("the source has values that are not texts")
    return source


def is_file_name(name: str) -> bool:
    """Returns whether a name is that of a file in the checkpoint's folder or in its `TEMPLATES`, and not a path out."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    plain = name.removeprefix(f"{TEMPLATES}/")
    return plain == Path(plain).name and "\0" not in plain and plain not in ("", "..")


def _version(metadata: Mapping[str, Any], path: Path) -> int:
    version = metadata.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} has no valid format_version (got {version!r})", hint=DAMAGED)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}",
            hint=UPGRADE,
        )
    return version


def _tensor_infos(custom: Mapping[str, Any], path: Path) -> dict[str, TensorInfo]:
    try:
        digests, layouts = custom["digests"], custom["tensors"]
        infos = {
            name: TensorInfo(
                tuple(layouts[name]["shape"]), layouts[name]["dtype"], value, layouts[name].get("scheme", "plain")
            )
            for name, value in digests.items()
        }
        sound = layouts.keys() == digests.keys() and all(
            i.dtype in (DTYPES if i.scheme == "plain" else ITEMSIZES)
            and isinstance(i.digest, str)
            and isinstance(i.scheme, str)
            and len(i.shape) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n < 2**63 for n in i.shape)
            for i in infos.values()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path}: the list of tensors is damaged ({e!r})", hint=DAMAGED) from e
    if not sound:
        raise CheckpointError(f"{path}: the list of tensors is inconsistent", hint=DAMAGED)
    return infos


def _schemes(tensors: Mapping[str, TensorInfo], path: Path) -> tuple[tuple[str, str], ...]:
    """The scheme of every leaf that is not plain, by name, for `LlamaConfig.schemes`."""
    pairs = sorted({(name.rpartition(".")[0], t.scheme) for name, t in tensors.items() if t.scheme != "plain"})
    if len(dict(pairs)) < len(pairs):
        raise CheckpointError(f"{path}: the members of a leaf name several schemes", hint=DAMAGED)
    return tuple(pairs)


def custom_metadata(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The metadata written into the Orbax checkpoint beside the arrays; read by `open_checkpoint`."""
    return {
        "format_version": FORMAT_VERSION,
        "digests": {name: t.digest for name, t in tensors.items()},
        "tensors": {
            name: {"shape": list(t.shape), "dtype": t.dtype} | ({} if t.scheme == "plain" else {"scheme": t.scheme})
            for name, t in tensors.items()
        },
    }


def set_custom_metadata(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Adds our metadata to the Orbax checkpoint in a folder, where `orbax.checkpoint.v1.metadata` finds it."""
    path = folder / PARAMS / _ORBAX_METADATA
    path.write_text(json.dumps(read_json(path) | {"custom_metadata": custom_metadata(tensors)}), encoding="utf-8")


def marker(source: Source, dtype: str, tool_version: str, file_digests: Mapping[str, str]) -> dict[str, Any]:
    """Contents of llama_jax.json, but for its own digest."""
    return {
        "format_version": FORMAT_VERSION,
        "source": asdict(source),
        "tool": {"name": "llama_jax", "version": tool_version},
        "dtype": dtype,
        "files": dict(file_digests),
    }
