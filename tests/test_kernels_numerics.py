"""The check of kernels on the device: wrong ones of every kind are found, disabled by name, and remembered."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.doctor.kernels import check_choices, check_numerics
from llama_jax.doctor.probe import probe_jax
from llama_jax.errors import KernelError
from llama_jax.kernels.attention.records import KeysValues, Places, Rule
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.checking import startup as checking
from llama_jax.kernels.checking.child import Numerics, check_kernels
from llama_jax.kernels.checking.compare import GRADIENTS, LIMITS, Check, check, reference, row_error, run_checks
from llama_jax.kernels.dispatch import operation as operations
from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.operation import Operation, disabled
from llama_jax.kernels.moe.reference import routed_experts_reference
from llama_jax.kernels.registry import OPERATIONS, operation

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow


def with_backends(op: str, *, only: str | None = None, **runs: Callable[..., jax.Array]) -> Operation:
    """The operation with backends of a test beside its reference alone, and with one case or all."""
    real = operation(op)
    backends = {"reference": real.backends["reference"]} | {name: Backend(run) for name, run in runs.items()}
    cases = [case for case in real.cases() if only in (None, case.name)]
    assert cases
    return dataclasses.replace(real, backends=backends, cases=lambda: cases)


def problems(op: Operation, *, quick: bool = True) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in op.backends if name != "reference"}
    for result in run_checks({op.name: op}, quick=quick):
        if result.problem:
            found[result.backend].append(result.problem)
    return found


# --- What is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_itself_passes_in_its_own_dtype(name: str) -> None:
    quick = [case.name for case in operation(name).cases() if case.quick]
    assert 2 <= len(quick) <= 4
    op = with_backends(name, only=quick[0], same=operation(name).backends["reference"].run)
    assert problems(op) == {"same": []}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interpreted_kernel_passes(name: str) -> None:
    op = operation(name)
    case = next(case for case in op.cases() if case.quick)
    for found in run_checks(
        {name: dataclasses.replace(op, cases=lambda: [dataclasses.replace(case, differentiate=())])}
    ):
        assert not found.problem
        assert op.backends[found.backend].interpreted or found.backend == "native"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OPERATIONS)
def test_interpreted_kernels_pass_on_every_case_with_gradients(name: str) -> None:
    found = list(run_checks({name: operation(name)}))
    assert [f"{check.backend}, {check.case}: {check.problem}" for check in found if check.problem] == []
    kernels = any(backend.interpreted for backend in operation(name).backends.values())
    interpreted = [check for check in found if operation(name).backends[check.backend].interpreted]
    assert len(interpreted) == kernels * len(operation(name).cases())


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_itself_passes_with_gradients(name: str) -> None:
    op = with_backends(name, same=operation(name).backends["reference"].run)
    found = list(run_checks({name: op}))
    assert len(found) == len(op.cases())
    for done in found:
        # It rounds codes times scales to the dtype of the call, which kernels do not.
        codes = done.case.startswith(("int8", "int4", "k8v4", "fp8"))
        assert done.error is not None
        assert done.error <= done.limit * (2 if codes else 1), done


def wrong_scale(*args: Any, rule: Rule, **kwargs: Any) -> jax.Array:
    return attention_reference(*args, rule=dataclasses.replace(rule, scale=rule.scale * 1.1), **kwargs)


def one_key_too_many(*args: Any, places: Places, **kwargs: Any) -> jax.Array:
    """The first empty slot of each row is seen; the first row has none."""
    kv_positions = places.kv_positions
    empty = jnp.sum(kv_positions >= 0, axis=1)
    seen = kv_positions.at[jnp.arange(len(empty)), empty].set(0, mode="drop")
    return attention_reference(*args, places=dataclasses.replace(places, kv_positions=seen), **kwargs)


def wrong_heads(*args: Any, q: jax.Array, **kwargs: Any) -> jax.Array:
    return attention_reference(*args, q=jnp.roll(q, 1, axis=2), **kwargs)


def swapped_pages(*args: Any, kv: KeysValues, **kwargs: Any) -> jax.Array:
    page_table = None if kv.page_table is None else kv.page_table[:, ::-1]
    return attention_reference(*args, kv=dataclasses.replace(kv, page_table=page_table), **kwargs)


def not_finite(*args: Any, **kwargs: Any) -> jax.Array:
    return attention_reference(*args, **kwargs).at[0, -1, 0, 0].set(jnp.nan)


def one_row(*args: Any, **kwargs: Any) -> jax.Array:
    return attention_reference(*args, **kwargs).at[0, -1, 3].set(0)


def raising(*args: Any, **kwargs: Any) -> jax.Array:
    raise RuntimeError("INTERNAL: no kernel\nimage is available")


@pytest.mark.parametrize("name", [pytest.param("flash_attention", marks=pytest.mark.slow), "decode_attention"])
def test_wrong_attention_is_found(name: str) -> None:
    wrong = {
        f.__name__: f for f in (wrong_scale, one_key_too_many, wrong_heads, swapped_pages, not_finite, one_row, raising)
    }
    found = problems(with_backends(name, **wrong))
    assert not [each for each, said in found.items() if not said]
    assert found["raising"][0] == "RuntimeError: INTERNAL: no kernel"
    assert "nan" in found["not_finite"][0]
    # A wrong table shows where there are pages, and only there.
    assert len(found["swapped_pages"]) < len(found["wrong_scale"])


def test_wrong_experts_are_found() -> None:
    def wrong_expert(*args: Any, expert_ids: jax.Array, **kwargs: Any) -> jax.Array:
        return routed_experts_reference(*args, expert_ids=expert_ids.at[-1, 0].add(1), **kwargs)

    def no_scale(*args: Any, **kwargs: Any) -> jax.Array:
        scales = {k: jnp.ones_like(x) for k, x in kwargs.items() if k.endswith("_scale")}
        return routed_experts_reference(*args, **kwargs | scales)

    found = problems(with_backends("moe", wrong_expert=wrong_expert, no_scale=no_scale))
    assert len(found["no_scale"]) == len(found["wrong_expert"]) == 2


def test_a_wrong_gradient_is_found() -> None:
    @jax.custom_vjp
    def f(x: jax.Array, weights: jax.Array) -> jax.Array:
        return x

    f.defvjp(lambda x, w: (x, w), lambda w, g: (jnp.roll(g, 1, axis=0), jnp.zeros_like(w)))

    def run(x: jax.Array, gate: jax.Array, **kwargs: Any) -> jax.Array:
        return routed_experts_reference(f(x, gate), gate=gate, **kwargs)

    op = with_backends("moe", only="300 tokens", wrong=run)
    (case,) = op.cases()
    arrays = case.example()
    for gradients, right in ((False, True), (True, False)):
        found = check(op, "wrong", case, arrays, reference(op, case, arrays, gradients=gradients), gradients=gradients)
        assert (found.problem == "") is right
        assert found.error is not None
    assert found.error > 1 / GRADIENTS


def test_one_by_one_is_the_same() -> None:
    """And says what it is at before it traces, so that whatever happens is due to that."""
    op = with_backends("decode_attention", wrong=wrong_scale, raising=raising)
    found = {}
    for at_once in (True, False):
        said: list[tuple[str, str]] = []

        def notify(event: str, name: str, said: list[tuple[str, str]] = said) -> None:
            said.append((event, name))

        checks = run_checks({op.name: op}, quick=True, at_once=at_once, notify=notify)
        found[at_once] = [dataclasses.replace(check, seconds=0) for check in checks]
        quick = [case.name for case in op.cases() if case.quick]
        names = [f"decode_attention/{b}/{c}" for c in quick for b in ("reference", "raising", "wrong")]
        events = ["prepare", "compiled", "start"] if at_once else ["start"]
        # Nothing is compiled before all is traced, as far as anybody hears, and nothing runs before all is compiled.
        assert said == [(event, name) for event in events for name in names]
    assert found[True] == found[False]
    assert all(check.problem for check in found[True])


def test_a_reference_that_fails_is_no_kernels_fault(
    operations_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations_with(same=attention_reference)
    (op,) = checking._operations().values()
    broken = dataclasses.replace(op, backends={**op.backends, "reference": Backend(raising)})
    (only,) = run_checks({op.name: broken}, quick=True)
    assert (only.backend, only.problem) == ("reference", "RuntimeError: INTERNAL: no kernel")
    assert checking.failures_of((only,)) == {}
    monkeypatch.setattr(checking, "_operations", lambda: {op.name: broken})
    said: list[str] = []
    checking.self_check(said.append)
    assert said[1] == "warning: kernels of decode_attention were not compared, d64: RuntimeError: INTERNAL: no kernel"
    assert not disabled()
    assert checking.stored_failures() is None  # the next process tries again
    (finding,) = check_numerics(Numerics((dataclasses.asdict(only),), "device"))
    assert "cannot be compared" in finding.fix
    # One that has crashed before is not tried again, nor is what would be compared with it.
    (known,) = run_checks({op.name: op}, quick=True, crashed={"decode_attention/reference/d64": "it crashed"})
    assert (known.backend, known.problem) == ("reference", "it crashed")


@pytest.mark.parametrize("name", OPERATIONS)
def test_examples_have_the_shapes_that_are_promised(name: str) -> None:
    for case in operation(name).cases():
        arrays = {key: (x.shape, x.dtype) for key, x in case.example().items()}
        assert arrays == {key: (x.shape, x.dtype) for key, x in case.abstract().items()}


def test_row_errors() -> None:
    rows = jax.random.normal(jax.random.key(0), (1000, 8))
    assert row_error(rows, rows) == 0
    assert row_error(rows.at[7].multiply(1.01), rows) == pytest.approx(0.01, rel=1e-3)
    assert row_error(rows.at[7, 3].set(jnp.inf), rows) == jnp.inf
    assert row_error(rows.at[7, 3].set(jnp.nan), rows) != row_error(rows, rows.at[7, 3].set(0))
    # Rows of zeros, such as padding, are not divided by.
    assert row_error(rows.at[7].set(0), rows.at[7].set(0)) == 0
    assert row_error(rows.at[7].set(1.0), rows.at[7].set(0)) > 1
    assert set(LIMITS) == {"float32", "float16", "bfloat16"}


def test_unsupported_and_interpreted_backends_are_left_out() -> None:
    real = operation("decode_attention")
    backends = {
        "reference": real.backends["reference"],
        "elsewhere": Backend(raising, lambda target, *args, **kwargs: "not here"),
        "paged": Backend(raising, lambda target, q, kv, **kwargs: "no" if kv.page_table is None else None),
        "interpreter": Backend(attention_reference, interpreted=True),
    }
    op = dataclasses.replace(real, backends=backends, cases=lambda: real.cases()[:2])
    assert [(c.backend, c.case) for c in run_checks({op.name: op}, quick=True)] == [("paged", "paged d128")]
    everything = [(c.backend, c.case) for c in run_checks({op.name: op})]
    assert everything == [("interpreter", "d64"), ("interpreter", "paged d128"), ("paged", "paged d128")]


# --- Once a device and version ----------------------------------------------------------------------------------------


@pytest.fixture
def operations_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets the operations that the check at start-up sees; an empty cache, and nothing disabled afterwards."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))

    def give(**runs: Callable[..., jax.Array]) -> None:
        op = with_backends("decode_attention", only="d64", **runs)
        monkeypatch.setattr(checking, "_operations", lambda: {op.name: op})

    yield give
    operations._disabled.set_global(())


WRONG = ("decode_attention", "wrong")


def test_a_wrong_kernel_is_disabled_and_remembered(operations_with: Callable[..., None]) -> None:
    said: list[str] = []
    operations_with(wrong=wrong_scale, same=attention_reference)
    first = checking.self_check(said.append)
    assert [(c.backend, bool(c.problem)) for c in first] == [("same", False), ("wrong", True)]
    assert list(disabled()) == [WRONG]
    assert [line for line in said if "decode_attention/wrong is disabled: d64: a row is off" in line]
    # The next process takes the result from the file.
    operations._disabled.set_global(())
    assert checking.self_check(said.append) == ()
    assert list(disabled()) == [WRONG]
    op = with_backends("decode_attention", only="d64", wrong=wrong_scale)
    (case,) = op.cases()
    with pytest.raises(KernelError, match="is disabled: it was wrong on this device"):
        op(**case.arguments(case.example()), backend="wrong")
    assert op(**case.arguments(case.example())).shape == (3, 1, 8, 64)


def test_right_kernels_are_checked_once(operations_with: Callable[..., None]) -> None:
    operations_with(same=attention_reference)
    assert len(checking.self_check(lambda line: None)) == 1
    assert checking.self_check(lambda line: None) == ()
    assert not disabled()
    path = checking.results_path()
    assert list(json.loads(path.read_text()).values()) == [{}]
    path.write_text("[")  # damaged: checked again
    assert len(checking.self_check(lambda line: None)) == 1


@pytest.mark.parametrize("what", ["source_hash", "versions", "plugins"])
def test_another_version_is_checked_again(
    operations_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    operations_with(same=attention_reference)
    checking.self_check(lambda line: None)
    if what == "source_hash":
        monkeypatch.setattr(checking, "source_hash", lambda name: "other")
    elif what == "versions":
        monkeypatch.setattr(checking, "versions", lambda: {"jax": "0.1"})
    else:
        monkeypatch.setattr(checking, "extra", lambda: dataclasses.replace(operations.extra(), origins=("p 1.0",)))
    assert len(checking.self_check(lambda line: None)) == 1
    assert len(json.loads(checking.results_path().read_text())) == 2


def test_it_can_be_turned_off(operations_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    operations_with(wrong=wrong_scale)
    monkeypatch.setenv("LLAMA_JAX_SELF_CHECK", "0")
    assert checking.self_check(lambda line: pytest.fail(line)) == ()
    assert not disabled()


def test_a_folder_that_cannot_be_written(operations_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", os.devnull)
    operations_with(wrong=wrong_scale)
    assert len(checking.self_check(lambda line: None)) == 1
    assert list(disabled()) == [WRONG]


def test_several_processes_must_agree(operations_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    operations_with(wrong=wrong_scale)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(KernelError, match="'wrong' of 'decode_attention' is wrong on this device") as caught:
        checking.self_check(lambda line: None)
    assert "LLAMA_JAX_KERNELS=decode_attention=reference" in caught.value.hint


# --- In a child process -----------------------------------------------------------------------------------------------

ONE = json.dumps({"check": dataclasses.asdict(Check("moe", "fast", "small", 0.001, 0.01, "", 0.1))})
CHILD = f"""
import json, os, sys, time
crashed = json.loads(sys.argv[1])
print("a line that is none of ours")
print(json.dumps({{"start": "moe/fast/small"}}), flush=True)
print('''{ONE}''', flush=True)
if "moe/bad/small" not in crashed:
    print(json.dumps({{"start": "moe/bad/small"}}), flush=True)
    BREAK
one = json.loads('''{ONE}''')["check"]
print(json.dumps({{"check": one | {{"backend": "bad", "problem": crashed["moe/bad/small"]}}}}), flush=True)
print(json.dumps({{"device": "a device"}}), flush=True)
"""


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("os.abort()", "the process ended with status -6"),
        ("sys.exit('Memory access fault by GPU node-1')", "status 1: Memory access fault by GPU node-1"),
        ("time.sleep(60)", "it took longer than 2 s"),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_left_out(code: str, end: str) -> None:
    began = time.monotonic()
    lines: list[str] = []
    found = check_kernels(os.environ, deadline_s=2, progress=lines.append, code=CHILD.replace("BREAK", code))
    assert time.monotonic() - began < 20
    assert (found.device, found.error) == ("a device", "")
    assert [(c["backend"], c["problem"]) for c in found.checks[:1]] == [("fast", "")]
    assert [c["backend"] for c in found.failed] == ["bad"]
    assert end in found.failed[0]["problem"]
    good = ["checking moe/fast/small", "moe/fast, small: agrees, off by 0.001 of a row at most (0.01 is allowed)"]
    problem = found.failed[0]["problem"]
    again = ["checking moe/bad/small", f"moe/bad/small: {problem}; starting again without it"]
    assert lines == [*good, *again, *good, f"moe/bad, small: {problem}"]


TOGETHER = f"""
import json, os, sys
crashed, at_once = json.loads(sys.argv[1]), sys.argv[2] == "at once"
names = ["moe/fast/small", "moe/bad/small", "moe/other/small"]
def say(event, value):
    print(json.dumps({{event: value}}), flush=True)
for event in ("prepare", "compiled") if at_once else ():
    for name in names:
        if name not in crashed:
            say(event, name)
            WHILE_COMPILING
for name in names:
    if name not in crashed:
        say("start", name)
        WHILE_RUNNING
    one = json.loads({ONE!r})["check"]
    say("check", one | {{"backend": name.split("/")[1], "problem": crashed.get(name, "")}})
say("device", "a device")
"""


@pytest.mark.parametrize("event", ["prepare", "compiled"])
@pytest.mark.parametrize("name", ["fast", "other"])
def test_nobody_is_blamed_for_a_crash_while_several_compile(event: str, name: str) -> None:
    """The crash comes when the parent has heard last of another kernel than the bad one."""
    code = TOGETHER.replace("WHILE_COMPILING", f"if (event, name) == ({event!r}, 'moe/{name}/small'): os.abort()")
    code = code.replace("WHILE_RUNNING", "if name == 'moe/bad/small': os.abort()")
    lines: list[str] = []
    found = check_kernels(os.environ, progress=lines.append, code=code)
    assert (found.device, found.error) == ("a device", "")
    assert [c["backend"] for c in found.checks] == ["fast", "bad", "other"]
    assert [c["backend"] for c in found.failed] == ["bad"]
    assert lines[0].startswith("compiling all")
    assert len([line for line in lines if "status -6; taking one after the other" in line]) == 1


def test_a_crash_while_running_is_blamed_at_once() -> None:
    """Nothing is compiled any more by then, and the next child compiles all but that one together again."""
    code = TOGETHER.replace("WHILE_COMPILING", "pass").replace(
        "WHILE_RUNNING", "if name == 'moe/bad/small': os.abort()"
    )
    lines: list[str] = []
    found = check_kernels(os.environ, progress=lines.append, code=code)
    assert (found.device, [c["backend"] for c in found.failed]) == ("a device", ["bad"])
    assert [line for line in lines if line.startswith("compiled")] == ["compiled 3 of 3", "compiled 2 of 2"]
    assert not [line for line in lines if line.startswith("checking")]


def test_a_child_that_never_gets_to_its_checks() -> None:
    """One after the other it is the same: that is no kernel's fault, and not tried for ever."""
    code = "import json, sys; print(json.dumps({'prepare': 'moe/fast/small'})); raise SystemExit('no memory')"
    found = check_kernels(os.environ, code=code)
    assert found == Numerics((), error="the process ended with status 1: no memory")


def test_a_compiler_that_crashes_in_a_thread(tmp_path: Path) -> None:
    """The real thing: a kernel in the middle, and others that compile beside it."""
    code = """
import dataclasses, json, os, sys, time
import jax.numpy as jnp
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend
from llama_jax.kernels.checking import startup
from llama_jax.kernels.checking import stages
from llama_jax.kernels.registry import operation
real, compile = operation("decode_attention"), stages.Traced.compile
runs = {name: Backend(attention_reference) for name in ("reference", "first", "last")}
runs["hard"] = Backend(lambda **a: jnp.tanh(attention_reference(**a)))
op = dataclasses.replace(real, backends=runs, cases=lambda: real.cases()[:1])
startup._operations = lambda: {op.name: op}
def crash():
    time.sleep(0.3)
    os.abort()
def crashing(self, pool):
    return (pool.submit(crash),) if "tanh" in self.programs[0].as_text() else compile(self, pool)
stages.Traced.compile = crashing
startup.report_checks(json.loads(sys.argv[1]), at_once=sys.argv[2] == "at once")
"""
    found = check_kernels({**os.environ, "LLAMA_JAX_CACHE": str(tmp_path)}, code=code)
    assert (found.error, [c["backend"] for c in found.checks]) == ("", ["first", "hard", "last"])
    assert [c["backend"] for c in found.failed] == ["hard"]
    (kept,) = json.loads((tmp_path / "kernels/numerics.json").read_text()).values()
    assert list(kept) == ["decode_attention/hard"]


def test_a_child_that_cannot_start() -> None:
    found = check_kernels(os.environ, code="raise SystemExit('no device')")
    assert found == Numerics((), error="the process ended with status 1: no device")
    (finding,) = check_numerics(found)
    assert (finding.status, finding.exit_code) == ("problem", 0)
    assert "no device" in finding.detail


def test_the_real_child(tmp_path: Path) -> None:
    """On a CPU: nothing but the interpreted kernels, and the result is kept."""
    child = "from llama_jax.kernels.checking.startup import *\nimport llama_jax.kernels.checking.startup as s\n"
    child += "s._operations = dict\nreport_checks({})"
    found = check_kernels({**os.environ, "LLAMA_JAX_CACHE": str(tmp_path)}, code=child)
    assert found.error == ""
    assert found.device.startswith("cpu, jax")
    assert list(json.loads((tmp_path / "kernels/numerics.json").read_text()).values()) == [{}]


def test_findings_of_doctor() -> None:
    good = dataclasses.asdict(Check("moe", "fast", "small", 0.001, 0.01, "", 0.1))
    bad = good | {"backend": "bad", "problem": "a row is off"}
    (fine,) = check_numerics(Numerics((good,), "device"))
    assert (fine.status, fine.detail) == ("ok", "1 comparisons agree: moe/fast")
    (found,) = check_numerics(Numerics((good, bad), "device"))
    assert (found.status, found.exit_code, found.detail) == ("problem", 4, "moe/bad, small: a row is off")
    choice = {"operation": "moe", "backend": "fast", "measured": False}
    others = [choice | {"measured": True}, choice | {"backend": "reference"}]
    (line,) = check_choices({"choices": [choice, *others, choice]})
    assert line.detail == "moe: fast (not measured), fast, reference"
    assert check_choices({}) == []
    (broken,) = check_choices({"error": "the table is damaged", "hint": "remove it"})
    assert (broken.status, broken.fix) == ("problem", "remove it")


def test_doctor_asks_for_the_choices_in_the_child() -> None:
    broken = probe_jax({**os.environ, "LLAMA_JAX_KERNELS": "nothing"})
    assert broken.result is not None
    assert "not of the form" in broken.kernels["error"]
