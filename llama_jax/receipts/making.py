"""Makes receipts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np

from llama_jax.cache import DEFAULT_PAGE_SIZE
from llama_jax.checkpoint.format import Digest, digest
from llama_jax.doctor.packages import installed_versions
from llama_jax.errors import RequestError
from llama_jax.generation.outputs import RequestOutput
from llama_jax.kernels import report
from llama_jax.model.loaded import Model
from llama_jax.params import Params, flatten
from llama_jax.receipts.record import Receipt
from llama_jax.runtime import device_name
from llama_jax.sampling import GREEDY_BELOW, Grammar, SamplingParams

FLAGS = ("XLA_FLAGS", "LLAMA_JAX_KERNELS", "JAX_DEFAULT_MATMUL_PRECISION")
"""Environment variables that change what is computed."""


def receipt(
    model: Model,
    outputs: Sequence[RequestOutput],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    load: Mapping[str, Any] | None = None,
) -> Receipt:
    """A receipt of a run of `generate` or `batch_generate`: `replay` runs it again and compares.

    The model's parameters are read once, for their digest.

    Args:
      outputs: from `batch_generate`; params: the parameters that it was given.
      load: options of `load` that the model does not tell itself (`weights`, `convert`).

    Raises:
      RequestError: tokens were drawn without a seed, or restricted by plugins' processors, which nothing records.
    """
    each = [params] * len(outputs) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(outputs):
        raise RequestError(
            f"{len(outputs)} outputs but {len(each)} sampling parameters",
            param="params",
            hint="give the parameters that batch_generate was given",
        )
    requests = [
        request_json(output.prompt_token_ids, p, [c.token_ids for c in output.outputs])
        for output, p in zip(outputs, each, strict=True)
    ]
    return made(model, requests, load=load, run={"page_size": page_size})


def made(
    model: Model, requests: Sequence[Mapping[str, Any]], *, load: Mapping[str, Any] | None, run: Mapping[str, Any]
) -> Receipt:
    """A receipt of these requests, made now."""
    return Receipt(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            "name": model.name,
            "digest": params_digest(model.params),
            "config": digest(repr(model.config).encode()),
            "adapters": adapters_digests(model),
        },
        load=_loaded(model) | {**(load or {})},
        run=run,
        requests=requests,
        kernels=kernels(),
        environment=environment(model),
    )


def params_digest(params: Params) -> str:
    """Digest of parameters as they are in memory: names, shapes, dtypes and bytes, a leaf at a time.

    Joined projections (`load(fuse=)`), quantised forms and dtypes of the same model have digests of their own.
    """
    whole = Digest()
    for name, leaf in sorted(flatten(params).items()):
        whole.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
        whole.update(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8))
    return str(whole)


def adapters_digests(model: Model) -> dict[str, str]:
    """Digests of the adapters that requests can name, which the parameters do not hold."""
    return {name: adapter.digest for name, adapter in model.adapters.items()}


def request_json(prompt: Sequence[int], params: SamplingParams, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One entry of `Receipt.requests`.

    Args:
      prompt: token ids; tokens: new ones of each continuation.
    """
    return {
        "prompt_token_ids": list(prompt),
        "params": params_json(params),
        "token_ids": [list(each) for each in tokens],
    }


def params_json(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON values.

    Raises:
      RequestError: they do not fix the tokens.
    """
    if params.logits_processors:
        raise RequestError(
            f"a receipt cannot hold the logits processors {', '.join(params.logits_processors)}",
            param="logits_processors",
            hint="make receipts of runs without plugins' processors",
        )
    if params.temperature >= GREEDY_BELOW and params.seed is None:
        raise RequestError(
            f"temperature {params.temperature} without a seed: the run cannot be repeated",
            param="seed",
            hint="give a seed, e.g. seed=1",
        )
    found: dict[str, Any] = {}
    for field in fields(params):
        value = getattr(params, field.name)
        default = field.default if field.default is not MISSING else {}
        if value != default and not (isinstance(value, tuple) and not value):
            found[field.name] = value.request if isinstance(value, Grammar) else value
    if "logit_bias" in found:
        found["logit_bias"] = {str(token): bias for token, bias in found["logit_bias"].items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def params_of(saved: Mapping[str, Any]) -> SamplingParams:
    """The parameters of `params_json`."""
    bias = {int(token): value for token, value in saved.get("logit_bias", {}).items()}
    return SamplingParams(**{**saved, "logit_bias": bias})


def environment(model: Model) -> dict[str, Any]:
    """Versions, device and flags of this process."""
    versions = {name: version for name, version in installed_versions().items() if version is not None}
    return {
        "device": device_name(model.device, model.mesh),
        "devices": len(model.devices),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }


def kernels() -> list[dict[str, str]]:
    """The backends of the operations in programs that this process traced."""
    names = ("operation", "dtype", "shape", "backend")
    found = {tuple(str(getattr(choice, name)) for name in names) for choice in report()}
    return [dict(zip(names, each, strict=True)) for each in sorted(found)]


def _loaded(model: Model) -> dict[str, Any]:
    """Options to load such a model with."""
    mesh = None
    if model.mesh is not None:
        mesh = ",".join(f"{name}={size}" for name, size in model.mesh.shape.items())
    return {
        "dtype": model.dtype.name,
        "kv_dtype": model.kv_dtype,
        "activations": model.config.activations,
        "mesh": mesh,
        "kernels": dict(model.kernels),
    }
