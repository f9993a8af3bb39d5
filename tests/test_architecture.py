"""Rules about the code itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILY = re.compile(r"mistral|mixtral|qwen|smollm|code_?llama|llama_?-?4(?![0-9])", re.IGNORECASE)
# The bundled model's name; every other file must speak of features, not of families.
ALLOWED = {"llama_jax/library/bundled.py": re.compile(r"smollm2", re.IGNORECASE)}


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and every string that is not a docstring."""
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # Attribute docs, too: any statement that is only a string.
            docstrings |= {id(s.value) for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("name", "id", "attr", "arg", "module", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), value


def family_names(source: str, allowed: re.Pattern[str] | None = None) -> list[str]:
    found = []
    for line, text in words(ast.parse(source)):
        if match := FAMILY.search(allowed.sub("", text) if allowed else text):
            found.append(f"{line}: {match.group()}")
    return found


def test_family_names() -> None:
    """A family is data: its name occurs only in config and convert."""
    files = [path for path in (ROOT / "llama_jax").rglob("*.py") if "llama_jax/config/" not in path.as_posix()]
    files = [path for path in files if path.resolve().is_relative_to(ROOT / "llama_jax")]
    # Shapes are data for tests and benchmarks, named after the models that have them.
    files += [path for path in (ROOT / "kernels").rglob("*.py") if path.name != "shapes.py"]
    assert len(files) > 3
    offences = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if found := family_names(path.read_text(), ALLOWED.get(name)):
            offences[name] = found
    assert not offences


def test_the_search_finds_names() -> None:
    assert family_names("def qwen2_rope(): pass") == ["1: qwen"]
    assert family_names("x = config.family == 'llama4_text'") == ["1: llama4"]
    assert family_names("x = f'a {y} Mixtral'") == ["1: Mixtral"]
    assert family_names('"""Mistral has windows."""\nx = "llama-405b"') == []
    assert family_names("x = 'smollm2-135m'", ALLOWED["llama_jax/library/bundled.py"]) == []
