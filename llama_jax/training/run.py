"""A training run: from settings to checkpoints, measurements and a model or adapter in files."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import disk
from llama_jax.adapters import Adapter, LoraConfig, new_adapter, save_adapter
from llama_jax.checkpoint import Progress, Source, save
from llama_jax.config import LlamaConfig
from llama_jax.measure.bench import measure_ceilings, sound_share
from llama_jax.params import flatten, unflatten
from llama_jax.plan.costs import held_bytes
from llama_jax.sharding import on
from llama_jax.training import checkpoints
from llama_jax.training.base import Base, Notify, opened_base
from llama_jax.training.costs import step_flops, step_memory
from llama_jax.training.data import Texts, read_texts
from llama_jax.training.loss import loss
from llama_jax.training.metrics import Measured, MetricsFile
from llama_jax.training.packing import Rows
from llama_jax.training.placement import place_batch, training_mesh
from llama_jax.training.settings import Settings
from llama_jax.training.step import Combine, State, full, initial_state, low_rank, make_step

CHECKPOINTS, METRICS, MODEL, ADAPTER, LOCK = "checkpoints", "metrics.jsonl", "model", "adapter", "run.lock"
"""Names in a run's folder."""


@dataclass(frozen=True)
class Trained:
    """What a run has left.

    Attributes:
      step: the last one that was made; steps: of the whole run.
      loss: of that step; None if none was left to make.
      path: the checkpoint or the adapter's folder, None if the run was stopped before its end.
    """

    step: int
    steps: int
    loss: float | None
    path: Path | None


def train(
    settings: Settings,
    *,
    told: Callable[[Measured], None] | None = None,
    progress: Progress | None = None,
    counted: Callable[[int, int, str], None] | None = None,
    notify: Notify | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains, or resumes what an earlier call with the same settings and output has begun.

    A resumed run makes the same steps with the same numbers as one that was never stopped.

    Args:
      told: called with the measurements of each step.
      progress: called while the model is converted and loaded; counted: while data is read.
      notify: called with a line of text before what takes long.
      stop: asked after every step; True saves a checkpoint and returns.

    Raises:
      LlamaJaxError: as `load`; DataError: the data; RequestError: the settings, or the output is of another run.
    """
    say = notify or (lambda _: None)
    output = Path(settings.output).expanduser()
    mesh = None if settings.compute.mesh is None else training_mesh(settings.compute.mesh)
    waiting = lambda: say(f"Waiting for another run in {output} to end")  # noqa: E731
    with disk.file_lock(output / LOCK, waiting), opened_base(settings, mesh, progress, notify) as base:
        run = _Run.begin(base, output, counted, say)
        rate = measure_ceilings(base.dtype, side=512 if _on_cpu() else None).matmul_flops_per_s
        params, config = base.load(progress, notify)
        return run.finish(params, config, rate, told or (lambda _: None), stop)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@dataclass(frozen=True)
class _Run:
    """A run whose data has been read."""

    base: Base
    output: Path
    texts: Texts
    rows: Rows
    validation: Rows | None
    say: Notify

    @classmethod
    def begin(cls, base: Base, output: Path, counted: Any, say: Notify) -> _Run:
        settings = base.settings
        length = min(settings.rows.length, base.config.context_length)

        def read(files: tuple[str, ...]) -> tuple[Texts, Rows]:
            texts = read_texts(
                files,
                base.tokenizer,
                length=length,
                learned=settings.data.learned,
                eos=settings.data.eos,
                template=settings.data.template,
                progress=counted,
            )
            own = settings.rows
            return texts, Rows(texts.texts, length=own.length, rows=own.rows, seed=settings.seed, pack=own.pack)

        texts, rows = read(settings.data.files)
        say(f"{texts.lines} lines: {rows.packing()}; {texts.cut} cut, {texts.dropped} with nothing learned")
        validation = read(settings.data.validation)[1] if settings.data.validation else None
        return cls(base, output, texts, rows, validation, say)

    def finish(
        self, params: Any, config: LlamaConfig, rate: float, told: Callable[[Measured], None], stop: Callable[[], bool]
    ) -> Trained:
        settings, mesh = self.base.settings, self.base.mesh
        combine, trained, frozen, learned = self._method(params, config)
        del params
        steps = settings.steps or self.rows.steps(settings.epochs)
        transformation = settings.optimizer.transformation(steps)
        schedule = settings.optimizer.rate(steps)
        state = initial_state(trained, transformation, mesh=mesh)
        self._say_memory(config, trained, frozen)
        del trained
        about = {"settings": settings.digest, "data": self.texts.digest}
        folder = self.output / CHECKPOINTS
        if (last := checkpoints.latest(folder)) is not None:
            state = checkpoints.restore(folder, last, state, about)
            self.say(f"Resuming after step {last} of {steps}")
        done = int(state.step)
        with disk.storage_errors(self.output):
            disk.write_file(self.output / "settings.json", json.dumps(dataclasses.asdict(settings), indent=1).encode())
        metrics = MetricsFile(self.output / METRICS, done)
        compute = settings.compute
        step = make_step(combine, transformation, state, mesh=mesh, remat=compute.remat, logits=compute.logits)
        devices = 1 if mesh is None else mesh.size
        pending: tuple[int, Any, list[int]] | None = None
        began = time.perf_counter()
        spent: list[float] = []
        loss_now = None

        def report() -> None:
            nonlocal pending, began, loss_now
            if pending is None:
                return
            number, found, lengths = pending
            pending = None
            values = {name: float(x) for name, x in jax.device_get(found).items()}
            now = time.perf_counter()
            seconds, began = now - began, now
            spent.append(seconds)
            typical = float(np.median(spent[-50:]))
            flops = step_flops(config, lengths, learned) / seconds / rate / devices
            loss_now = values["loss"]
            measured = Measured(
                step=number + 1,
                steps=steps,
                loss=values["loss"],
                learned=int(values["tokens"]),
                tokens=sum(lengths),
                grad_norm=values["grad_norm"],
                learning_rate=float(schedule(number)),
                seconds=seconds,
                tokens_per_s=sum(lengths) / seconds,
                mfu=sound_share(flops),
                left_s=typical * (steps - number - 1),
            )
            metrics.add(measured)
            told(measured)

        stopped = False
        for number in range(done, steps):
            batch, lengths = self.rows.batch(number)
            state, found = step(state, frozen, place_batch(batch, settings.rows.parts, mesh))
            report()  # of the step before, while the device computes
            pending = number, found, lengths
            stopped = stop()
            if stopped or (number + 1) % settings.saving.every == 0 or number + 1 == steps:
                report()
                checkpoints.save(folder, state, about, keep=settings.saving.keep)
                if self.validation is not None:
                    metrics.validated(number + 1, self._validate(combine, state, frozen))
                began = time.perf_counter()
            if stopped and number + 1 < steps:
                return Trained(number + 1, steps, loss_now, None)
        return Trained(steps, steps, loss_now, self._export(state, config))

    def _method(self, params: Any, config: LlamaConfig) -> tuple[Combine, Any, Any, float | None]:
        """What the parameters become, what is trained, what is frozen, and how many weights an adapter multiplies."""
        settings = self.base.settings
        if settings.method == "full":
            return full(config, self.base.dtype), params, None, None
        own = settings.lora
        all_linear = own.targets == ("all-linear",)
        lora = LoraConfig(
            rank=own.rank,
            alpha=own.alpha,
            rslora=own.rslora,
            dora=own.dora,
            target_modules="all-linear" if all_linear else own.targets,
            extra={"base_model_name_or_path": settings.model},
        )
        with on(self.base.mesh):
            adapter = new_adapter(params, config, lora, jax.random.key(settings.seed))
        if self.base.mesh is not None:
            whole = jax.sharding.NamedSharding(self.base.mesh.automatic, jax.sharding.PartitionSpec())
            adapter = jax.device_put(adapter, whole)
        return low_rank(config), adapter, params, float(sum(x.size for x in jax.tree.leaves(adapter)))

    def _say_memory(self, config: LlamaConfig, trained: Any, frozen: Any) -> None:
        settings = self.base.settings
        count = sum(x.size for x in jax.tree.leaves(trained))
        memory = step_memory(
            config,
            rows=settings.rows.rows // settings.rows.parts,
            length=settings.rows.length,
            trained=count,
            frozen=0 if frozen is None else held_bytes(config, self.base.dtype.itemsize),
            itemsize=self.base.dtype.itemsize,
            remat=settings.compute.remat,
            logits=settings.compute.logits,
            mesh=self.base.mesh,
        )
        self.say(f"{count:,} numbers are trained; a step takes about {disk.size_text(memory.total)} on each device")

    def _validate(self, combine: Combine, state: State, frozen: Any) -> float:
        """Mean loss of the validation files."""
        assert self.validation is not None
        compute, mesh = self.base.settings.compute, self.base.mesh

        @jax.jit
        def both(trained: Any, frozen: Any, batch: Any) -> Any:
            params, config = combine(trained, frozen)
            return loss(params, config, jax.tree.map(lambda x: x[0], batch), logits=compute.logits)

        total = count = 0.0
        with on(mesh):
            for number in range(self.validation.steps(1)):
                batch = place_batch(self.validation.batch(number)[0], 1, mesh)
                some, learned = jax.device_get(both(state.trained, frozen, batch))
                total, count = total + float(some), count + float(learned)
        return total / count

    def _export(self, state: State, config: LlamaConfig) -> Path:
        """Writes the result; what is there of an earlier call is replaced."""
        if isinstance(state.trained, Adapter):
            return save_adapter(self.output / ADAPTER, jax.device_get(state.trained), self.base.config)
        dtype = jnp.dtype(config.dtype)
        flat = {name: x if x.dtype == dtype else x.astype(dtype) for name, x in flatten(state.trained).items()}
        return save(
            self.output / MODEL,
            unflatten(flat),
            config,
            source=Source(name=self.base.settings.model),
            generation_config=self.base.source.generation_config,
            files=self.base.files,
            overwrite=True,
        )
