"""Settings of a training run, as a TOML file has them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llama_jax.errors import RequestError, did_you_mean
from llama_jax.model.remat import REMAT
from llama_jax.training.data import LEARNED
from llama_jax.training.loss import LOGITS
from llama_jax.training.objectives import LOSSES
from llama_jax.training.optimizers import Optimizer

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Data:
    """The texts to learn.

    Attributes:
      files: JSON lines, each with "text" or "messages", or what the loss reads; paths are relative to the working
        directory.
      validation: files of the same kind, whose loss is measured and not learned.
      learned: of conversations: "assistant" (all of its turns), "last" (its last one) or "all".
      eos: whether the end-of-text token follows a "text".
      template: variables of the chat template; a fixed date_string for templates that write the date.
    """

    files: tuple[str, ...]
    validation: tuple[str, ...] = ()
    learned: str = "assistant"
    eos: bool = True
    template: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """The settings of a step.

    Attributes:
      length: tokens of a row.
      rows: of a step, on all devices together.
      parts: that the rows are computed in, one after the other (gradient accumulation).
      pack: whether several texts share a row; they do not see each other.
    """

    length: int = 2048
    rows: int = 8
    parts: int = 1
    pack: bool = True


@dataclass(frozen=True)
class Lora:
    """A new adapter.

    Attributes:
      rank: of its matrices.
      alpha: their product is multiplied with alpha / rank.
      targets: names of projections in Hugging Face's models, or "all-linear".
      rslora: multiplies with alpha / rank ** 0.5 instead (arXiv:2312.03732).
      dora: learns a magnitude of each row besides (arXiv:2402.09353).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Preference:
    """The loss "dpo".

    Attributes:
      beta: how strongly the model is held to the one it starts from; less lets it move further.
    """

    beta: float = 0.1


@dataclass(frozen=True)
class Compute:
    """How it is computed; the same is learned, up to rounding.

    Attributes:
      dtype: float32 or bfloat16; by default bfloat16 on a GPU. What is trained is kept in float32.
      weights: the form of frozen weights, as `load` takes it: "stored", "float", or a layout such as "int8" or "int4",
        which quantises them (QLoRA).
      remat: what gradients keep of each layer (`llama_jax.model.remat.REMAT`).
      logits: logits that exist at once on a device, at most.
      mesh: devices, such as "fsdp=8" or "data=2,tensor=4".
    """

    dtype: str | None = None
    weights: str | None = None
    remat: str = "products"
    logits: int = LOGITS
    mesh: str | None = None


@dataclass(frozen=True)
class Saving:
    """Checkpoints.

    Attributes:
      every: steps from one to the next.
      keep: how many stay.
    """

    every: int = 100
    keep: int = 2


@dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes:
      model: as `load` takes it.
      output: a folder for checkpoints, metrics and the result.
      data: see `Data`.
      method: "lora" (of a quantised model too) or "full".
      loss: "cross_entropy" of each token, or "dpo", of pairs of answers.
      epochs: how often each text is seen; steps: in place of that, the number of steps.
      seed: of the order of texts and of a new adapter.
      rows, lora, dpo, optimizer, compute, saving: see their classes.
    """

    model: str
    output: str
    data: Data
    method: str = "lora"
    loss: str = "cross_entropy"
    epochs: int = 1
    steps: int | None = None
    seed: int = 0
    rows: Rows = field(default_factory=Rows)
    lora: Lora = field(default_factory=Lora)
    dpo: Preference = field(default_factory=Preference)
    optimizer: Optimizer = field(default_factory=Optimizer)
    compute: Compute = field(default_factory=Compute)
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        choices = {
            "method": (self.method, METHODS),
            "loss": (self.loss, tuple(LOSSES)),
            "data.learned": (self.data.learned, LEARNED),
            "compute.remat": (self.compute.remat, tuple(REMAT)),
            "compute.dtype": (self.compute.dtype or "float32", ("float32", "bfloat16")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                hint = did_you_mean(value, known) or f"there are {', '.join(known)}"
                raise RequestError(f"{name} = {value!r} is not known", param=name, hint=hint)
        positive = {
            "epochs": self.epochs,
            "steps": 1 if self.steps is None else self.steps,
            "rows.length": self.rows.length - 1,
            "rows.rows": self.rows.rows,
            "rows.parts": self.rows.parts,
            "lora.rank": self.lora.rank,
            "compute.logits": self.compute.logits,
            "saving.every": self.saving.every,
            "saving.keep": self.saving.keep,
        }
        for name, number in positive.items():
            if number < 1:
                raise RequestError(f"{name} is too small", param=name, hint="give a positive number")
        if self.rows.rows % self.rows.parts:
            raise RequestError(
                f"{self.rows.rows} rows cannot be computed in {self.rows.parts} equal parts",
                param="rows.parts",
                hint="choose a number that divides rows.rows",
            )
        for name, factor, hint in (("dpo.beta", self.dpo.beta, "e.g. 0.1"), ("lora.alpha", self.lora.alpha, "e.g. 32")):
            if not 0 < factor < math.inf:
                raise RequestError(f"{name} must be positive", param=name, hint=hint)
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed = {self.seed} is out of range", param="seed", hint="from 0 to 4294967295")
        _check_template(self.data.template)
        if not self.data.files:
            raise RequestError("data.files names no file", param="data.files", hint='e.g. files = ["train.jsonl"]')

    @property
    def digest(self) -> str:
        """Of what decides on what is learned: a run is resumed only with the same."""
        kept = dataclasses.asdict(self)
        for name in ("output", "saving"):
            del kept[name]
        for name in ("remat", "logits", "mesh"):
            del kept["compute"][name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _check_template(variables: dict[str, Any]) -> None:
    """Raises RequestError for variables that a run sets itself, and for values that are no JSON."""
    if taken := variables.keys() & {"add_generation_prompt", "messages", "tokenizer", "tools"}:
        name = f"data.template.{min(taken)}"
        raise RequestError(f"{name} cannot be set", param=name, hint="lines have messages and tools of their own")
    try:
        json.dumps(variables)
    except TypeError as error:
        hint = 'a date is a text, with quotation marks: date_string = "26 Jul 2024"'
        raise RequestError(f"data.template: {error}", param="data.template", hint=hint) from error


def read_settings(path: str | Path) -> Settings:
    """Reads settings from a TOML file.

    Raises:
      RequestError: it cannot be read, is not TOML, or has a key or a value that settings do not have; names it.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"cannot read {path}: {reason}", param="config", hint="give a file in TOML") from error
    return settings_from(values)


def settings_from(values: dict[str, Any]) -> Settings:
    """Settings from a tree of plain values; errors as for `read_settings`."""
    _check_keys(values, Settings, "")
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`") or "config"
        raise RequestError(f"{name}: {text}", param=name, hint="docs/training.md lists the settings") from error


def _check_keys(values: dict[str, Any], kind: Any, prefix: str) -> None:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
            raise RequestError(f"{prefix}{name} is not a setting", param=f"{prefix}{name}", hint=hint)
        inner = {
            "data": Data,
            "rows": Rows,
            "lora": Lora,
            "dpo": Preference,
            "optimizer": Optimizer,
            "compute": Compute,
            "saving": Saving,
        }
        if not prefix and name in inner and isinstance(value, dict):
            _check_keys(value, inner[name], f"{name}.")
