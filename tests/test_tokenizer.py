"""Loading, encoding, decoding and streaming; small vocabularies with ids from independent encoders."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.errors import TokenizerError, UnsupportedModel
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.text.tokenizer.detokenizer import byte_alphabet
from llama_jax.text.tokenizer.guard import ControlGuard, strip_sentinels

DATA = Path(__file__).parent / "data" / "tokenizer"
EXPECTED = json.loads((DATA / "expected_small.json").read_text())
TEXT = st.text() | st.text(alphabet="ab <|>/s_imend\n\ufdd0\ufdd1é日👍🏽\u200d", max_size=30)


def write_byte_level(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = json.loads((DATA / "byte_level_gguf.json").read_text())
    for name, content in tokenizer_files(metadata).items():
        (folder / name).write_text(content)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def write_sentencepiece(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((DATA / "sentencepiece.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("spm")))


@pytest.fixture(scope="module", params=["byte_level", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.getfixturevalue(request.param)
    return made


def test_import_is_lazy() -> None:
    code = (
        "import sys, llama_jax.text.tokenizer, llama_jax.text.chat; "
        "print([m for m in ('jax', 'tokenizers', 'jinja2', 'sentencepiece') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_sentencepiece_model_equals_the_library(spm: Tokenizer) -> None:
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"]["sentencepiece"], strict=True):
        assert spm.encode(text, parse_special=False) == [1, *ids], text
    assert (spm.bos_token, spm.bos_token_id, spm.eos_token, spm.eos_token_id) == ("<s>", 1, "</s>", 2)
    assert spm.special_tokens.keys() == {"<unk>", "<s>", "</s>", "<|ctl|>"}


def test_sentencepiece_model_equals_sentencepiece(spm: Tokenizer) -> None:
    """The merges by score do what the SentencePiece library does."""
    reference = SentencePieceProcessor(model_file=str(DATA / "sentencepiece.model"))
    sentence = "the layers of a model are pure functions, 日本 é 123 x_y (4.5) `code`\n"
    for start in range(len(sentence)):
        for text in (sentence[start:], (sentence * 3)[start:].replace(" ", "  "), " \n" + sentence[start:]):
            assert spm.encode(text, add_special_tokens=False) == reference.encode(text), text
            assert spm.decode(reference.encode(text)) == reference.decode(reference.encode(text))


@settings(deadline=None)
@given(text=TEXT)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    if not tokenizer.token_id("<0x00>"):  # SmolLM2's vocabulary has no tokens for some bytes that text rarely holds
        letters = {byte: char for char, byte in byte_alphabet().items()}
        assume(all(tokenizer.token_id(letters[byte]) is not None for byte in text.encode()))
    for parse_special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert decoded == text


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_stream_equals_whole(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Random ids, byte tokens among them: pieces join to the whole, and equal the tokenizers library's text."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces = [stream.add(i) for i in ids]
    text = "".join(pieces) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    library = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    # In a run of byte tokens that is not UTF-8 the library loses the good characters of the run too.
    assert text == library or "\ufffd" in library


@settings(deadline=None)
@given(text=st.text(alphabet="añ日👩‍👧🏽🇫🇷\n ", min_size=1, max_size=20))
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.detokenizer()
    so_far = ""
    for token_id in ids:
        piece = stream.add(token_id)
        so_far += piece
        assert "\ufffd" not in piece
        assert text.endswith(so_far) or so_far in text
    assert stream.finish() == ""


def test_unfinished_character_shows_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🦙", add_special_tokens=False)[:-1]
    stream = tokenizer.detokenizer()
    assert "".join(stream.add(i) for i in ids).strip() == "ok"
    assert stream.finish() == "\ufffd"


def test_stream_after_prompt(spm: Tokenizer) -> None:
    """The space between prompt and answer is kept, and a character may span both."""
    ids = spm.encode("the model 🦙", add_special_tokens=False)
    for cut in range(1, len(ids)):
        stream = spm.detokenizer(prompt_ids=ids[:cut])
        answer = "".join(stream.add(i) for i in ids[cut:]) + stream.finish()
        assert spm.decode(ids[:cut]).rstrip("\ufffd") + answer == "the model 🦙"


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans(), text=st.text(alphabet="añ日🦙 ", max_size=8))
def test_stream_after_any_prompt(tokenizer: Tokenizer, data: st.DataObject, skip: bool, text: str) -> None:
    """The unfinished end of a prompt's tokens is the same, whether all of them are looked at or a few."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    ids += tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.detokenizer(skip_special_tokens=skip)
    for token in ids[:cut]:
        whole.add(token)
    stream = tokenizer.detokenizer(skip_special_tokens=skip, prompt_ids=ids[:cut])
    assert [*map(stream.add, ids[cut:]), stream.finish()] == [*map(whole.add, ids[cut:]), whole.finish()]


def test_long_texts(tokenizer: Tokenizer) -> None:
    """Their ids are those of their parts, and other threads run meanwhile."""
    part, beats, done = "The quick brown fox. ", list[float](), threading.Event()
    text = part * 6_000

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.perf_counter())

    other = threading.Thread(target=beat)
    other.start()
    began = time.perf_counter()
    ids = tokenizer.encode(text, add_special_tokens=False)
    ended = time.perf_counter()
    done.set()
    other.join()
    assert tokenizer.decode(ids) == text
    assert sum(began < at < ended for at in beats) > 3


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40, True, 1.5, "1", None])
def test_ids_out_of_range(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(TokenizerError, match="not in the vocabulary"):
        tokenizer.decode([1, 1, bad])


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TokenizerError, match="must be a string"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_parse_special(tokenizer: Tokenizer) -> None:
    """Every control token of the vocabulary, alone and in between, is one id or plain text as asked."""
    for token, token_id in tokenizer.special_tokens.items():
        for text in (token, f"a{token}b", f"{token}{token}", f" {token} "):
            assert token_id in tokenizer.encode(text, add_special_tokens=False)
            plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            assert not tokenizer.special_ids.intersection(plain)
            assert tokenizer.decode(plain).strip() == text.strip()


def test_added_tokens_that_are_not_special_stay_whole(byte_level: Tokenizer) -> None:
    think = byte_level.token_id("<think>")
    assert think not in byte_level.special_ids
    for parse_special in (True, False):
        assert byte_level.encode("<think>", parse_special=parse_special) == [think]


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["<", "|", ">", "im", "_end", "<|im_end|>", "<think>", "a", " ", "\ufdd0"])))
def test_protected_text_keeps_its_meaning(parts: list[str]) -> None:
    guard = ControlGuard(frozenset({"<|im_end|>", "</s>"}), frozenset({"<think>"}))
    text = "".join(parts)
    protected = guard.protect(text)
    assert strip_sentinels(protected) == text
    assert guard.count(protected) == 0
    assert protected.count("<think>") == text.count("<think>")


def test_control_token_of_one_character() -> None:
    with pytest.raises(TokenizerError, match="☃"):
        ControlGuard(frozenset({"☃"})).protect("a ☃")


def test_bos_is_never_doubled(spm: Tokenizer, tmp_path: Path) -> None:
    assert spm.encode("<s>hi").count(1) == spm.encode("<s><s>hi").count(1) == spm.encode("hi").count(1) == 1
    assert spm.encode("<s><s>hi", add_special_tokens=False).count(1) == 2
    silent = load_tokenizer(write_byte_level(tmp_path, add_bos_token=False))  # nothing is added, nothing taken away
    assert silent.encode("<|im_start|><|im_start|>") == [1, 1]


def test_post_processor_of_the_file_is_used_without_flags(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|im_start|>"}}))
    assert load_tokenizer(folder).encode("hi")[0] == 1


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("a long enough text")) == "a long enough text"


def test_tokens_of_the_configuration(tmp_path: Path) -> None:
    size = load_tokenizer(write_byte_level(tmp_path)).vocab_size
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": True}
    listed = {str(size): {"content": "<|new|>", **flags}, "100": {"content": "<|moved|>", **flags}}
    tokenizer = load_tokenizer(write_byte_level(tmp_path, added_tokens_decoder={str(size): listed[str(size)]}))
    assert tokenizer.encode("a<|new|>", add_special_tokens=False)[1:] == [size]
    assert size in tokenizer.special_ids
    # It is "normalized", and still plain text is plain text.
    assert size not in tokenizer.encode("a<|new|>", parse_special=False)
    with pytest.raises(TokenizerError, match=r"<\|moved\|>.*100"):
        load_tokenizer(write_byte_level(tmp_path, added_tokens_decoder=listed))


def test_special_tokens_map(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, eos_token=None, pad_token={"content": "<file_sep>"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "x"}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|endoftext|>", tokenizer.token_id("x"))
    # transformers 5 reads it only where tokenizer_config.json lists no added tokens.
    write_byte_level(tmp_path, eos_token="<repo_name>", added_tokens_decoder={})
    assert load_tokenizer(folder).eos_token == "<repo_name>"


def test_chat_template_sources(tmp_path: Path) -> None:
    assert load_tokenizer(write_byte_level(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_tokenizer(tmp_path).chat_template == "from json"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_byte_level(tmp_path, chat_template=named)
    assert load_tokenizer(tmp_path).chat_templates == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("from file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(tmp_path).chat_templates == {"default": "from file", "tool_use": "T", "rag": "R"}


def test_merges_that_build_control_tokens_are_dropped(tmp_path: Path) -> None:
    """Some vocabularies can merge "<s>" out of plain text."""
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    for piece in ("<s", "<s>"):
        vocab.setdefault(piece, len(vocab))
    content["pre_tokenizer"]["use_regex"] = False
    content["model"]["merges"] = [["<", "s"], ["<s", ">"], *content["model"]["merges"]]
    content["added_tokens"].append({**content["added_tokens"][0], "id": vocab["<s>"], "content": "<s>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<s>") == [vocab["<s>"]]
    assert tokenizer.encode("<s>", parse_special=False) == [vocab["<s"], vocab[">"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
        ("special_tokens_map.json", b"\xff"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_byte_level(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_hostile_regex_is_an_error_not_a_panic(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    regex = {"Regex": "(a|aa)+$(?=b)"}
    content["pre_tokenizer"] = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError):
        load_tokenizer(folder).encode("a" * 60 + "c")


def test_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        load_tokenizer(folder)


def test_metaspace_decoder(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    reference = load_tokenizer(folder)
    content = json.loads(reference._backend.to_str())
    content["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the pure model", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids) == "the pure model"


def test_damaged_sentencepiece_model(tmp_path: Path) -> None:
    data = (DATA / "sentencepiece.model").read_bytes()
    for cut in (0, 1, 7, len(data) // 2, len(data) - 1):
        (tmp_path / "tokenizer.model").write_bytes(data[:cut])
        with pytest.raises((TokenizerError, UnsupportedModel), match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


def train(folder: Path, **options: Any) -> SentencePieceProcessor:
    text = [f"word{i} other{i % 7} <sym>{i}" for i in range(200)]
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, minloglevel=2, **{"model_type": "bpe", **options}
        )
    return SentencePieceProcessor(model_file=str(path))


def test_other_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    train(tmp_path, model_type="unigram", vocab_size=38)
    with pytest.raises(UnsupportedModel, match="unigram"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},  # nmt_nfkc, extra white space removed
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["<sym>"]},
        {"user_defined_symbols": ["<sym>", "<sym>1"]},
    ],
)
def test_normaliser_and_symbols_are_those_of_the_library(options: dict[str, Any], legacy: bool, tmp_path: Path) -> None:
    """A tokenizer.model's own rules for white space, characters and symbols decide the ids."""
    library = train(tmp_path, byte_fallback=True, vocab_size=360, **options)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = load_tokenizer(tmp_path)
    pieces = ["word1", " ", "  ", "<sym>", "<sym>1", "①ﬁ", "é", "\n", "\t", "other", ""]
    for parts in itertools.product(pieces, repeat=3):
        text = "".join(parts)
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == library.encode(text), text


def write_changed(folder: Path, change: Callable[[Any], None]) -> None:
    """Write the small model after a change of its ModelProto."""
    model = ModelProto.FromString((DATA / "sentencepiece.model").read_bytes())
    change(model)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def test_other_spellings_of_spaces_are_refused(tmp_path: Path) -> None:
    def suffix(model: Any) -> None:
        model.trainer_spec.treat_whitespace_as_suffix = True

    def plain(model: Any) -> None:
        model.normalizer_spec.escape_whitespaces = False

    for change, named in ((suffix, "marks spaces"), (plain, "marks spaces")):
        write_changed(tmp_path, change)
        with pytest.raises(UnsupportedModel, match=rf"tokenizer\.model {named}"):
            load_tokenizer(tmp_path)


def test_vocabulary_that_the_library_refuses(tmp_path: Path) -> None:
    def repeat(model: Any) -> None:
        model.pieces[-1].piece = model.pieces[-2].piece

    def no_bytes(model: Any) -> None:
        del model.pieces[20:]

    for change, named in ((repeat, "already defined"), (no_bytes, "256 byte pieces")):
        write_changed(tmp_path, change)
        with pytest.raises(TokenizerError, match=rf"tokenizer\.model is damaged: .*{named}"):
            load_tokenizer(tmp_path)


def test_piece_that_is_no_text(tmp_path: Path) -> None:
    data = (DATA / "sentencepiece.model").read_bytes()
    piece = max((piece.piece.encode() for piece in ModelProto.FromString(data).pieces), key=len)
    (tmp_path / "tokenizer.model").write_bytes(data.replace(piece, b"\xff" * len(piece)))
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is damaged: .*UTF-8"):
        load_tokenizer(tmp_path)


def test_disagreement_with_the_library_is_an_error(tmp_path: Path) -> None:
    """Among equal scores the library takes the leftmost pair, which no list of merges can say."""

    def level(model: Any) -> None:
        for piece in model.pieces:
            piece.score = 0

    write_changed(tmp_path, level)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: the sentencepiece library splits") as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_settings_of_the_library_are_followed(tmp_path: Path, prefix: bool, fallback: bool) -> None:
    def change(model: Any) -> None:
        model.normalizer_spec.add_dummy_prefix = prefix
        model.trainer_spec.byte_fallback = fallback
        if not fallback:
            normal = [piece for piece in model.pieces if piece.type != piece.BYTE]
            del model.pieces[:]
            model.pieces.extend(normal)

    write_changed(tmp_path, change)
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the pure model", "日本 the ☃☃ model\n\n 12", "a"):
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_protobuf_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sentencepiece(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model cannot be read: .*does not import") as caught:
        load_tokenizer(tmp_path)
    assert "protobuf" in caught.value.hint
