"""Speed of generation, and how close it is to the device's limits.

Times are for static batches with random token ids (`static`), after one warm-up run per shape; medians over the
repeats. Ceilings are measured in the same process: sequential reads, and a large matrix product.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax import runtime
from llama_jax.cache import check_kv_dtype
from llama_jax.config import preset
from llama_jax.kernels.precision import matmul_precision
from llama_jax.layout import check, param_sharding, split_config
from llama_jax.measure.profiling import ProgramTime, profile
from llama_jax.measure.static import time_static
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import quantize_params
from llama_jax.params import ParamSpec, init_leaf, param_specs, unflatten
from llama_jax.plan import MeshRequest, resolve_mesh
from llama_jax.plan.costs import prefill_flops, step_bytes
from llama_jax.plan.step_costs import Peak
from llama_jax.recipe import check_activations, requested, schemes
from llama_jax.sharding import DeviceMesh
from llama_jax.targets import current


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings: bytes/s of reads, FLOP/s of a square matrix product in the model's dtype."""

    read_bytes_per_s: float
    matmul_flops_per_s: float

    @property
    def peak(self) -> Peak:
        """The ceilings as the peak for an engine's rates."""
        return Peak(self.read_bytes_per_s, self.matmul_flops_per_s)

    def __str__(self) -> str:
        return (
            f"{self.read_bytes_per_s / 1e9:.1f} GB/s read, {self.matmul_flops_per_s / 1e12:.2f} TFLOP/s matrix product"
        )


@dataclass(frozen=True)
class BenchResult:
    """Medians of one shape.

    Attributes:
      prefill_s: seconds from the call to the first token of every row.
      step_s: seconds of one decode step of the whole batch.
      mbu: bytes that each device must read in a step (weights, and the cache at its mean length) per second, over the
        read ceiling of one device.
      mfu: FLOPs of prefill per second and device, over the matrix product's.
      void: which of `mbu` and `mfu` came out above 1 and is None: its ceiling was measured too low, because of noise or
        other processes, so the share is meaningless.
      spread: (slowest - fastest) / median of the decode times.
    """

    batch: int
    prompt: int
    new: int
    prefill_s: float
    prefill_tps: float
    step_s: float
    decode_tps: float
    mbu: float | None
    mfu: float | None
    spread: float
    void: tuple[str, ...] = ()


def environment(dtype: DTypeLike, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Environment that a number depends on besides the code."""
    from importlib.metadata import version

    import llama_jax

    return {
        "device": runtime.device_name(mesh=mesh),
        "dtype": jnp.dtype(dtype).name,
        "llama_jax": llama_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
    }


def random_model(
    name: str,
    dtype: DTypeLike,
    mesh: MeshRequest = None,
    *,
    weights: str | None = None,
    kv_dtype: str | None = None,
    activations: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Model:
    """A preset's shape with random weights made on the device or devices, fused as by `load`; `mesh`, `weights`,
    `kv_dtype`, `activations` and `notify` are those of `load`."""
    check_kv_dtype(kv_dtype, current())
    wanted, config = requested(weights), preset(name)
    held = config if wanted is None else config.replace(schemes=schemes(config, wanted))
    check_activations(held, activations)
    mesh = resolve_mesh(mesh, held, dtype, notify, kv_dtype=kv_dtype)
    if mesh is not None:
        check(held, mesh)
    config = split_config(config, mesh)
    key = jax.random.key(0)
    # Leaves of one shape and placement share one program.
    makers: dict[Any, Any] = {}

    def make(spec: ParamSpec, index: int) -> jax.Array:
        where = None if mesh is None else param_sharding(config, mesh)(spec)
        alike = dataclasses.replace(spec, name="", hf="", gguf="")
        maker = makers.setdefault(
            (alike, where), jax.jit(lambda key: init_leaf(alike, key, dtype), out_shardings=where)
        )
        return maker(jax.random.fold_in(key, index))

    params = unflatten({spec.name: make(spec, i) for i, spec in enumerate(param_specs(config))})
    if wanted is not None:
        params, config = quantize_params(params, config, wanted, mesh=mesh, donate=True)
    config = config.replace(activations=activations)
    return Model(*arrange(params, config, mesh, donate=True), mesh, name=name, kv_dtype=kv_dtype)


def measure_ceilings(dtype: DTypeLike, *, repeats: int = 10, side: int | None = None) -> Ceilings:
    """Measures reads of 2 GiB on a GPU (256 MiB on a CPU), and a matrix product of 8192 x 8192 (2048 x 2048).

    Args:
      side: overrides the side of the matrices; a read is then 32 * side**2 bytes. At least 32.
    """
    dtype = jnp.dtype(dtype)
    cpu = jax.default_backend() == "cpu"
    if side is not None:
        size = 32 * side**2
    else:
        size, side = (1 << 28, 2048) if cpu else (1 << 31, 8192)
    key = jax.random.key(0)
    shape = (size // dtype.itemsize // 1024, 1024)
    # Several arrays in turn, so that reads never hit a cache.
    arrays = [jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i in range(3)]
    x = jnp.ones((1024,), dtype)

    def read(a: jax.Array) -> jax.Array:
        # Each byte once with almost no arithmetic, written so that either compiler reads at full speed.
        return a @ x if cpu else jnp.sum(a.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)

    seconds = _per_call(jax.jit(read), [(a,) for a in arrays], repeats)
    del arrays
    a = jax.random.normal(key, (side, side), dtype)
    product = jax.jit(partial(jnp.matmul, precision=matmul_precision(dtype)))
    return Ceilings(size / seconds, 2 * side**3 / _per_call(product, [(a, a)], repeats))


def _per_call(f: Callable[..., jax.Array], arguments: list[tuple[jax.Array, ...]], repeats: int) -> float:
    """Seconds of one call among many dispatched at once: the best of three rounds."""
    for args in arguments:
        f(*args).block_until_ready()
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        results = [f(*arguments[i % len(arguments)]) for i in range(repeats)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / repeats)
    return min(rounds)


def bench(
    model: Model,
    ceilings: Ceilings,
    *,
    batch: int,
    prompt: int,
    new: int,
    repeats: int = 5,
    seed: int = 0,
    page_size: int | None = None,
) -> BenchResult:
    """Times prefill and decode of `batch` random prompts; every run draws fresh tokens.

    Args:
      page_size: tokens per page; None for a dense cache.
    """
    rng = np.random.default_rng(seed)
    prefills, decodes = [], []
    for run in range(repeats + 1):
        first, rest = _timed(model, rng, batch, prompt, new, page_size)
        if run:  # the first one compiles
            prefills.append(first)
            decodes.append(rest)
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    step = decode / (new - 1)
    read = step_bytes(model.config, model.dtype.itemsize, batch, prompt + new // 2, model.mesh, model.kv_dtype)
    computed = prefill_flops(model.config, batch, prompt, model.mesh)
    shares = {
        "mbu": read / step / ceilings.read_bytes_per_s,
        "mfu": computed / prefill / ceilings.matmul_flops_per_s,
    }
    sound = {name: sound_share(share) for name, share in shares.items()}
    return BenchResult(
        batch=batch,
        prompt=prompt,
        new=new,
        prefill_s=prefill,
        prefill_tps=batch * prompt / prefill,
        step_s=step,
        decode_tps=batch / step,
        mbu=sound["mbu"],
        mfu=sound["mfu"],
        spread=(max(decodes) - min(decodes)) / decode,
        void=tuple(name for name, share in sound.items() if share is None),
    )


def sound_share(share: float) -> float | None:
    """A share of a ceiling; None if it is above 1, see `BenchResult.void`."""
    return share if share <= 1 else None


def profile_generation(
    model: Model, *, batch: int, prompt: int, new: int, seed: int = 0, page_size: int | None = None
) -> tuple[ProgramTime, ...]:
    """Runs `bench`'s workload once more under the profiler: the kernels of prefill and of decode steps.

    Raises:
      NoDevice: there is no GPU whose kernels the profiler sees.
    """
    rng = np.random.default_rng(seed)
    return profile(lambda: _timed(model, rng, batch, prompt, new, page_size))


def _timed(
    model: Model, rng: np.random.Generator, batch: int, prompt: int, new: int, page_size: int | None
) -> tuple[float, float]:
    """`time_static` of random prompts of one length."""
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    return time_static(model, prompts, [new] * batch, page_size)
