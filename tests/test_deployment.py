"""The files of deploy/ agree with the server, and pass each tool's own checker where that is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import small_settings, tiny_model
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.cli.serve import command
from llama_jax.engine.core import Core
from llama_jax.plan.step_costs import Peak
from llama_jax.server.metrics import Metrics
from llama_jax.server.settings import ServerSettings
from llama_jax.targets.rocm import PLUGINS

DEPLOY = Path(__file__).parent.parent / "deploy"


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        (["hadolint"], "Dockerfile"),
        ([sys.executable, "-m", "kubernetes_validate", "--strict"], "kubernetes.yaml"),
        (["systemd-analyze", "verify"], "llama-jax.service"),
    ],
)
def test_syntax(tool: list[str], name: str) -> None:
    if tool[0] == sys.executable:
        pytest.importorskip("kubernetes_validate")
    elif shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not here")
    done = subprocess.run([*tool, str(DEPLOY / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert name != "llama-jax.service" or not done.stderr


def test_options_are_those_of_serve() -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    for name in ("Dockerfile", "llama-jax.service", "kubernetes.yaml"):
        lines = [line for line in text(name).splitlines() if re.match(r"\s*(CMD \[\"serve|ExecStart|- --)", line)]
        used = {found for line in lines for found in re.findall(r"--[a-z-]+", line)}
        assert used, name
        assert used <= options, name


def test_extras_are_those_of_the_package() -> None:
    named = set(re.findall(r"EXTRA=(\w+)", text("Dockerfile")))
    assert named <= {"cuda", *(plugin.extra for plugin in PLUGINS)}


def test_probes_are_routes_without_a_key() -> None:
    paths = set(re.findall(r"/health/\w+", text("kubernetes.yaml") + text("Dockerfile")))
    assert paths == {"/health/live", "/health/ready"}
    assert ServerSettings(host="0.0.0.0", keys=("k",)).serves("127.0.0.1:8000")  # the container's own health check


def test_the_dashboard_names_metrics_that_there_are() -> None:
    dashboard = json.loads(text("grafana.json"))
    core = Core(tiny_model(), small_settings(), peak=Peak(1e9, 1e9))
    metrics = Metrics()
    of_model = metrics.of("tiny", core.snapshot, lambda: 0)
    with of_model.request():
        pass
    of_model.finished("stop")
    metrics.answered("/v1/models", 200)
    samples = {s.name for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples}
    used = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            used |= set(re.findall(r"llama_jax_\w+", target["expr"]))
    assert len(used) > 12
    assert used <= samples, used - samples
