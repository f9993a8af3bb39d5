"""Compilation for AMD GPUs on a machine that need not have one."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import computed_once
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import jax_log
from llama_jax.aot import Compilation, compile_for, device_mesh
from llama_jax.aot.compiler import code_object, topology
from llama_jax.aot.model import ModelCompilation, compile_model
from llama_jax.cli import cli
from llama_jax.config import LlamaConfig, config_from_hf, config_to_hf, preset
from llama_jax.engine.ahead import EngineCompilation, compile_engine
from llama_jax.engine.program_set import Key, program_set
from llama_jax.engine.settings import EngineSettings
from llama_jax.errors import CompilerUnavailable, DoesNotFit, RequestError
from llama_jax.kernels.registry import OPERATIONS
from llama_jax.library.configs import find_config
from llama_jax.params import count_params, param_specs
from llama_jax.plan import Verdict
from llama_jax.plan.costs import prefill_flops, step_flops
from llama_jax.targets import Target, current, find, rocm

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
F32, BF16 = jnp.float32, jnp.bfloat16


def shape(*dims: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


# --- Programs ---------------------------------------------------------------------------------------------------------


def _product_kernel(x: Any, y: Any, out: Any) -> None:
    out[...] = plgpu.dot(x[...], y[...]).astype(out.dtype)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product in one Pallas kernel, whose tiles are known: four work-groups of 64 x 64."""
    return pl.pallas_call(
        _product_kernel,
        out_shape=jax.ShapeDtypeStruct((128, 128), BF16),
        grid=(2, 2),
        in_specs=[pl.BlockSpec((64, 64), lambda i, j: (i, 0)), pl.BlockSpec((64, 64), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((64, 64), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="our_product",
    )(x, y)


@pytest.mark.amd
@pytest.mark.filterwarnings("ignore:.*[Tt]riton:DeprecationWarning")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pallas_kernel(arch: str) -> None:
    seen = []

    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        seen.append(current())
        return _product(x, y)

    compilation = compile_for(arch, f, (shape(128, 64), shape(64, 128)))
    target = find(arch)
    assert seen == [target]
    (kernel,) = compilation.kernels
    assert kernel.name.startswith("our_product")
    assert (kernel.arch, kernel.grid, kernel.wave_size) == (arch, (2, 2, 1), target.wave_size)
    assert (kernel.waves, kernel.launches) == (4, 1)
    assert kernel.block[0] == 4 * target.wave_size
    assert 16 < kernel.vgpr <= 256
    assert (kernel.spills, kernel.scratch_bytes) == (0, 0)
    assert 0 < kernel.lds_bytes <= target.lds_bytes
    assert kernel.occupancy is not None
    assert kernel.occupancy >= 1
    # 64 x 64 x 64 by four waves, with tiles of 16 or 32 a side: at least eight a wave.
    assert kernel.matrix_instructions is not None
    assert kernel.matrix_instructions >= 4
    assert kernel.code_bytes == len(code_object.code(kernel.elf, kernel.name)) > 100
    assert compilation.library_calls == {}
    memory = compilation.memory
    assert (memory.arguments, memory.outputs, memory.aliased) == (2 * 128 * 64 * 2, 128 * 128 * 2, 0)
    assert memory.code >= kernel.code_bytes


@pytest.mark.amd
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_matrix_instructions_as_tinygrad_reads_them(arch: str) -> None:
    """An independent disassembler, instruction by instruction."""
    amd = pytest.importorskip("tinygrad.renderer.amd")
    family = "cdna" if arch.startswith("gfx9") else "rdna3"
    compilation = compile_for(arch, lambda x, y: jnp.sort(x @ y), (shape(64, 512), shape(512, 64)))
    assert len(compilation.kernels) > 1
    total = 0
    for kernel in compilation.kernels:
        code, at, count = code_object.code(kernel.elf, kernel.name), 0, 0
        while at < len(code):
            try:
                instruction = amd.decode_inst(code[at : at + 24], family)
            except ValueError:  # it knows no buffer instructions of RDNA; those are two words
                at += 8
                continue
            count += bool(re.match("v_(mfma|smfmac|wmma)", str(instruction)))
            at += instruction.size()
        assert kernel.matrix_instructions == count
        total += count
    assert total


@pytest.mark.amd
def test_collectives_and_memory_of_a_split_program() -> None:
    mesh = device_mesh("mi300x", {"data": 2, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            hidden = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, "tensor")))
            return jax.lax.with_sharding_constraint(hidden @ w.T, NamedSharding(mesh, P())), None

        return jax.lax.scan(layer, x, length=5)[0]

    compilation = compile_for(
        "mi300x",
        f,
        (shape(64, 256), shape(256, 512)),
        mesh=mesh,
        in_shardings=(P(), P(None, "tensor")),
        donate_argnums=0,
    )
    (collective,) = compilation.collectives
    assert (collective.kind, collective.devices, collective.count) == ("all-reduce", 4, 5)  # one a turn of the loop
    assert collective.bytes in (64 * 256 * 2, 64 * 256 * 4)
    assert not collective.unknown_trips
    x, w = 64 * 256 * 2, 256 * 512 * 2
    assert compilation.memory.arguments == x + w // 4
    assert compilation.memory.aliased == x
    # Two products of a quarter of the width, in one turn: 2 x 2 x 64 x 256 x 128; the rest is small.
    assert compilation.flops == pytest.approx(2 * 2 * 64 * 256 * 128, rel=0.05)
    assert compilation.devices == 8


@pytest.mark.amd
def test_arguments() -> None:
    """Arrays, shapes with shardings of their own, a jitted function, static keywords."""
    mesh = device_mesh("mi300x", {"x": 2})
    split = jax.ShapeDtypeStruct((8, 4), F32, sharding=NamedSharding(mesh, P("x")))

    @jax.jit
    def f(tree: dict[str, jax.Array], scale: jax.Array) -> jax.Array:
        return tree["a"] * scale + tree["b"]

    args = ({"a": split, "b": np.ones((8, 4), np.float32)}, jnp.ones(()))
    compilation = compile_for("mi300x", f, args, mesh=mesh)
    assert compilation.memory.arguments == 8 * 4 * 4 // 2 + 8 * 4 * 4 + 4
    compilation = compile_for("mi300x", f, args, mesh=mesh, in_shardings=(P("x"), P()))
    assert compilation.memory.arguments == 8 * 4 * 4 + 4
    with pytest.raises(RequestError, match="donate_argnums cannot be given"):
        compile_for("mi300x", f, args, mesh=mesh, donate_argnums=0)
    options = {"xla_gpu_enable_triton_gemm": False}
    compilation = compile_for("mi300x", lambda x: x @ x, (shape(64, 64),), compiler_options=options)
    assert compilation.library_calls == {"hipBLASLt matmul": 1}
    assert compilation.flops is None  # nobody counts what libraries do
    compilation = compile_for(
        "mi300x", lambda x, *, n: jnp.tile(x, n), (shape(4),), kwargs={"n": 3}, static_argnames="n"
    )
    assert compilation.memory.outputs == 3 * 4 * 2


@pytest.mark.amd
def test_devices_of_this_process_stay() -> None:
    before = jax.devices()
    compile_for("mi300x", lambda x: x + 1, (shape(4),))
    assert jax.devices() == before
    assert jax.jit(lambda x: x + 1)(1) == 2


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | environ
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.slow
@pytest.mark.amd
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_fresh_process(platforms: str) -> None:
    """The compiler before and after jax's start, and nothing of the plugin in the log."""
    code = """
import llama_jax, jax
from llama_jax.aot import compile_for
shape = jax.ShapeDtypeStruct((4,), "float32")
first = compile_for("gfx1100", lambda x: x + 1, (shape,))
print(jax.jit(lambda x: x + 1)(1), {d.platform for d in jax.devices()} & {"rocm"})
print(first.kernels[0].arch, compile_for("gfx942", lambda x: x + 1, (shape,)).kernels[0].arch)
"""
    done = run(code, JAX_PLATFORMS=platforms)
    assert (done.returncode, done.stdout) == (0, "2 set()\ngfx1100 gfx942\n"), done.stderr
    assert "plugin" not in done.stderr
    assert "Traceback" not in done.stderr


# --- The plugin's message at jax's start ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.amd
@pytest.mark.skipif(Path("/sys/class/kfd/kfd/topology/nodes/1").exists(), reason="this machine may have an AMD GPU")
def test_message_of_the_plugin() -> None:
    loud = run("import jax; jax.devices()")
    assert jax_log._NO_GPU in loud.stderr  # what is silenced is still what jax says
    quiet = run("import llama_jax.config, jax; jax.devices()")
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_other_messages_of_jax_pass(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("jax._src.xla_bridge")
    for error in (ValueError("another"), RuntimeError(jax_log._NO_GPU), ValueError(jax_log._NO_GPU)):
        try:
            raise error
        except Exception:
            logger.exception("when calling %s", type(error).__name__)
    logger.warning("plain")
    assert [r.getMessage() for r in caplog.records] == ["when calling ValueError", "when calling RuntimeError", "plain"]


# --- What cannot be compiled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h100", "cpu"])
def test_targets_without_a_compiler(name: str) -> None:
    with pytest.raises(CompilerUnavailable, match="AMD GPUs only"):
        compile_for(name, lambda x: x, (shape(4),))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes plugins of these generations and versions the installed ones, beside a jaxlib."""

    def install(jaxlib: str, **versions: str) -> None:
        found = [(p, versions[p.extra]) for p in reversed(rocm.PLUGINS) if p.extra in versions]
        monkeypatch.setattr(rocm, "installed", lambda: found)
        monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: {"jaxlib": jaxlib}[name])
        monkeypatch.delenv(topology.GENERATION, raising=False)

    return install


def test_plugin_that_is_missing(plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    plugins("0.11.2")
    with pytest.raises(CompilerUnavailable, match="is not installed") as caught:
        topology.plugin_library()
    assert caught.value.hint == "pip install jax-rocm10-pjrt==0.11.2"
    plugins("0.11.2", rocm10="0.11.2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompilerUnavailable, match=r"without its module jax_plugins\.xla_rocm10") as caught:
        topology.plugin_library()
    assert caught.value.hint == "pip install --force-reinstall --no-deps jax-rocm10-pjrt==0.11.2"


def test_the_newest_plugin_that_goes_with_jaxlib(plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for jaxlib, versions, chosen in (
        ("0.11.2", {"rocm7": "0.11.2", "rocm10": "0.11.2"}, ("rocm10", "0.11.2")),
        ("0.11.2", {"rocm7": "0.11.2", "rocm10": "0.12.0"}, ("rocm7", "0.11.2")),
        ("0.12.0.1", {"rocm10": "0.12.0"}, ("rocm10", "0.12.0")),
        ("0.12.0", {"rocm7": "0.12.0.post1"}, ("rocm7", "0.12.0.post1")),
    ):
        plugins(jaxlib, **versions)
        plugin, version = topology.compiler()
        assert (plugin.extra, version) == chosen
    plugins("0.11.2", rocm7="0.11.2", rocm10="0.11.2")
    monkeypatch.setenv(topology.GENERATION, "7")
    assert topology.compiler()[0].generation == 7
    monkeypatch.setenv(topology.GENERATION, "8")
    with pytest.raises(CompilerUnavailable, match="of ROCm 8, which LLAMA_JAX_ROCM names, is not installed") as caught:
        topology.compiler()
    assert caught.value.hint == "unset LLAMA_JAX_ROCM, or name 7 or 10 and install it"


def test_plugin_of_another_release(plugins: Callable[..., None]) -> None:
    plugins("0.12.0", rocm10="0.11.2")
    with pytest.raises(CompilerUnavailable, match=r"jax-rocm10-pjrt is 0\.11\.2, jaxlib 0\.12\.0") as caught:
        topology.compiler()
    assert caught.value.hint == "pip install jax-rocm10-pjrt==0.12.0"
    plugins("0.12.9", rocm10="0.12.0")  # a release that no plugin is known for
    with pytest.raises(CompilerUnavailable, match="one release") as caught:
        topology.compiler()
    assert caught.value.hint == "pip install jax==0.11.2 jaxlib==0.11.2 jax-rocm10-pjrt==0.11.2"


@pytest.mark.amd
def test_plugin_that_is_installed() -> None:
    assert topology.plugin_library().is_file()


@pytest.mark.amd
def test_target_that_xla_refuses() -> None:
    with pytest.raises(CompilerUnavailable, match="at least one") as caught:
        topology.devices(find("mi300x"), 0)
    assert caught.value.hint


def test_real_backend_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with an AMD GPU jax has registered the plugin itself; a second copy must not be loaded."""
    from jax._src import xla_bridge

    def registered(name: str, **options: str) -> None:
        raise AssertionError("not called here")

    monkeypatch.setattr(topology, "plugin_library", lambda: Path("/nowhere"))
    monkeypatch.setitem(xla_bridge._topology_factories, "rocm", registered)
    assert topology._topology_maker.__wrapped__() is registered


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> LlamaConfig:
    return config_from_hf(
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 1024,
            "max_position_embeddings": 256,
            "dtype": "bfloat16",
        }
    )


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Messages from while `on_one` was made."""
    return []


@pytest.fixture(scope="module")
def on_one(tiny: LlamaConfig, said: list[str]) -> ModelCompilation:
    return compile_model(tiny, find("mi300x"), batch=2, context=128, prompt=32, progress=said.append)


@pytest.fixture(scope="module")
def on_eight(tiny: LlamaConfig) -> ModelCompilation:
    return compile_model(tiny, find("mi355x"), {"data": 2, "tensor": 4}, context=128, prompt=16, dtype="float16")


@pytest.mark.slow
@pytest.mark.amd
def test_model_on_one_device(tiny: LlamaConfig, on_one: ModelCompilation, said: list[str]) -> None:
    result = on_one
    assert said == [
        "compiling prefill of 2 x 32 tokens for 1 x mi300x",
        "compiling a decode step of 2 rows for 1 x mi300x",
    ]
    assert (result.fits, result.prefill.capacity, result.decode.capacity, result.chunk) == (True, 128, 128, 32)
    weights = 2 * count_params(tiny)
    keys_and_values = 2 * 2 * 2 * 128 * tiny.kv_dim * 2
    # Positions, and how many slots are in use.
    cache = keys_and_values + (2 * 128 + 1) * 4
    tokens = 2 * 32 * 4
    # Tokens and positions; next tokens are not used without log-probabilities, lengths without dynamic rope.
    assert result.prefill.compilation.memory.arguments == weights + 2 * tokens
    assert weights + cache < result.decode.compilation.memory.arguments < weights + cache + 10_000
    assert cache <= result.decode.compilation.memory.aliased
    embedding = 2 * tiny.vocab_size * tiny.hidden_size
    assert result.decode.floor.read_bytes == weights - embedding + keys_and_values
    assert result.prefill.floor.read_bytes == weights - embedding
    # XLA counts none of a kernel's operations, and a decode step's products are in kernels: those of the floor follow
    # from shapes.
    work = prefill_flops(tiny, 2, 32), step_flops(tiny, 2, 128)
    assert (result.prefill.floor.flops, result.decode.floor.flops) == work
    assert (result.decode.compilation.flops or 0) < work[1]
    assert result.decode.compilation.collectives == ()
    target = result.target
    assert result.decode.floor.seconds == max(result.decode.floor.compute_s or 0, result.decode.floor.memory_s or 0)
    assert result.decode.floor.memory_s == result.decode.floor.read_bytes / target.bandwidth
    assert result.prefill.floor.compute_s == work[0] / target.rates.bf16


@pytest.mark.slow
@pytest.mark.amd
def test_model_on_several_devices(tiny: LlamaConfig, on_eight: ModelCompilation) -> None:
    result = on_eight
    assert (result.plan.sizes, result.plan.workload.dtype) == ({"data": 2, "tensor": 4}, "float16")
    # Every matrix is split in four, the norms are not.
    norms = sum(s.size for s in param_specs(tiny) if len(s.shape) == 1)
    share = (count_params(tiny) - norms) // 4 + norms
    assert result.prefill.compilation.memory.arguments == 2 * share + 2 * 16 * 4
    for phase in (result.prefill, result.decode):
        reduces = [c for c in phase.compilation.collectives if c.kind == "all-reduce" and c.devices == 4]
        assert sum(c.count for c in reduces) >= 4  # two in each layer
        floor = phase.floor
        assert floor.links_s is not None
        assert floor.seconds == max(floor.compute_s or 0, floor.memory_s or 0) + floor.links_s > 0


@pytest.mark.parametrize(
    ("options", "param"), [({"context": 512}, "context"), ({"prompt": 65, "context": 64}, "prompt")]
)
def test_requests_that_make_no_sense(tiny: LlamaConfig, options: dict[str, int], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        compile_model(tiny, find("mi300x"), **options)
    assert caught.value.param == param


@pytest.mark.amd
def test_weights_that_do_not_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"141\.1 GB on each of 1 devices, and rx7900xtx has 25\.8 GB"):
        compile_model(preset("llama-3.1-70b"), find("rx7900xtx"))
    with pytest.raises(DoesNotFit, match="on each of 4 devices"):
        compile_model(preset("llama-3.1-70b"), find("rx7900xtx"), {"tensor": 4})


# --- The engine -------------------------------------------------------------------------------------------------------

HEADS = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
"""The shapes of an 8B model's layers, with a small vocabulary."""


def engine_settings(**changes: Any) -> EngineSettings:
    """An engine with one size of each program."""
    fields: dict[str, Any] = {
        "rows": 32,
        "context": 1024,
        "pages": 512,
        "decode_rows": (32,),
        "mixed_tokens": (256,),
        "chunk_rows": 8,
    }
    return EngineSettings(**fields | changes)


def assert_within_budgets(result: EngineCompilation) -> None:
    """This project's kernels do not spill, and take no more than there is; attention multiplies by matrix
    instructions."""
    for program, compilation in result.compilations.items():
        for kernel in compilation.kernels:
            if kernel.name.startswith(tuple(OPERATIONS)):
                assert (kernel.spills, kernel.scratch_bytes) == (0, 0), (program, kernel.name)
                assert kernel.lds_bytes <= result.target.lds_bytes, (program, kernel.name)
                assert kernel.waves * result.target.wave_size <= 1024, (program, kernel.name)
                assert kernel.occupancy, (program, kernel.name)
            if kernel.name.startswith(("decode_attention_shares", "flash_attention_forward")):
                assert kernel.matrix_instructions, (program, kernel.name)


def kernels_of(compilation: Compilation) -> set[str]:
    """The operations of this project that have kernels in a program."""
    return {name for name in OPERATIONS for kernel in compilation.kernels if kernel.name.startswith(name)}


@pytest.mark.amd
def test_the_state_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that make and change rows, over two devices: the whole state lies on them as it is compiled for."""
    monkeypatch.setattr("llama_jax.engine.ahead.program_set", lambda settings, on_cpu: [Key("mark"), Key("scrub")])
    config = config_from_hf(HEADS | {"num_hidden_layers": 1})
    said: list[str] = []
    settings = engine_settings()
    result = compile_engine(config, find("mi300x"), {"tensor": 2}, settings=settings, progress=said.append)
    assert sorted(line.partition(",")[0] for line in said) == ["mark", "scrub", "start"]
    assert result.devices == 2
    pages = 2 * settings.pages * 4 * 64 * 128 * 2  # keys and values of four of the eight heads
    # What the rows have besides is little: a page table, and numbers over half of the small vocabulary.
    assert pages < result.start.memory.outputs < 1.02 * pages
    rows = result.start.memory.outputs - pages
    mark, scrub = (result.programs[Key(name)].memory for name in ("mark", "scrub"))
    assert 0 < mark.aliased < rows  # keys and values stay out, and nothing is copied
    assert mark.temporary < 100_000
    assert scrub.aliased == pytest.approx(pages + rows, rel=1e-3)
    assert all(compilation.collectives == () for compilation in result.programs.values())
    weights = 2 * count_params(config)
    assert result.verdict.phases["mark"] == pytest.approx(weights // 2 + pages, rel=0.05)
    assert result.fits


@pytest.mark.amd
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_program_of_an_engine() -> None:
    # Two layers: the last one attends for the tokens that are drawn alone.
    config, settings = config_from_hf(HEADS | {"num_hidden_layers": 2}), engine_settings()
    result = compile_engine(config, find("mi300x"), settings=settings)
    assert list(result.programs) == program_set(settings, on_cpu=False)
    assert_within_budgets(result)
    state, pages = result.start.memory.outputs, 2 * 2 * settings.pages * 8 * 64 * 128 * 2
    wide = settings.rows * (4 * -(-config.vocab_size // 32) + 5 * config.vocab_size)
    for key, compilation in result.programs.items():
        # The state is changed where it lies: all of it, or with or without the arrays over the vocabulary.
        if key.name == "mark":
            assert 0 < compilation.memory.aliased < state - pages
        else:
            expected = state - wide if key.greedy else state
            assert compilation.memory.aliased == pytest.approx(expected, rel=1e-3), key
        assert result.verdict.phases[key.name] >= compilation.memory.total
        if key.size:
            expected = {"decode_attention", "add_rms_norm", "rope_and_store"} | (
                {"flash_attention"} if key.name != "decode" else set()
            )
            assert kernels_of(compilation) == expected, key
    # The greedy ones are there because they do less.
    for key in (Key("decode", 32), Key("mixed", 256)):
        greedy = result.programs[Key(key.name, key.size, greedy=True)]
        assert len(greedy.kernels) < len(result.programs[key].kernels)


@pytest.mark.amd
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "mesh", "layers", "key", "gigabytes"),
    [
        ("llama-3.1-8b", {}, 32, "mixed", 16.1),
        ("llama-3.1-70b", {"tensor": 8}, 4, "decode", 1.38),
        ("llama-3.1-70b", {"tensor": 8}, 2, "mixed", 0.95),
    ],
)
def test_engines_of_published_models(name: str, mesh: dict[str, int], layers: int, key: str, gigabytes: float) -> None:
    config = preset(name)
    config = config.replace(layers=config.layers[:layers])
    settings = engine_settings(rows=64, context=8192, pages=8192, decode_rows=(64,), mixed_tokens=(512,))
    # Of each kind the one that most requests run; `test_every_program_of_an_engine` has the others, of fewer layers.
    keys = [Key(key, 512 if key == "mixed" else 64, greedy=True)]
    result = compile_engine(config, find("mi300x"), mesh, settings=settings, keys=keys)
    assert list(result.programs) == keys
    assert result.fits
    assert result.weights == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert_within_budgets(result)
    for compilation in result.programs.values():
        reduces = sum(c.count for c in compilation.collectives if c.kind == "all-reduce")
        if mesh:
            assert reduces >= 2 * config.num_layers
        else:
            assert not compilation.collectives


@pytest.mark.amd
@pytest.mark.slow
def test_an_engine_with_a_draft_model() -> None:
    """Its programs change its cache where it lies, and the plan counts them beside the model's weights and state."""
    small, large = (config_from_hf(HEADS | {"num_hidden_layers": n}) for n in (1, 2))
    settings = engine_settings(drafts=3, draft_rows=4, draft_context=512)
    keys = [key for key in program_set(settings, on_cpu=False) if key.name in ("draft", "follow")]
    assert [str(key) for key in keys] == ["draft of 4 rows", "follow of 256 tokens"]
    result = compile_engine(large, find("mi300x"), settings=settings, draft=small, keys=keys)
    assert list(result.compilations) == ["start", "draft start", *map(str, keys)]
    cache, weights = 2 * 4 * 512 * 8 * 128 * 2, 2 * count_params(small)
    assert result.draft_start is not None
    assert result.draft_start.memory.outputs == pytest.approx(cache, rel=0.02)
    assert result.draft_weights == weights
    draft, follow = (result.programs[key].memory for key in keys)
    assert draft.aliased == follow.aliased == pytest.approx(cache, rel=0.02)
    assert draft.arguments == pytest.approx(weights + cache, rel=0.02)
    assert follow.arguments < draft.arguments / 4  # of its last layer, here the only one, it needs keys and values
    everything = result.weights + result.start.memory.outputs + weights + cache
    for name in ("start", "draft"):
        assert 0.99 * everything < result.verdict.phases[name] < 1.1 * everything


@pytest.mark.amd
@pytest.mark.slow
def test_a_step_with_drafts_asks_the_host_nothing() -> None:
    """Where a device cannot end a loop by itself, each loop has a count that is known before; texts are changed where
    they lie."""
    config = config_from_hf(HEADS | {"num_hidden_layers": 1})
    settings = engine_settings(drafts=3, draft_rows=4, steps=1)
    keys = [key for key in program_set(settings, on_cpu=False) if key.name in ("verify", "remember")]
    assert [str(key) for key in keys] == ["remember", "verify of 4 rows", "verify of 4 rows, greedy"]
    result = compile_engine(config, find("mi300x"), settings=settings, keys=keys)
    assert result.programs[keys[0]].memory.aliased == 4 * settings.rows * settings.context
    for key in keys[1:]:
        text = result.programs[key].compiled.as_text()
        loops = [line for line in text.splitlines() if " while(" in line]
        assert loops
        assert all("known_trip_count" in line for line in loops)


@pytest.mark.amd
def test_engines_that_are_refused() -> None:
    config, target = config_from_hf(HEADS | {"num_hidden_layers": 1}), find("mi300x")
    with pytest.raises(RequestError, match="one replica") as caught:
        compile_engine(config, target, {"data": 2})
    assert caught.value.param == "mesh"
    with pytest.raises(RequestError, match="context of 9000"):
        compile_engine(config, target, context=9000)
    with pytest.raises(DoesNotFit, match=r"weights alone take 141\.1 GB on each of 1 devices") as no_room:
        compile_engine(preset("llama-3.1-70b"), target, memory_fraction=0.5)
    assert "--tp 8" in no_room.value.hint
    with pytest.raises(DoesNotFit, match="a sequence of 131072 tokens takes 2048 pages"):
        compile_engine(preset("llama-3.1-8b"), find("rx7900xtx"), memory_fraction=0.8)
    with pytest.raises(RequestError, match="without arguments"):
        compile_for("mi300x", lambda: jnp.ones(()), ())


@pytest.mark.amd
def test_engines_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with an engine of which only the first program is compiled, once."""
    monkeypatch.setattr("llama_jax.engine.ahead.program_set", lambda settings, on_cpu: [Key("mark")])
    monkeypatch.setattr("llama_jax.engine.ahead.compile_engine", computed_once(compile_engine))
    asked = ["compile", str(folder), "--target", "mi300x", "--engine", "--batch", "16", "--context", "128"]
    done = CliRunner().invoke(cli, [*asked, "--memory-fraction", "0.5"])
    assert done.exit_code == 0, done.output
    assert "1 x AMD Instinct MI300X (gfx942), one device; not run" in done.stdout
    assert "bfloat16, 16 rows, context 128, 32 pages of 64 tokens" in done.stdout
    assert "jax may use" in done.stdout
    assert "\nfits: " in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if re.match("  (start|mark) ", line)] == [
        "start",
        "mark",
    ]
    assert re.search(r"\] mark, \d+\.\d s\n", done.stderr)
    done = CliRunner().invoke(cli, [*asked, "--memory-fraction", "0.5", "--json"])
    report = json.loads(done.stdout)
    assert (report["settings"]["pages"], report["fits"], set(report["programs"])) == (32, True, {"start", "mark"})
    mark = report["programs"]["mark"]
    assert mark["kernels"][0]["spills"] == 0
    pages = 2 * 2 * 32 * 4 * 64 * 32 * 2
    assert report["peak_bytes"] >= report["weights_bytes"] + pages + mark["memory"]["arguments"]
    done = CliRunner().invoke(cli, [*asked, "--prompt", "5"])
    assert (done.exit_code, "leave out --prompt" in done.stderr) == (2, True)
    monkeypatch.setattr(EngineCompilation, "verdict", Verdict({"loading": 5, "mark": 90}, 0.75, 80))
    done = CliRunner().invoke(cli, [*asked, "--memory-fraction", "0.5", "-q"])
    assert (done.exit_code, done.stderr) == (6, "")
    assert "DOES NOT FIT: 90 B of the 80 B that jax may use" in done.stdout


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: LlamaConfig, tmp_path: Path) -> Path:
    """A folder with nothing but a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny)))
    return tmp_path


def test_find_config(tiny: LlamaConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config(str(folder)) == tiny
    assert find_config("Llama-3.1-8B") == preset("llama-3.1-8b")
    monkeypatch.chdir(folder.parent)
    folder.rename("llama-3.1-8b")
    assert find_config("llama-3.1-8b") == tiny  # what lies here comes first


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Records the command's compilations, and answers with programs that exist already."""
    calls: list[Any] = []

    def compiled(config: LlamaConfig, target: Target, mesh_shape: dict[str, int], **options: Any) -> ModelCompilation:
        options.pop("progress")("compiling something")
        calls.append((config, target.name, mesh_shape, options))
        made: ModelCompilation = request.getfixturevalue("on_eight" if mesh_shape else "on_one")
        return made

    monkeypatch.setattr("llama_jax.aot.model.compile_model", compiled)
    return calls


@pytest.mark.slow
@pytest.mark.amd
def test_command(tiny: LlamaConfig, folder: Path, asked: list[Any]) -> None:
    result = CliRunner().invoke(cli, ["compile", str(folder), "--target", "MI300X", "--context", "64"])
    assert result.exit_code == 0, result.output
    options = {
        "batch": 1,
        "context": 64,
        "prompt": None,
        "dtype": "bfloat16",
        "kv_dtype": None,
        "memory_fraction": 0.75,
    }
    assert asked == [(tiny, "mi300x", {}, options)]
    assert "1 x AMD Instinct MI300X (gfx942), one device; not run" in result.stdout
    assert "fits: " in result.stdout
    assert result.stdout.count("predicted    at least") == 2
    assert re.fullmatch(r"\[ +0\.\d s\] compiling something\n", result.stderr)


@pytest.mark.amd
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["--tp", "8"], ["--mesh", "data=2,tensor=4"]])
def test_command_as_json(folder: Path, asked: list[Any], mesh: list[str]) -> None:
    result = CliRunner().invoke(cli, ["compile", str(folder), "--target", "mi355x", "--json", *mesh])
    assert (result.exit_code, result.stderr) == (0, "")
    assert asked[0][2] == ({"tensor": 8} if "--tp" in mesh else {"data": 2, "tensor": 4})
    report = json.loads(result.stdout)
    assert (report["target"], report["devices"], report["mesh"]) == ("mi355x", 8, {"data": 2, "tensor": 4})
    assert report["fits"] is True
    for phase in report["phases"].values():
        assert phase["memory"]["total"] > 0
        assert phase["predicted"]["floor_s"] > 0
        assert phase["kernels"][0]["vgpr"] > 0
        assert "all-reduce" in {collective["kind"] for collective in phase["collectives"]}
    text = CliRunner().invoke(cli, ["compile", str(folder), "--target", "mi355x", "-q", *mesh])
    assert "data=2 tensor=4" in text.stdout
    assert "x all-reduce of " in text.stdout
    assert text.stderr == ""


@pytest.mark.slow
@pytest.mark.amd
def test_command_says_what_does_not_fit(folder: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict({"loading": 5, "prefill": 90, "growing": 0, "decode": 9}, 0.75, 80)
    monkeypatch.setattr(ModelCompilation, "verdict", verdict)
    result = CliRunner().invoke(cli, ["compile", str(folder), "--target", "gfx1100", "-q"])
    assert (result.exit_code, result.stderr) == (6, "")
    assert "peak         90 B in prefill (loading 5 B, prefill 90 B, decode 9 B)" in result.stdout
    assert "DOES NOT FIT: 90 B of the 80 B that jax may use" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--target", "mi300x", "--tp", "2", "--mesh", "tensor=2"], 2, "both given"),
        (["--target", "mi300x", "--mesh", "tensor"], 2, "tensor"),
        (["--target", "mi300x", "--mesh", "a=1,a=2"], 2, "a"),
        (["--target", "mi300x", "--mesh", "a=0"], 2, "a"),
        (["--target", "mi9000"], 2, "unknown target"),
        (["--target", "h100"], 5, "AMD GPUs only"),
        (["--target", "mi300x", "--context", "100000000"], 2, "longer than the model's"),
    ],
)
def test_command_that_fails(folder: Path, args: list[str], code: int, said: str) -> None:
    done = CliRunner().invoke(cli, ["compile", str(folder), *args])
    assert done.exit_code == code
    assert said in done.stderr


def test_command_without_a_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for the first GPU of this machine."""

    def compiled(config: LlamaConfig, target: Target, *_: Any, **options: Any) -> ModelCompilation:
        raise DoesNotFit(f"not on {target.name}", hint="a test")

    monkeypatch.setattr("llama_jax.aot.model.compile_model", compiled)
    monkeypatch.setattr("llama_jax.targets.detected", lambda: ())
    done = CliRunner().invoke(cli, ["compile", str(folder)])
    assert done.exit_code == 2
    assert "hint: add --target" in done.stderr
    monkeypatch.setattr("llama_jax.targets.detected", lambda: (find("w7900"), find("mi300x")))
    done = CliRunner().invoke(cli, ["compile", str(folder)])
    assert (done.exit_code, "not on w7900" in done.stderr) == (6, True)


def test_command_without_a_model() -> None:
    for name, said in (("xyzzy", "presets: "), ("llama-3.1-8", "did you mean llama-3.1-8b, ")):
        done = CliRunner().invoke(cli, ["compile", name, "--target", "mi300x"])
        assert done.exit_code == 3
        assert said in done.stderr
