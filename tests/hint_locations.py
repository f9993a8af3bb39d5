"""Where the package gives hints, read from its source: each `hint=` of a call, with all that it may say."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("llama_jax", "convert", "kernels", "scripts")


class Location(NamedTuple):
    """The place of a hint: file, and the function in it."""

    file: str
    function: str


def hints() -> Iterator[tuple[Location, str]]:
    """Every hint: where it is given, and its text. A condition's hints count singly, holes of f-strings as "…"."""
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT)
        if not any(parent.is_symlink() for parent in path.parents):  # kernels and convert have a second name
            yield from _of(ast.parse(path.read_text()), file, (), None)


def _of(node: ast.AST, file: Path, names: tuple[str, ...], function: ast.AST | None) -> Iterator[tuple[Location, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = function if isinstance(child, ast.ClassDef) else child
            yield from _of(child, file, (*names, child.name), inner)
            continue
        if isinstance(child, ast.Call):
            for keyword in child.keywords:
                if keyword.arg == "hint":
                    for text in set(_texts(keyword.value, file, function)):
                        yield Location(file.as_posix(), ".".join(names)), text
        yield from _of(child, file, names, function)


def _texts(value: ast.expr, file: Path, function: ast.AST | None) -> list[str]:
    """All values of an expression."""
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            texts = [""]
            for part in parts:
                said = [part.value] if isinstance(part, ast.Constant) else None
                if isinstance(part, ast.FormattedValue):
                    said = _texts(part.value, file, function) or ["…"]
                texts = [f"{text}{more}" for text in texts for more in said or ["…"]]
            return texts
        case ast.IfExp(body=one, orelse=other):
            return _texts(one, file, function) + _texts(other, file, function)
        case ast.BinOp(left=left, right=right):
            return [a + b for a in _texts(left, file, function) for b in _texts(right, file, function)]
        case ast.Name(id=name):
            constant = getattr(importlib.import_module(_module(file)), name, None)
            if isinstance(constant, str):
                return [constant]
            assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)] if function else []
            named = [a.value for a in assigned if any(isinstance(t, ast.Name) and t.id == name for t in a.targets)]
            return [text for expression in named for text in _texts(expression, file, None)]
        case ast.Attribute(value=ast.Name(id=holder), attr=name):
            found = getattr(getattr(importlib.import_module(_module(file)), holder, None), name, None)
            return [found] if isinstance(found, str) else []
    return []


def _module(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "llama_jax" else ("llama_jax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
