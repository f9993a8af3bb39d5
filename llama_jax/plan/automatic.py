"""`mesh="auto"`: the devices of this machine, and how a model is split over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.disk import size_text
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.plan.device_memory import free_bytes
from llama_jax.plan.mesh_choice import MeshChoice, choose_mesh
from llama_jax.plan.workload import Workload, default_workload
from llama_jax.sharding import DeviceMesh, RuledMesh, automatic_mesh, make_mesh
from llama_jax.targets import Target, default_device, of_device

AUTO = "auto"


@dataclass(frozen=True)
class AutoMesh:
    """Requests the mesh that `choose_mesh` picks for the devices of this process; "auto" is short for `AutoMesh()`.

    Attributes:
      batch: rows at a time; by default as many as there are devices.
      context: tokens of a row, prompt and answer together; by default 4096. At most what the model can take counts.
      prompt: of these, the prompt's; by default 512.
    """

    batch: int | None = None
    context: int | None = None
    prompt: int | None = None

    def workload(self, config: LlamaConfig, dtype: str, devices: int, kv_dtype: str | None = None) -> Workload:
        """The workload that is planned for.

        Raises:
          RequestError: a number is not positive, or the prompt is longer than the context.
        """
        context = None if self.context is None else min(self.context, config.context_length)
        prompt = None if self.prompt is None else min(self.prompt, config.context_length)
        batch = devices if self.batch is None else self.batch
        workload = default_workload(config, dtype, batch=batch, context=context, prompt=prompt, kv_dtype=kv_dtype)
        workload.check(config)
        return workload


type MeshRequest = DeviceMesh | AutoMesh | Literal["auto"] | None
"""The `devices` that `load` takes: the devices themselves, or a request to choose them."""


def resolve_mesh(
    mesh: MeshRequest,
    config: LlamaConfig,
    dtype: DTypeLike,
    notify: Callable[[str], None] | None = None,
    *,
    kv_dtype: str | None = None,
) -> DeviceMesh | None:
    """The requested mesh, with automatic axes; None for one device.

    Args:
      dtype: of weights, activations and, without `kv_dtype`, the cache.
      notify: told what "auto" has chosen, and why.

    Raises:
      RequestError: it is something else.
      DoesNotFit: "auto" finds no mesh of this process's devices that the model fits.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh | RuledMesh):
        return automatic_mesh(mesh)
    request = AutoMesh() if mesh == AUTO else mesh
    if not isinstance(request, AutoMesh):
        raise RequestError(f"{mesh!r} is not a mesh", param="mesh", hint='give "auto", or make_mesh("data=2,tensor=4")')
    return _find_mesh(request, config, jnp.dtype(dtype).name, kv_dtype, notify)


def _find_mesh(
    request: AutoMesh,
    config: LlamaConfig,
    dtype: str,
    kv_dtype: str | None,
    notify: Callable[[str], None] | None,
) -> Mesh | None:
    if jax.process_count() > 1:
        raise RequestError(
            f"mesh=auto chooses among the devices of one process; there are {jax.process_count()} processes",
            param="mesh",
            hint="give the mesh yourself: make_mesh(data=2, tensor=4)",
        )
    target, alike, others = _devices()
    workload = request.workload(config, dtype, len(alike), kv_dtype)
    choice = choose_mesh(config, target, workload, devices=len(alike), usable=free_bytes(alike, target))
    if choice.fits is False:
        raise _does_not_fit(choice, workload, alike)
    if notify is not None:
        notify(explain_choice(choice, workload, alike[0].device_kind, len(alike)) + _left_out(others))
    if not choice.chosen.sizes:
        return None
    every = not others and alike == jax.devices()
    return make_mesh(choice.chosen.sizes, devices=None if every else alike)


def _devices() -> tuple[Target, list[jax.Device], list[jax.Device]]:
    """The default device's target, this process's devices like it with that device first, and the other ones."""
    first = default_device()
    target = of_device(first)
    there = first.client.local_devices()
    alike = [d for d in there if (d.device_kind, of_device(d)) == (first.device_kind, target)]
    return target, sorted(alike, key=lambda d: d != first), [d for d in there if d not in alike]


def explain_choice(choice: MeshChoice, workload: Workload, kind: str, devices: int) -> str:
    """One line: the choice, the alternatives, and the reason."""
    chosen = choice.chosen
    here = f"{chosen.devices} of {devices} x {kind}" if devices > 1 else kind
    reasons = [_memory(choice)]
    if choice.rejected:
        need = choice.rejected[-1]
        assert need.peak is not None
        reasons.append(f"{_axes(need.sizes)} would need {size_text(need.peak)}")
    if chosen.devices < devices:
        rows = "1 row has" if workload.batch == 1 else f"{workload.batch} rows have"
        reasons.append(f"{rows} no use for more copies, but a larger tensor=N of your own may be faster")
    return f"Loading on {here} ({_axes(chosen.sizes)}), chosen for {_text(workload)}: {'; '.join(reasons)}"


def _memory(choice: MeshChoice) -> str:
    if choice.chosen.peak is None or choice.usable is None:
        return "their memory is not known, so it is taken to fit"
    return f"each needs {size_text(choice.chosen.peak)} of {size_text(choice.usable)} free"


def _does_not_fit(choice: MeshChoice, workload: Workload, alike: Sequence[jax.Device]) -> DoesNotFit:
    assert choice.chosen.peak is not None
    assert choice.usable is not None
    smaller = "a smaller model, fewer rows, more devices" + (", a 16-bit dtype" if workload.itemsize > 2 else "")
    return DoesNotFit(
        f"{_text(workload)} would take {size_text(choice.chosen.peak)} of each device ({_axes(choice.chosen.sizes)}); "
        f"{size_text(choice.usable)} are free on each of {len(alike)} x {alike[0].device_kind}",
        hint=f"choose {smaller}; XLA_CLIENT_MEM_FRACTION=0.9 lets jax use more; a mesh of your own, such as "
        "tensor=2, is taken as it is",
    )


def _left_out(others: Sequence[jax.Device]) -> str:
    kinds = ", ".join(dict.fromkeys(device.device_kind for device in others))
    return f"; other devices are left out: {kinds}" if others else ""


def _text(workload: Workload) -> str:
    rows = "1 row" if workload.batch == 1 else f"{workload.batch} rows"
    cache = f", the cache in {workload.kv_dtype}" if workload.kv_dtype else ""
    return f"{rows} of {workload.context} tokens in {workload.dtype}{cache}"


def _axes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "one device"
