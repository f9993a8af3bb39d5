"""Read a tokenizer from a model's folder: tokenizer.json or tokenizer.model, and the configuration beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llama_jax.checkpoint.format import TEMPLATES
from llama_jax.checkpoint.wrong_file import wrong_small_file
from llama_jax.errors import TokenizerError
from llama_jax.text.tokenizer.added import add_tokens, check_added, content, wanted_tokens
from llama_jax.text.tokenizer.guard import RESTORED
from llama_jax.text.tokenizer.sentencepiece_bpe import SPACE, SentencePieceModel, load_model
from llama_jax.text.tokenizer.tokenizer import Tokenizer, call_backend

if TYPE_CHECKING:
    import tokenizers

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE_BYTES = 256 << 20
"""Several times the size of the largest tokenizer.json."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model.

    Reads tokenizer.json, or else tokenizer.model; tokenizer_config.json, and where it lists no added tokens
    special_tokens_map.json and added_tokens.json, for added and named tokens; chat_template.jinja,
    additional_chat_templates/*.jinja, chat_template.json or tokenizer_config.json for chat templates, in that order, as
    transformers does (docs/tokenizers.md).

    Args:
      folder: a Hugging Face model folder, or any folder with these files.

    Raises:
      TokenizerError: files are missing, damaged or far too large; the message names the file.
      UnsupportedModel: the tokenizer is of a kind that no Llama-like model uses.
    """
    return tokenizer_from_files(_read_files(Path(folder)), Path(folder))


def tokenizer_from_files(files: Mapping[str, bytes | str], folder: Path) -> Tokenizer:
    """Like `load_tokenizer`, from files in memory.

    Args:
      files: contents by file name; unneeded ones are ignored.
      folder: their origin, for error messages.
    """

    def made() -> Tokenizer:
        read = _described(files, folder)
        backend = _without_control_merges(read.backend)
        _install_sentinel(backend)
        return Tokenizer(
            backend,
            special_tokens_map=read.names,
            chat_templates=read.templates,
            prefix=read.prefix,
        )

    # All of it passes contents of these files to the tokenizers library, which panics on some.
    return call_backend(f"{folder}: the tokenizer cannot be loaded", made)


@dataclass(frozen=True)
class Described:
    """A tokenizer as a model's files describe it, without the guard against control tokens in text.

    Attributes:
      backend: the `tokenizers` library's tokenizer.
      names: the strings of named tokens ("bos_token").
      templates: chat templates by name.
      model: the tokenizer.model that it was made from; None for a tokenizer.json.
    """

    backend: tokenizers.Tokenizer
    names: Mapping[str, str]
    templates: Mapping[str, str]
    model: SentencePieceModel | None = None

    @property
    def prefix(self) -> str:
        """Text to prepend that the backend does not add itself."""
        return SPACE if self.model is not None and self.model.prefix == "first" else ""


def read_tokenizer(folder: str | Path) -> Described:
    """Reads the same files as `load_tokenizer`, for programs that write them in another format.

    Raises:
      TokenizerError, UnsupportedModel: as `load_tokenizer`.
    """
    folder = Path(folder)
    return call_backend(f"{folder}: the tokenizer cannot be loaded", _described, _read_files(folder), folder)


def _described(files: Mapping[str, bytes | str], folder: Path) -> Described:
    config = _json_object(files, "tokenizer_config.json", folder)
    older: dict[str, Any] = {}
    if config.get("added_tokens_decoder") is None:  # like transformers 5, which reads both only then
        config |= _json_object(files, "special_tokens_map.json", folder)
        older = _json_object(files, "added_tokens.json", folder)
    if "tokenizer.json" in files:
        read = Described(_from_json(_as_bytes(files["tokenizer.json"]), folder), {}, {})
        check_added(len(read.backend.get_added_tokens_decoder()), folder)
    elif "tokenizer.model" in files:
        model = load_model(
            _as_bytes(files["tokenizer.model"]),
            name=str(folder / "tokenizer.model"),
            legacy=bool(config.get("legacy")),
            add_prefix_space=config.get("add_prefix_space") is not False,
        )
        config = {**model.defaults, **{k: v for k, v in config.items() if v is not None or k not in model.defaults}}
        read = Described(model.backend, {}, {}, model)
    else:
        raise TokenizerError(
            f"{folder} holds no tokenizer", hint="copy tokenizer.json (or tokenizer.model) of the model there"
        )
    names = {name: text for name in _NAMED_TOKENS if (text := content(config.get(name))) is not None}
    add_tokens(read.backend, wanted_tokens(config, older, names, folder), raw=read.model is not None, folder=folder)
    if read.model is not None:  # a tokenizer.json has its own, and ignores these flags
        _set_post_processor(read.backend, config, names)
    read.backend.no_truncation()
    read.backend.no_padding()
    return replace(read, names=names, templates=_templates(files, config, folder))


def _read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that a tokenizer is made from, by name."""
    names = [*_FILES, *(f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja")))]
    files = {}
    for name in names:
        if (path := folder / name).is_file():
            try:
                _check_size(path.stat().st_size, path)
                files[name] = path.read_bytes()
                if (found := wrong_small_file(name, files[name])) is not None:
                    raise TokenizerError(f"{path} {found.what}", hint=found.hint)
            except OSError as error:
                raise TokenizerError(
                    f"{path} cannot be read: {error.strerror}", hint="check the file's permissions"
                ) from error
    return files


def _from_json(data: bytes, folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    _check_size(len(data), path)
    return call_backend(f"{path} cannot be read", Backend.from_buffer, data)


def _as_bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _check_size(size: int, path: Path) -> None:
    if size > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size:,} bytes, a tokenizer's files have {MAX_FILE_BYTES:,} at most",
            hint="this is not a valid tokenizer; get the model from where it was published",
        )


def _json_object(files: Mapping[str, bytes | str], name: str, folder: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / name} is not valid JSON: {error}", hint="fetch the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{folder / name} does not hold a JSON object", hint="fetch the file again")
    return content


def _set_post_processor(backend: tokenizers.Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Applies add_bos_token and add_eos_token to the tokens around a text."""
    from tokenizers.processors import TemplateProcessing

    bos = names.get("bos_token") if config.get("add_bos_token") else None
    eos = names.get("eos_token") if config.get("add_eos_token") else None
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([bos, eos]) if token],
    )


def _install_sentinel(backend: tokenizers.Tokenizer) -> None:
    """Make the tokenizer drop sentinels and restore escaped ones before anything else (`guard`)."""
    from tokenizers import normalizers

    steps = [normalizers.Replace(old, new) for old, new in RESTORED]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])


def _without_control_merges(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Drop BPE merges that build a control token out of plain text.

    Some vocabularies list "<s>" like any other piece. The tokenizer is rebuilt only if plain text does yield one of its
    control tokens.
    """
    unknown = getattr(backend.model, "unk_token", None)
    special = {
        token.content: i
        for i, token in backend.get_added_tokens_decoder().items()
        if token.special and token.content != unknown
    }
    plain = type(backend)(backend.model)  # the model alone, without added tokens
    if not any(
        special[token] in plain.encode(prefix + token, add_special_tokens=False).ids
        for token in special
        for prefix in ("", "a")
    ):
        return backend
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        return backend  # `Tokenizer.encode_guarded` refuses the result
    content["model"]["merges"] = [
        merge
        for merge in content["model"]["merges"]
        if ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)) not in special
    ]
    return call_backend("the tokenizer cannot be rebuilt", type(backend).from_str, json.dumps(content))


def _templates(files: Mapping[str, bytes | str], config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Chat templates by name."""
    templates: dict[str, str] = {}
    given = config.get("chat_template")
    if given is None:
        given = _json_object(files, "chat_template.json", folder).get("chat_template")
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, Mapping):
        templates.update({str(name): str(text) for name, text in given.items()})
    elif isinstance(given, list):
        for entry in given:
            if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                raise TokenizerError(f"{folder}: chat_template holds {entry!r:.80}", hint="fetch the file again")
            templates[str(entry.get("name", "default"))] = entry["template"]
    named = {PurePosixPath(file).stem: file for file in files if file.startswith(f"{TEMPLATES}/")}
    for name, file in (named | {"default": "chat_template.jinja"}).items():
        if file in files:
            try:
                templates[name] = _as_bytes(files[file]).decode()
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{folder / file} is not UTF-8: {error}", hint="fetch the file again") from error
    return templates
