"""Which backend runs: named ones work or raise, tables and what overrules them, plugins, and the record of it all."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from helpers import simulated

from llama_jax import plugins
from llama_jax.cli import cli
from llama_jax.errors import KernelError, RequestError
from llama_jax.kernels import choices, dispatch
from llama_jax.kernels.dispatch import operation as operations
from llama_jax.kernels.dispatch import tables, user_table
from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.extra import extra
from llama_jax.kernels.dispatch.fingerprint import code_only, source_hash, sources, versions
from llama_jax.kernels.dispatch.operation import Operation, choose, disable, using
from llama_jax.kernels.dispatch.record import Choice, Recorder
from llama_jax.kernels.dispatch.tables import Rule, parse
from llama_jax.kernels.registry import OPERATIONS, operation, parse_backends
from llama_jax.targets import TARGETS, find


@dataclasses.dataclass(frozen=True)
class Tiles:
    factor: int
    unused: int = 0


def tiled(x: jax.Array, *, tiles: Tiles | None = None) -> jax.Array:
    return x * (tiles.factor if tiles else 5)


# Each backend gives another number, so that a test sees which one ran. The name is that of a real operation, as tables
# and the environment know no other.
OP = Operation(
    "moe",
    {
        "reference": Backend(lambda x: x * 2),
        "fast": Backend(lambda x: x * 3),
        "even": Backend(lambda x: x * 4, lambda target, x: "odd length" if x.shape[0] % 2 else None),
        "tiled": Backend(tiled, tiles=Tiles),
        "amd": Backend(lambda x: x * 6, lambda target, x: None if target.vendor == "amd" else "not an AMD GPU"),
    },
    shape=lambda x: f"n{x.shape[0]}",
)
ONES = jnp.ones(2)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No user's table, no variable, no disabled kernel, an empty record."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_JAX_KERNELS", raising=False)
    monkeypatch.setattr(operations, "recorder", Recorder())
    operations._named_for_the_process.cache_clear()
    yield
    operations._named_for_the_process.cache_clear()
    operations._disabled.set_global(())


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> list[Rule]:
    """The shipped rules of OP, for a test to fill."""
    made: list[Rule] = []
    monkeypatch.setattr(operations, "shipped_rules", lambda name, target: tuple(made))
    return made


def ran() -> list[Choice]:
    return list(operations.recorder.counts())


def test_named_backends() -> None:
    assert OP(ONES, backend="reference")[0] == 2
    assert OP(ONES, backend="fast")[0] == 3
    assert OP(ONES, backend="even")[0] == 4
    for name in ("", "Reference", "none"):
        with pytest.raises(KernelError, match="has no backend") as caught:
            OP(ONES, backend=name)
        assert "reference" in caught.value.hint
    with pytest.raises(KernelError, match="odd length"):
        OP(jnp.ones(3), backend="even")
    assert [c.backend for c in ran()] == ["reference", "fast", "even"]  # what raised is not counted
    assert {c.reason for c in ran()} == {"named by the caller"}


def test_using_is_part_of_the_cache_key() -> None:
    run = jax.jit(lambda x: OP(x))
    assert run(ONES)[0] == 2
    with using(moe="fast"):
        assert run(ONES)[0] == 3
        with using(moe="even", other="fast"):
            assert run(ONES)[0] == 4
            with using(moe="auto"):
                assert run(ONES)[0] == 2
        assert run(ONES)[0] == 3
    assert run(ONES)[0] == 2
    with using(moe="even"), pytest.raises(KernelError, match=r"named by using.*odd length"):
        run(jnp.ones(3))


def test_the_variable_names_backends_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_KERNELS", " moe = fast , flash_attention=reference,")
    assert OP(ONES)[0] == 3
    assert ran()[0].reason == "named by LLAMA_JAX_KERNELS"
    with using(moe="even"):  # code goes before the environment
        assert OP(ONES)[0] == 4
    assert OP(ONES, backend="reference")[0] == 2
    # Read once: the programs of a process do not differ by when they were traced.
    monkeypatch.setenv("LLAMA_JAX_KERNELS", "moe=fastest")
    assert OP(ONES)[0] == 3
    operations._named_for_the_process.cache_clear()
    with pytest.raises(KernelError, match=r"no backend 'fastest' \(named by LLAMA_JAX_KERNELS\)"):
        OP(ONES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("moe", "not of the form"),
        ("moe=", "not of the form"),
        ("=fast", "no operation ''"),
        ("experts=fast", "no operation 'experts'"),
        ("moe=fast;flash_attention=fast", "no backend"),  # one item with an odd name
        ("moe=fast,moe=fast", "named twice"),
    ],
)
def test_the_variable_is_read_strictly(monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.setenv("LLAMA_JAX_KERNELS", text)
    with pytest.raises((RequestError, KernelError), match=problem) as caught:
        OP(ONES)
    assert caught.value.hint


def test_parse_backends() -> None:
    assert parse_backends("") == parse_backends(" , ") == {}
    assert parse_backends("moe=a,flash_attention=b") == {"moe": "a", "flash_attention": "b"}


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_can_run(rules: list[Rule]) -> None:
    rules += [
        Rule("elsewhere", "s0"),
        Rule("amd", "s1"),
        Rule("even", "s2", shape="n3"),
        Rule("even", "s3", shape="n[23]", dtype="float32", measured=True),
        Rule("fast", "s4"),
    ]
    assert OP(ONES)[0] == 4
    (choice,) = ran()
    assert (choice.backend, choice.reason, choice.measured, choice.shape) == ("even", "s3", True, "n2")
    assert choice.passed_over == (("elsewhere", "there is no such backend here"), ("amd", "not an AMD GPU"))
    assert OP(jnp.ones(3))[0] == 3  # s2 and s3 apply and cannot run
    assert OP(jnp.ones(2, jnp.bfloat16))[0] == 3  # s3 does not apply
    assert choose(OP, find("mi300x"), "auto", ONES).backend == "amd"


def test_without_a_rule_the_reference_runs_and_it_is_seen(rules: list[Rule]) -> None:
    rules += [Rule("amd", "s")]
    assert OP(ONES)[0] == 2
    assert ran()[0].passed_over == (("amd", "not an AMD GPU"),)
    assert ran()[0].reason == "no rule for this"


def test_tiles_of_a_rule(rules: list[Rule]) -> None:
    assert OP(ONES, backend="tiled")[0] == 5
    rules += [Rule("tiled", "s", tiles=(("factor", 7),))]
    assert OP(ONES)[0] == 7
    assert ran()[-1].tiles == (("factor", 7),)
    rules[0] = Rule("tiled", "s", tiles=(("size", 7),))
    rules += [Rule("fast", "s", tiles=(("factor", 7),))]
    assert OP(ONES)[0] == 2
    names, reasons = zip(*ran()[-1].passed_over, strict=True)
    assert names == ("tiled", "fast")
    assert "not its own" in reasons[0]
    assert "takes no tiles" in reasons[1]


def test_disabled_kernels(rules: list[Rule]) -> None:
    rules += [Rule("fast", "s")]
    run = jax.jit(lambda x: OP(x))
    assert run(ONES)[0] == 3
    disable("moe", "fast", "it was wrong")
    assert run(ONES)[0] == 2  # traced anew, though the shape is the same
    assert ran()[-1].passed_over == (("fast", "disabled: it was wrong"),)
    with pytest.raises(KernelError, match="is disabled: it was wrong"):
        OP(ONES, backend="fast")
    assert OP(ONES, backend="even")[0] == 4


SPLIT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch import operation as operations
from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.operation import Operation
from llama_jax.kernels.dispatch.tables import Rule

op = Operation("moe", {"reference": Backend(lambda x: x * 2), "fast": Backend(lambda x: x * 3)})
operations.shipped_rules = lambda name, target: (Rule("fast", "s"),)
assert jax.device_count() == 2
for devices, expected in ((1, 3), (2, 2)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    x = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P("tensor")))
    inner = jax.jit(lambda x: op(x + 1) / 2)
    assert jax.jit(lambda x: inner(x * 1))(x)[0, 0] == expected, devices
assert "split over tensor" in list(operations.recorder.counts())[-1].passed_over[0][1]
try:
    jax.jit(lambda x: op(x, backend="fast"))(x)
except KernelError as error:
    assert "split over tensor" in error.message
else:
    raise AssertionError("a named kernel ran on split arrays")
# Inside of shard_map each device has its own arrays.
local = jax.shard_map(op, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"))
assert jax.jit(local)(x)[0, 0] == 3
"""


def test_kernels_do_not_run_on_arrays_that_xla_splits(tmp_path: Path) -> None:
    env = simulated(2, LLAMA_JAX_CACHE=str(tmp_path))
    subprocess.run([sys.executable, "-c", SPLIT], env=env, check=True)


def test_shipped_tables() -> None:
    """Each is well formed, of a known architecture or vendor, and names backends that exist, with their tiles."""
    files = {p.stem: p for p in (Path(tables.__file__).parents[1] / "table").glob("*.json")}
    assert set(files) <= {t.arch for t in TARGETS} | {t.vendor for t in TARGETS}
    assert {"cpu", "amd", "nvidia", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201"} <= set(files)
    for name, path in files.items():
        assert json.loads(path.read_text())["arch"] == name
        table = tables.shipped(name)
        assert set(table) <= set(OPERATIONS)
        for op, lines in table.items():
            for rule in lines:
                backend = operation(op).backends[rule.backend]
                assert not backend.interpreted
                if rule.tiles:
                    assert backend.tiles is not None
                    backend.tiles(**dict(rule.tiles))


def test_an_architecture_without_a_table_takes_its_vendors() -> None:
    other = dataclasses.replace(find("mi300x"), name="other", arch="gfx999")
    for op in OPERATIONS:
        assert tables.shipped_rules(op, other) == tables.shipped("amd").get(op, ())
        assert tables.shipped_rules(op, find("cpu")) == tables.shipped("cpu").get(op, ())


GOOD = {"backend": "fast", "source": "s", "measured": False}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "no object 'rules'"),
        ({"rules": []}, "no object 'rules'"),
        ({"rules": {"experts": []}}, "no operation 'experts'"),
        ({"rules": {"moe": {}}}, "not a list"),
        ({"rules": {"moe": [{"backend": "fast", "source": "s"}]}}, "rule 0: a rule has"),
        ({"rules": {"moe": [GOOD, {**GOOD, "tile": {}}]}}, "rule 1: a rule has"),
        ({"rules": {"moe": [{**GOOD, "measured": 1}]}}, "'measured' is 1"),
        ({"rules": {"moe": [{**GOOD, "tiles": {"factor": 2.0}}]}}, "not integers"),
        ({"rules": {"moe": [{**GOOD, "tiles": {"factor": True}}]}}, "not integers"),
    ],
)
def test_a_damaged_table_is_an_error(data: object, problem: str) -> None:
    with pytest.raises(KernelError, match=problem):
        parse(json.dumps(data), "file")
    with pytest.raises(KernelError, match="file"):
        parse("{", "file")


def write_user_table(**changes: object) -> Path:
    path = user_table.path_of(find("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    made_with = {"versions": versions(), "sources": {op: source_hash(op) for op in OPERATIONS}}
    path.write_text(json.dumps({**made_with, "rules": {"moe": [GOOD | {"measured": True}]}} | changes))
    return path


def test_the_users_table_wins(rules: list[Rule]) -> None:
    rules += [Rule("even", "shipped")]
    assert OP(ONES)[0] == 4
    path = write_user_table()
    assert OP(ONES)[0] == 3
    assert ran()[-1].measured
    write_user_table(rules={"moe": [GOOD | {"backend": "amd"}, GOOD | {"shape": "n9"}]})
    assert OP(ONES)[0] == 4
    assert ran()[-1].passed_over == (("amd", "not an AMD GPU"),)
    path.write_text("{")
    with pytest.raises(KernelError, match=r"table of kernels .*cpu\.json") as caught:
        OP(ONES)
    assert "tune" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"sources": {}}, "other kernels"), ({"versions": {"jax": "0.1"}}, "other versions")],
)
def test_a_stale_table_is_passed_over_and_said(rules: list[Rule], changes: dict, reason: str) -> None:
    rules += [Rule("even", "shipped")]
    write_user_table(**changes)
    assert OP(ONES)[0] == 4
    (name, why), *rest = ran()[0].passed_over
    assert (name, rest) == ("tuned table", [])
    assert reason in why


def test_several_processes_take_the_shipped_table(rules: list[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    write_user_table()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert OP(ONES)[0] == 2
    assert "several processes" in ran()[0].passed_over[0][1]


# --- What measurements depend on --------------------------------------------------------------------------------------


def test_sources_of_an_operation() -> None:
    names = {op: {path.as_posix() for path in sources(op)} for op in OPERATIONS}

    def has(op: str, end: str) -> bool:
        return any(name.endswith(end) for name in names[op])

    for op in ("flash_attention", "decode_attention"):
        assert has(op, "kernels/attention/reference.py")
        assert not has(op, "kernels/moe/reference.py")
    assert has("flash_attention", "attention/flash/__init__.py")
    assert not has("flash_attention", "attention/decode/__init__.py")
    assert has("moe", "kernels/precision.py")
    assert not any(has(op, "kernels/dispatch/operation.py") for op in OPERATIONS)
    assert len({source_hash(op) for op in OPERATIONS}) == len(OPERATIONS)


def test_hashes_see_code_only() -> None:
    code = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    same = ["def f(x):\n  # why\n  'other'\n\n  return x + 1  # that\n", "'''Module.'''\n" + code]
    assert {code_only(text) for text in same} == {code_only(code)}
    for text in (code.replace("1", "2"), code.replace("x + 1", "'Doc.'"), code + "f = ''\n"):
        assert code_only(text) != code_only(code)
    assert code_only("if x:\n  y\nz\n") != code_only("if x:\n  y\n  z\n")


# --- What is imported, and when ---------------------------------------------------------------------------------------


LOADED = """
import sys, {}
print(*(name for name in sys.modules if name.startswith({!r})))
"""


def loaded(modules: str, *prefixes: str) -> list[str]:
    """Modules beginning with one of the prefixes that a new process has loaded once it imported some others."""
    code = LOADED.format(modules, prefixes)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_kernels_import_nothing_of_the_model() -> None:
    kernels = "llama_jax.kernels"
    modules = f"{kernels}.attention, {kernels}.moe, {kernels}.norm, {kernels}.tuning.tune, {kernels}.checking.startup"
    assert f"{kernels}.moe" in loaded(modules, kernels)
    assert loaded(modules, "llama_jax.config", "llama_jax.params", "llama_jax.model") == []


def test_pallas_is_loaded_by_what_runs_it() -> None:
    pallas = "jax.experimental.pallas"
    without = "llama_jax.model.transformer, llama_jax.generation.api, llama_jax.kernels.tuning.tune"
    assert loaded(without, pallas) == []
    assert pallas in loaded("llama_jax.kernels.norm.pallas_triton", pallas)


@pytest.mark.slow
def test_a_model_on_a_cpu_runs_without_pallas() -> None:
    code = """if True:
        import dataclasses, sys, jax, llama_jax as lj
        from helpers import TINY
        from llama_jax.kernels import report
        from llama_jax.model.fuse import fuse_params
        config = TINY["sigmoid-moe"]
        model = lj.Model(lj.init_params(config, jax.random.key(0)), config)
        quantised = lj.quantize(model, "int8")
        whole = dataclasses.replace(quantised, config=quantised.config.replace(activations="int8"))
        plain = TINY["tied-mqa"]
        joint = lj.Model(fuse_params(lj.init_params(plain, jax.random.key(0)), plain), plain)
        for each in (model, quantised, whole, joint):
            lj.generate(each, None, [1, 2, 3], max_tokens=3)
        print(*sorted({choice.operation for choice in report()}), "jax.experimental.pallas" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    # A model asks for fused products only where a kernel is chosen for them, and for low-rank ones only with adapters.
    assert done.stdout.split() == [*sorted(OPERATIONS.keys() - {"fused_matmul", "add_lora"}), "False"]


def test_a_backend_names_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported when it is first asked for something, not before."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_lazy_kernel.py").write_text(
        "class Tiles: pass\n"
        "def run(x, *, tiles=None, interpret=False): return x * (20 if interpret else 10)\n"
        "def unsupported(target, x, *, interpret=False): return None if x.ndim == 1 or interpret else 'not a vector'\n"
    )
    backend = Backend.at("a_lazy_kernel", candidates=lambda *args: ())
    interpreted = Backend.at("a_lazy_kernel", interpreted=True, interpret=True)
    op = Operation("moe", {"reference": Backend(lambda x: x * 2), "lazy": backend, "interpreted": interpreted})
    assert interpreted.tiles is None
    assert interpreted.interpreted > backend.interpreted
    assert op(ONES)[0] == 2
    assert "a_lazy_kernel" not in sys.modules
    assert op(ONES, backend="lazy")[0] == 10
    assert backend.tiles is not None
    assert type(backend.tiles()).__name__ == "Tiles"
    assert monkeypatch.delitem(sys.modules, "a_lazy_kernel") is None
    assert op(ONES[None], backend="interpreted")[0, 0] == 20
    with pytest.raises(KernelError, match="not a vector"):
        op(ONES[None], backend="lazy")
    missing = Operation("moe", {"reference": Backend(lambda x: x * 2), "lazy": Backend.at("no_such_kernel")})
    with pytest.raises(KernelError, match="no_such_kernel") as caught:
        missing(ONES, backend="lazy")
    assert caught.value.hint


# --- Plugins and the record -------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed package whose module `a_kernel_plugin` a test may write to."""
    folder = tmp_path / "site"
    info = folder / "a_kernel_plugin-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-kernel-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[llama_jax.kernels]\nmine = a_kernel_plugin:BACKENDS\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "a_kernel_plugin", raising=False)
    plugins.load.cache_clear()
    yield folder / "a_kernel_plugin.py"
    plugins.load.cache_clear()


def test_a_plugin_adds_a_backend(plugin: Path, rules: list[Rule]) -> None:
    plugin.write_text("from llama_jax.kernels.dispatch import Backend\nBACKENDS = {'moe': Backend(lambda x: x * 10)}\n")
    assert OP(ONES, backend="mine")[0] == 10
    assert OP(ONES)[0] == 2
    rules += [Rule("mine", "s")]
    assert OP(ONES)[0] == 10
    assert "mine" in operation("moe").all_backends()
    assert "mine" not in operation("flash_attention").all_backends()
    assert extra().origins == ("a-kernel-plugin 1.2 (a_kernel_plugin:BACKENDS)",)


def test_a_plugin_cannot_replace_a_backend(plugin: Path) -> None:
    (info,) = plugin.parent.glob("*.dist-info")
    (info / "entry_points.txt").write_text("[llama_jax.kernels]\nreference = a_kernel_plugin:BACKENDS\n")
    plugin.write_text("from llama_jax.kernels.dispatch import Backend\nBACKENDS = {'moe': Backend(print)}\n")
    with pytest.warns(RuntimeWarning, match="'moe' has another backend of this name"):
        assert extra().backends == {}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise OSError('libfast.so is missing')", r"OSError: libfast\.so is missing"),
        ("", "AttributeError"),
        ("BACKENDS = [1]", "not a mapping"),
        ("BACKENDS = {'moe': print}", "not a mapping"),
        ("from llama_jax.kernels.dispatch import Backend\nBACKENDS = {'mo': Backend(print)}", "no operation 'mo'"),
    ],
)
def test_a_broken_plugin_is_named(plugin: Path, code: str, problem: str) -> None:
    plugin.write_text(code)
    with pytest.warns(RuntimeWarning, match=rf"plugin 'mine' of a-kernel-plugin 1\.2 .*{problem}"):
        assert OP(ONES)[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert OP(ONES)[0] == 2
    with pytest.raises(KernelError, match=f"'mine'.*{problem}"):
        OP(ONES, backend="mine")


def test_the_record_counts_traces_from_any_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    run = jax.jit(lambda x: OP(x))
    for _ in range(3):
        run(ONES)
    assert list(operations.recorder.counts().values()) == [1]
    recorder = Recorder()
    some = [Choice("moe", "cpu", "float32", f"n{i}", "reference") for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(recorder.add, some * 200))
    assert recorder.counts() == dict.fromkeys(some, 200)
    assert json.dumps([c.to_json() for c in recorder.counts()])
    recorder.clear()
    assert recorder.counts() == {}


def test_choices_on_this_device() -> None:
    chosen = choices()
    assert {c.operation for c in chosen} == set(OPERATIONS)
    assert {c.backend for c in chosen} - {"native"} == {"reference", "blocked"}  # where the library has been built
    assert {c.target for c in chosen} == {"cpu"}
    assert not ran()  # nothing was computed


def test_public_names() -> None:
    assert {"Backend", "Operation", "using"} <= set(dispatch.__all__)
    with pytest.raises(RequestError, match="no operation 'rope'"):
        operation("rope")


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_wrong_names_are_found_before_a_model_is_loaded(command: str) -> None:
    done = CliRunner().invoke(cli, [command, "--kernels", "moe:fast", "--model", "no-such-model"])
    assert done.exit_code == RequestError.exit_code
    assert "'moe:fast' is not of the form operation=backend" in done.stderr


@pytest.mark.slow
def test_bench_says_what_ran(tmp_path: Path) -> None:
    from tiny_chat_model import write_chat_model

    from llama_jax.convert import convert

    model = convert(write_chat_model(tmp_path / "hf", layers=2), tmp_path / "tiny")
    args = ["bench", "-m", str(model), "--batch", "1", "--prompt", "16", "--new", "2", "--repeats", "1", "--json"]
    env = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path)}
    # In a process of its own, since a report is of all that was traced. Ceilings of the usual size take half a minute.
    code = """if True:
        import functools, sys
        from llama_jax.cli import main
        from llama_jax.measure import bench
        bench.measure_ceilings = functools.partial(bench.measure_ceilings, side=64)
        sys.exit(main())
    """
    command = [sys.executable, "-c", code, *args, "--kernels", "flash_attention=reference"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    kernels = {kernel["operation"]: kernel for kernel in json.loads(done.stdout)["kernels"]}
    assert kernels["flash_attention"]["reason"] == "named by using() or load(kernels=)"
    assert kernels["decode_attention"]["reason"] == "Pallas kernels do not compile for a CPU"
    assert {kernel["backend"] for kernel in kernels.values()} == {"reference"}
    assert all(kernel["traced"] > 0 and kernel["target"] == "cpu" for kernel in kernels.values())
