"""Settings that every entry point shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llama_jax.runtime import default_dtype, device_name

REPORT = "print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)"
ENABLE = "from llama_jax.runtime import enable_compilation_cache as enable; enable(); " + REPORT


def run(code: str, tmp_path: Path, **variables: str) -> list[str]:
    """The output of a fresh process, without the cache settings of the tests themselves."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE"))
    }
    environment = {**clean, "LLAMA_JAX_CACHE": str(tmp_path / "cache"), **variables}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return result.stdout.split()


def test_defaults_of_a_cpu() -> None:
    assert default_dtype() == jnp.float32
    assert default_dtype() is not jnp.float32  # a dtype, not a scalar type
    assert device_name().startswith("cpu (")
    assert device_name(jax.devices()[0]) == device_name()


@pytest.mark.gpu
def test_defaults_of_a_gpu() -> None:
    assert default_dtype() == jnp.bfloat16
    assert not device_name().startswith("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "variables", "want"),
    [
        ("", {}, ["{cache}/xla", "0.05"]),
        ("", {"JAX_COMPILATION_CACHE_DIR": "/tmp/mine"}, ["/tmp/mine", "0.05"]),
        ("jax.config.update('jax_compilation_cache_dir', '/tmp/mine'); ", {}, ["/tmp/mine", "0.05"]),
        ("", {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2.0"}, ["{cache}/xla", "2.0"]),
    ],
)
def test_the_cache_folder_is_ours_unless_the_user_chose_one(
    before: str, variables: dict[str, str], want: list[str], tmp_path: Path
) -> None:
    got = run(f"import jax; {before}{ENABLE}", tmp_path, **variables)
    assert got == [part.format(cache=tmp_path / "cache") for part in want]


@pytest.mark.slow
def test_programs_are_kept_from_one_process_to_the_next(tmp_path: Path) -> None:
    """load() turns the cache on; a second process finds what the first one compiled."""
    tests = Path(__file__).parent
    code = f"""
import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]
from pathlib import Path
import jax
from llama_jax.generation import generate
from llama_jax.loading import load
from tiny_chat_model import write_chat_model
folder = Path("model")
if not folder.exists():
    write_chat_model(folder)
misses = []
jax.monitoring.register_event_listener(
    lambda event, **_: misses.append(event) if event == "/jax/compilation_cache/cache_misses" else None
)
model, tokenizer = load(folder)
generate(model, tokenizer, "The", max_tokens=3)
print(len(misses))
"""
    (first,) = run(code, tmp_path)
    assert any((tmp_path / "cache" / "xla").iterdir())
    (second,) = run(code, tmp_path)
    assert int(first) >= 2
    assert int(second) < int(first)
