"""Rules, meshes and what they say; `eight_devices_generate.py` runs on eight simulated devices."""

from __future__ import annotations

import math

import jax
import pytest
from click.testing import CliRunner
from helpers import on_eight_devices, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from llama_jax import layout, sharding
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec, preset
from llama_jax.errors import NoDevice, RequestError
from llama_jax.params import param_specs
from llama_jax.plan import Workload, make_plan
from llama_jax.sharding import RuledMesh, Rules
from llama_jax.targets import find


@pytest.mark.timeout(600)  # a process of its own, for some tens of seconds on an idle machine
@pytest.mark.slow
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_generate.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_and_whole_models_on_eight_devices() -> None:
    on_eight_devices("eight_devices_generate.py", "-m", "slow")


# --- Meshes -----------------------------------------------------------------------------------------------------------


def test_mesh_texts() -> None:
    assert sharding.parse_mesh("data=2,tensor=4") == {"data": 2, "tensor": 4}
    assert sharding.parse_mesh(" tensor=8 ") == {"tensor": 8}
    assert sharding.requested_axes(None, None) is None
    assert sharding.requested_axes(None, 8) == {"tensor": 8}
    assert sharding.requested_axes("data=1,fsdp=1", None) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not NAME=SIZE"),
        ("8", "'8' is not NAME=SIZE"),
        ("tensor", "'tensor' is not"),
        ("tensor=", "'tensor=' is not"),
        ("tensor=0", "positive size"),
        ("tensor=-2", "positive size"),
        ("tensor=2.0", "positive size"),
        ("tensor=٢", "positive size"),
        ("tensor=2,", "'' is not"),
        ("tensor=2,tensor=2", "'tensor' occurs twice"),
        ("model=2", "'model' is not an axis; there are data, fsdp"),
        ("tensor=99999999999999999999", "positive size"),
        ("fsdp=2", "nothing is split over the axis 'fsdp'"),
        ("expert=4,tensor=2", "nothing is split over the axis 'expert'"),
    ],
)
def test_malformed_meshes(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        sharding.requested_axes(text, None)
    assert caught.value.param == "mesh"
    assert caught.value.hint


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="both given"):
        sharding.requested_axes("tensor=2", 2)
    for size in (0, -1):
        with pytest.raises(RequestError, match="positive size"):
            sharding.requested_axes(None, size)


@pytest.mark.parametrize(
    ("command", "options", "exit_code"),
    [
        ("generate", ["a prompt", "--mesh", "tensor"], 2),
        ("generate", ["a prompt", "--tp", "0"], 2),
        ("chat", ["--tp", "2", "--mesh", "data=2"], 2),
        ("bench", ["--mesh", "fsdp=2"], 2),
        ("bench", ["--tp", "4096"], 5),
        ("show", ["--tp", "-1"], 2),
    ],
)
def test_refused_before_anything_is_loaded(command: str, options: list[str], exit_code: int) -> None:
    from llama_jax.cli import cli

    model = ["no such model"] if command == "show" else ["-m", "no such model"]
    result = CliRunner().invoke(cli, [command, *options, *model])
    assert result.exit_code == exit_code, result.output
    assert "no such model" not in result.output


@given(st.text("datensorfp=,0123 ", max_size=24))
def test_any_text_is_a_mesh_or_an_error(text: str) -> None:
    try:
        sizes = sharding.parse_mesh(text)
    except RequestError:
        return
    assert sizes
    assert set(sizes) <= set(sharding.MESH_AXES)
    assert all(size > 0 for size in sizes.values())


def test_more_places_than_devices() -> None:
    there = len(jax.devices())
    with pytest.raises(NoDevice, match=rf"data=2, tensor=64 needs 128 devices; there (is|are) {there} \(") as caught:
        sharding.make_mesh("data=2,tensor=64")
    assert caught.value.exit_code == 5
    with pytest.raises(RequestError, match="not an axis"):
        sharding.make_mesh(model=1)
    with pytest.raises(RequestError, match="positive size"):
        sharding.make_mesh(tensor=True)
    mesh = sharding.make_mesh(tensor=1)
    assert mesh.shape == {"tensor": 1}
    with sharding.on(mesh):
        assert not sharding.in_use()
    with sharding.on(None):
        assert sharding.ways("mlp") == 1


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_colliding_rules_are_refused() -> None:
    config = tiny_config(LayerSpec(mlp=MoeSpec(4, 2, 12)))
    spec = next(s for s in param_specs(config) if s.name.endswith("experts.gate_proj.weight"))
    with pytest.raises(RequestError, match=r"two dimensions of layers\.0.*\(4, 12, 16\)") as caught:
        layout.partition_spec(spec, config, RuledMesh({"tensor": 2}, Rules({"expert": "tensor", "mlp": "tensor"})))
    assert "expert, mlp, embed" in caught.value.hint
    rules = Rules({"expert": "expert", "mlp": "tensor"})
    found = layout.partition_spec(spec, config, RuledMesh({"tensor": 2, "expert": 2}, rules))
    assert found == PartitionSpec("expert", "tensor", None)


def lines(config: LlamaConfig, **sizes: int) -> list[str]:
    return [str(split) for split in layout.explain(config, sizes)]


def test_what_is_said_about_real_models() -> None:
    assert lines(preset("llama-3.1-8b"), data=2, tensor=8) == [
        "batch: split over data=2, rows are filled up to a multiple",
        "q_heads 32: split over tensor=8",
        "kv_heads 8: split over tensor=8",
        "mlp 14336: split over tensor=8",
        "vocab 128256: split over tensor=8",
    ]
    assert lines(preset("llama-3.1-8b"), tensor=16)[1] == (
        "kv_heads 8: split over tensor=16, each head is held 2 times, since 16 does not divide 8"
    )
    assert lines(preset("smollm2-135m"), tensor=2) == [
        "q_heads 9: whole on each device of tensor=2, 2 does not divide 9, so every device computes all of attention",
        "kv_heads 3: whole on each device of tensor=2, 2 does not divide 3",
        "mlp 1536: split over tensor=2",
        "vocab 49152: split over tensor=2",
    ]
    assert lines(preset("llama-3.1-8b"), data=1, tensor=1) == []
    mixed = tiny_config(LayerSpec(mlp=24), LayerSpec(mlp=MoeSpec(4, 2, 12, "sigmoid", 16)))
    assert [line.split(":")[0] for line in lines(mixed, tensor=2)] == [
        "q_heads 4",
        "kv_heads 2",
        "mlp 24",
        "mlp of each expert 12",
        "mlp of the shared expert 16",
        "vocab 40",
    ]


def test_a_mesh_of_no_use_is_refused() -> None:
    with pytest.raises(RequestError, match=r"tensor=7 divides nothing of this model \(q_heads 9, kv_heads 3, mlp 1536"):
        layout.check(preset("smollm2-135m"), {"tensor": 7})
    layout.check(preset("smollm2-135m"), {"tensor": 2})
    layout.check(preset("smollm2-135m"), {"data": 7})


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 32))
def test_repeated_heads(kv_heads: int, group: int, tensor: int) -> None:
    """As few as will do; the query heads of a device find theirs on it."""
    config = tiny_config(num_kv_heads=kv_heads, num_heads=kv_heads * group)
    split = layout.split_config(config, {"tensor": tensor})
    if config.num_heads % tensor:
        assert split == config
        return
    assert split == config.replace(num_kv_heads=split.num_kv_heads)
    assert split.num_kv_heads % tensor == 0
    assert split.num_kv_heads == min(
        n for n in range(kv_heads, config.num_heads + 1, kv_heads) if n % tensor == 0 and config.num_heads % n == 0
    )
    times = split.num_kv_heads // kv_heads
    for q in range(config.num_heads):
        assert q // (config.num_heads // split.num_kv_heads) // times == q // group


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]), st.integers(0, 2**16))
def test_parts_of_all_parameters(tensor: int, seed: int) -> None:
    """No part is larger than the whole, and what is split divides; the explanation tells the same."""
    kv_heads = 1 + seed % 4
    config = tiny_config(
        LayerSpec(mlp=8 * (1 + seed % 3)),
        LayerSpec(mlp=MoeSpec(3, 2, 12)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (1 + seed % 5),
        vocab_size=40 + seed % 9,
    )
    config = layout.split_config(config, {"tensor": tensor})
    mesh = AbstractMesh((tensor,), ("tensor",))
    said = {(s.axis.split()[0], s.size): s.parts for s in layout.explain(config, mesh)}
    sizes = {"q_heads": config.num_heads, "kv_heads": config.num_kv_heads}
    for spec in param_specs(config):
        split = layout.partition_spec(spec, config, mesh)
        assert math.prod(tensor for over in split if over) in (1, tensor)
        for axis, size, over in zip(spec.axes, spec.shape, split, strict=True):
            if axis in sharding.RULES and tensor > 1:
                assert (over is not None) == (said[axis, sizes.get(axis, size)] > 1)


# --- Rules of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_rules_on_eight_devices() -> None:
    on_eight_devices("eight_devices_rules.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kind_of_model_by_other_rules() -> None:
    on_eight_devices("eight_devices_rules.py", "-m", "slow")


def test_rules_are_values() -> None:
    rules = Rules({"mlp": ("fsdp", "tensor"), "batch": "data"})
    assert rules == Rules({"batch": ("data",), "mlp": ["fsdp", "tensor"]})  # type: ignore[dict-item]
    assert hash(rules) == hash(Rules({"batch": "data", "mlp": ("fsdp", "tensor")}))
    assert rules != Rules({"mlp": ("tensor", "fsdp"), "batch": "data"})
    with pytest.raises(RequestError, match="names an axis twice"):
        Rules({"mlp": ("tensor", "tensor")})


def test_axes_that_the_rules_use_can_be_given() -> None:
    rules = {"mlp": ("fsdp", "tensor")}
    assert sharding.axes.checked_sizes({"fsdp": 2, "tensor": 4}, Rules(rules)) == {"fsdp": 2, "tensor": 4}
    with pytest.raises(RequestError, match="nothing is split over the axis 'data'") as caught:
        sharding.make_mesh(data=2, rules=rules)
    assert "fsdp and tensor" in caught.value.hint
    with pytest.raises(RequestError, match="nothing is split over the axis 'data'"):
        layout.check(tiny_config(), RuledMesh({"data": 2, "tensor": 2}, Rules(rules)))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"mpl": "tensor"}, "mpl cannot be split"),
        ({"expert": "expert", "mlp": "tensor"}, "expert cannot be split"),
        ({"q_heads": "tensor"}, "beside their key/value heads"),
        ({"batch": "tensor", "vocab": "tensor"}, "batch and vocab are both split over tensor"),
    ],
)
def test_rules_that_no_program_follows(rules: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        layout.check(tiny_config(), RuledMesh({"tensor": 2, "expert": 1}, Rules(rules)))
    assert caught.value.param == "rules"
    assert caught.value.hint


def test_plans_follow_the_rules() -> None:
    """A tensor axis under another name costs the same; two axes for the MLP alone are counted where they are."""
    config, target = preset("llama-3.1-8b"), find("mi300x")
    workload = Workload(batch=8, context=4096)
    renamed = RuledMesh({"expert": 8}, Rules({name: "expert" for name in sharding.RULES if name != "batch"}))
    a, b = (make_plan(config, target, mesh, workload) for mesh in (renamed, {"tensor": 8}))
    assert (a.needs, a.prefill, a.decode, a.shapes) == (b.needs, b.prefill, b.decode, b.shapes)
    heads = {"q_heads": "tensor", "kv_heads": "tensor"}
    sizes = {"fsdp": 2, "tensor": 4}
    mixed = make_plan(config, target, RuledMesh(sizes, Rules({**heads, "mlp": ("fsdp", "tensor")})), workload)
    norms, attention, mlp, vocab = 65 * 4096, 32 * 4096 * 2 * (4096 + 1024), 32 * 4096 * 3 * 14336, 2 * 128256 * 4096
    assert mixed.needs.weights == 2 * (norms + attention // 4 + mlp // 8 + vocab)
    # Of each layer a sum over the four devices that share heads, and one over all eight; the vocabulary is whole.
    sums = {(c.devices, c.bytes): c.count for c in mixed.decode.collectives}
    row = 8 * config.hidden_size * 2
    assert sums == {(4, row): 32, (8, row): 32}
