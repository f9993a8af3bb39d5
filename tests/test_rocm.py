"""The table of jax's plugins for AMD GPUs, everything that follows it, and the ROCm that a machine has."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from jaxlib import plugin_support
from test_doctor import NO_PLUGINS, ON_CPU, amd_machine, write
from test_repository import load

from llama_jax.doctor.devices import check_devices
from llama_jax.doctor.rocm import check_rocm
from llama_jax.targets import hardware, rocm
from llama_jax.targets.hardware import Rocm

ROOT = Path(__file__).parents[1]
SEVEN, TEN = rocm.PLUGINS


# --- What follows the table -------------------------------------------------------------------------------------------


def test_extras_and_groups() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    assert {name for name in extras if "rocm" in name} == {p.extra for p in rocm.PLUGINS} | {"rocm", "rocm-aot"}
    for plugin in rocm.PLUGINS:
        assert extras[plugin.extra] == list(plugin.requirements())
    assert extras["rocm"] == [f"llama-jax[{rocm.NEWEST.extra}]"]
    assert extras["rocm-aot"] == list(rocm.NEWEST.compiler("another jaxlib"))
    assert any(str(r).startswith(f"{rocm.NEWEST.pjrt}=={rocm.JAX}") for r in pyproject["dependency-groups"]["amd"])
    assert f"jax=={rocm.JAX}" in pyproject["tool"]["uv"]["constraint-dependencies"]


def test_ci_compiles_with_all_that_the_tests_do_not() -> None:
    others = {(jax, g) for jax, generations in load(ROOT / ".ci/amd_plugins.py").pairs().items() for g in generations}
    everything = {(jax, p.generation) for p in rocm.PLUGINS for jax in p.built_with}
    assert others == everything - {(rocm.JAX, rocm.NEWEST.generation)}


def test_table_in_the_docs() -> None:
    page = (ROOT / "docs/targets.md").read_text()
    (table,) = re.findall(r"<!-- begin plugins -->\n(.*?)<!-- end plugins -->", page, re.DOTALL)
    rows = [f"| {p.generation} | `{p.extra}` | `{p.plugin}`, `{p.pjrt}` | {built(p)} |" for p in rocm.PLUGINS]
    assert table.splitlines()[2:] == rows
    guide = (ROOT / "docs/rocm.md").read_text()
    for plugin in rocm.PLUGINS:
        assert f"`{plugin.extra}` for ROCm {plugin.generation}" in guide


def built(plugin: rocm.Plugin) -> str:
    return ", ".join(f"{jax} ({with_rocm})" for jax, with_rocm in plugin.built_with.items())


@pytest.mark.amd
def test_what_installed_packages_say() -> None:
    for plugin, version in rocm.installed():
        assert f"(ROCm:{plugin.built_with[rocm.release(version)]})" in metadata(plugin.pjrt)["Summary"]


# --- Versions ---------------------------------------------------------------------------------------------------------


def test_releases() -> None:
    assert rocm.release("0.12.0.1") == rocm.release("0.12.0.post1") == rocm.release("0.12.0") == "0.12.0"
    assert rocm.fits("0.12.0", "0.12.0.1")
    assert rocm.fits("0.11.0.post1", "0.11.0")
    assert not rocm.fits("0.11.2", "0.12.0")
    assert not rocm.fits("0.11.1", "0.11.2")


@pytest.mark.parametrize("plugin", rocm.PLUGINS, ids=lambda p: p.extra)
def test_jaxlib_knows_the_plugin_and_checks_no_version(plugin: rocm.Plugin) -> None:
    """The rule that `fits` relies on; CUDA's plugins are checked to the last number."""
    module = plugin.plugin.replace("-", "_")
    assert module in plugin_support._PLUGIN_MODULE_NAMES["rocm"]
    assert plugin_support.check_plugin_version(module, "0.12.0.1", "0.12.0")
    with pytest.warns(RuntimeWarning, match="not compatible"):
        assert not plugin_support.check_plugin_version("jax_cuda13_plugin", "0.12.0.1", "0.12.0")


# --- The ROCm of a machine --------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, library_folder: str) -> None:
    write(folder / f"{name.replace('-', '_')}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
    write(folder / library_folder / "libamdhip64.so.7", "")


def test_rocm_below_opt(tmp_path: Path) -> None:
    assert hardware.rocm(tmp_path, []) is None
    write(tmp_path / "opt/rocm-7.14.0/.info/version", "7.14.0-43\n")
    found = hardware.rocm(tmp_path, [])
    assert found == Rocm("7.14.0-43", tmp_path / "opt/rocm-7.14.0/lib")
    assert found.number == (7, 14)
    write(tmp_path / "opt/rocm/.info/version", "10.1.0\n")  # the one that the plugin looks into
    assert hardware.rocm(tmp_path, []) == Rocm("10.1.0", tmp_path / "opt/rocm/lib")


@pytest.mark.parametrize(
    ("name", "folder"), [("rocm-sdk-core", "_rocm_sdk_core"), ("amd-rocm-language-runtime-instinct", "rocm")]
)
def test_rocm_of_wheels_goes_first(tmp_path: Path, name: str, folder: str) -> None:
    write(tmp_path / "opt/rocm/.info/version", "7.14.0\n")
    site = tmp_path / "site"
    write(site / f"{name.replace('-', '_')}-0.1.0.dist-info/METADATA", f"Name: {name}\nVersion: 0.1.0\n")
    assert hardware.rocm(tmp_path, [str(site)]) == Rocm("7.14.0", tmp_path / "opt/rocm/lib")  # it holds no libraries
    other = tmp_path / "other"
    wheel(other, name, "10.1.0", f"{folder}/lib")
    assert hardware.rocm(tmp_path, [str(other)]) == Rocm("10.1.0", other / folder / "lib", wheels=True)


# --- What `doctor` says -----------------------------------------------------------------------------------------------


def line(plugin: rocm.Plugin, release: str = rocm.JAX, jax: str | None = None) -> str:
    return "pip install " + " ".join(plugin.requirements(release, jax))


@pytest.mark.parametrize(
    ("version", "installed", "fix"),
    [
        ("7.14.0", {}, line(SEVEN)),
        ("10.1.0", {}, line(TEN)),
        ("7.2.1", {"jax": "0.12.0", "jaxlib": "0.12.0"}, line(SEVEN, "0.12.0")),
        ("10.1.0", {"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}, line(TEN, "0.12.0", "0.12.0.1")),
        ("10.1.0", {"jax": "0.10.0", "jaxlib": "0.10.0"}, line(TEN)),  # no plugin of that release in the table
        (
            "6.4.0",
            {},
            f"jax has no plugin for ROCm 6.4.0: install ROCm 10 (https://rocm.docs.amd.com), then {line(TEN)}",
        ),
        (
            "10.1.0",
            {SEVEN.plugin: "0.11.2", SEVEN.pjrt: "0.11.2"},
            f"pip uninstall -y {SEVEN.plugin} {SEVEN.pjrt} && {line(TEN)}",
        ),
        ("10.1.0", {TEN.pjrt: "0.11.2"}, line(TEN)),  # the compiler alone
    ],
)
def test_the_line_that_installs_what_goes_with_the_rocm(
    tmp_path: Path, version: str, installed: dict[str, str], fix: str
) -> None:
    root = amd_machine(tmp_path, 90402)
    found = Rocm(version, Path("/opt/rocm/lib"))
    (check,) = check_devices(hardware.gpus(root), ON_CPU, NO_PLUGINS | installed, {}, root, found)
    assert (check.status, check.fix) == ("problem", fix)


def test_all_is_installed_and_jax_does_not_start(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, 90402)
    versions = NO_PLUGINS | {TEN.plugin: "0.11.2", TEN.pjrt: "0.11.2"}
    (check,) = check_devices(hardware.gpus(root), ON_CPU, versions, {}, root, Rocm("10.0.0", Path("/opt/rocm/lib")))
    assert "JAX_PLATFORMS=rocm" in check.fix


def test_no_amd_gpu() -> None:
    (check,) = check_rocm((), None, NO_PLUGINS)
    assert (check.status, check.detail) == ("ok", "no AMD GPU was found")
    (check,) = check_rocm((hardware.Gpu("nvidia", "H200"),), Rocm("7.14.0", Path("/opt/rocm/lib")), NO_PLUGINS)
    assert check.detail == "no AMD GPU was found, though ROCm 7.14.0 is installed"
    (check,) = check_rocm((), None, NO_PLUGINS | {TEN.pjrt: "0.11.2"})
    assert check.detail.endswith("jax-rocm10-pjrt compiles for one all the same (llama-jax compile)")


def test_plugin_and_rocm_of_two_generations() -> None:
    gpus, found = (hardware.Gpu("amd", "gfx942"),), Rocm("10.1.0", Path("/opt/rocm/lib"))
    seven = {SEVEN.plugin: "0.11.2", SEVEN.pjrt: "0.11.2"}
    ten = {TEN.plugin: "0.11.2", TEN.pjrt: "0.11.2"}
    (check,) = check_rocm(gpus, found, NO_PLUGINS | seven)
    assert check.detail == "ROCm 10.1.0 in /opt/rocm, but jax-rocm7-pjrt is for ROCm 7"
    (check,) = check_rocm(gpus, found, NO_PLUGINS | ten)
    assert (check.status, check.detail) == ("ok", "ROCm 10.1.0 in /opt/rocm")
    (check,) = check_rocm(gpus, found, NO_PLUGINS | seven | ten)
    assert check.exit_code == 5
    assert (check.status, check.fix) == ("problem", f"pip uninstall -y {SEVEN.plugin} {SEVEN.pjrt}")
    (check,) = check_rocm(gpus, Rocm("7.14.0", Path("/opt/rocm/lib")), NO_PLUGINS | seven | ten)
    assert check.fix == f"pip uninstall -y {TEN.plugin} {TEN.pjrt}"
