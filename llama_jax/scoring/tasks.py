"""lm-eval's tasks on a loaded model. Needs the extra `eval`, which is imported when it is used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from llama_jax.checkpoint import Progress
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.library.network import is_offline
from llama_jax.model.loaded import Model
from llama_jax.text.tokenizer import Tokenizer


def adapter() -> ModuleType:
    """`scoring.lm_eval`, imported with lm-eval.

    Hugging Face's libraries, which lm-eval fetches data with, are told here that there is no telemetry, and of
    LLAMA_JAX_OFFLINE: they read their settings when they are imported.

    Raises:
      RequestError: lm-eval is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if is_offline():
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        return importlib.import_module("llama_jax.scoring.lm_eval")
    except ImportError as error:
        raise RequestError(
            f"lm-eval cannot be imported: {error}",
            param="eval",
            hint="install the extra eval: uv sync --inexact --extra eval, in a checkout",
        ) from error


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs lm-eval's tasks.

    Args:
      tasks: names of tasks, groups or tags.
      include_path: a folder of more tasks. Paths of data in them are relative to the working directory.
      max_length, batch_tokens, progress: as for `score`.
      options: of `lm_eval.simple_evaluate`: num_fewshot, limit, apply_chat_template, ...

    Returns:
      lm-eval's results: "results" by task and metric, "samples" by task, "configs", "n-samples", ...

    Raises:
      RequestError: lm-eval is not installed; there is no such task, or it cannot be loaded.
    """
    lm = adapter().LlamaJaxLM(model, tokenizer, max_length=max_length, batch_tokens=batch_tokens, progress=progress)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = _checked(lambda: TaskManager(include_path=include_path))
    known = {name: manager.match_tasks([name]) for name in tasks}
    if missing := [name for name, found in known.items() if not found]:
        raise RequestError(
            f"lm-eval knows no task {', '.join(missing)}",
            param="tasks",
            hint="`lm-eval ls tasks` lists its own; --include_path DIR adds a folder of yours",
        )
    asked = list(dict.fromkeys(name for found in known.values() for name in found))
    return dict(_checked(lambda: simple_evaluate(lm, tasks=asked, task_manager=manager, **options)))


def _checked[T](run: Callable[[], T]) -> T:
    """Calls lm-eval; what it raises about tasks and their data becomes a typed error."""
    try:
        return run()
    except LlamaJaxError:
        raise
    except (KeyError, ValueError, OSError) as error:
        raise RequestError(
            f"lm-eval: {type(error).__name__}: {error}",
            param="tasks",
            hint="check the task's file; paths of data in it are relative to the working directory",
        ) from error
