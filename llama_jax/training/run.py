"""A training run: from settings to checkpoints, measurements and a model or adapter in files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import disk
from llama_jax.adapters import Adapter, LoraConfig, new_adapter, save_adapter
from llama_jax.checkpoint import Progress, Source, save
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.measure.bench import measure_ceilings
from llama_jax.params import flatten, unflatten
from llama_jax.plan.costs import held_bytes
from llama_jax.sharding import on
from llama_jax.training import checkpoints, reference
from llama_jax.training.base import Base, Notify, opened_base
from llama_jax.training.batch import Batch
from llama_jax.training.costs import step_flops, step_memory
from llama_jax.training.data import Texts
from llama_jax.training.metrics import Measured, MetricsFile, Watch
from llama_jax.training.objectives import LOSSES, Loss
from llama_jax.training.packing import Rows
from llama_jax.training.placement import place_batch, training_mesh
from llama_jax.training.settings import Settings
from llama_jax.training.step import (
    Combine,
    State,
    full,
    initial_state,
    low_rank,
    make_entropies,
    make_evaluation,
    make_step,
)

CHECKPOINTS, METRICS, SETTINGS, REFERENCE = "checkpoints", "metrics.jsonl", "settings.json", "reference.npz"
MODEL, ADAPTER, LOCK = "model", "adapter", "run.lock"
"""Names in a run's folder."""


@dataclass(frozen=True)
class Trained:
    """The result of a run.

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
      LlamaJaxError: as `load`; DataError: the data; RequestError: the settings, the output is of another run, or
        training has diverged.
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
    validation: Texts | None
    say: Notify
    counted: Callable[[int, int, str], None] | None = None

    @property
    def loss(self) -> Loss:
        return LOSSES[self.base.settings.loss]

    def rows(self, texts: Texts) -> Rows:
        own = self.base.settings.rows
        return Rows(texts.texts, length=own.length, rows=own.rows, seed=self.base.settings.seed, pack=own.pack)

    @classmethod
    def begin(cls, base: Base, output: Path, counted: Any, say: Notify) -> _Run:
        settings = base.settings
        length = min(settings.rows.length, base.config.context_length)

        def read(name: str, files: tuple[str, ...]) -> Texts:
            found = LOSSES[settings.loss].read(
                files,
                base.tokenizer,
                length=length,
                learned=settings.data.learned,
                eos=settings.data.eos,
                template=settings.data.template,
                progress=counted,
            )
            if not found.texts:
                raise RequestError(
                    f"{name}: of {found.lines} lines nothing is learned",
                    param=name,
                    hint=f"give other files, or raise rows.length, of which the model can take {length}",
                )
            return found

        texts = read("data.files", settings.data.files)
        validation = read("data.validation", settings.data.validation) if settings.data.validation else None
        run = cls(base, output, texts, validation, say, counted)
        packing = run.rows(texts).packing()
        say(f"{texts.lines} lines: {packing}; {texts.cut} cut, {texts.dropped} with nothing learned")
        return run

    def finish(
        self, params: Any, config: LlamaConfig, rate: float, told: Callable[[Measured], None], stop: Callable[[], bool]
    ) -> Trained:
        settings, mesh, compute = self.base.settings, self.base.mesh, self.base.settings.compute
        combine, trained, frozen, learned = self._method(params, config)
        del params
        self._say_memory(config, trained, frozen)
        steps = settings.steps or self.rows(self.texts).steps(settings.epochs)
        run = self._compared(combine, trained, frozen, steps) if self.loss.compared else self
        rows, validation = run.rows(run.texts), None if run.validation is None else run.rows(run.validation)
        transformation = settings.optimizer.transformation(steps)
        state = self._resumed(initial_state(trained, transformation, mesh=mesh), steps)
        del trained
        done, metrics = int(state.step), MetricsFile(self.output / METRICS, int(state.step))
        options: dict[str, Any] = {"objective": self.loss.objective(settings), "mesh": mesh, "logits": compute.logits}
        step = make_step(combine, transformation, state, remat=compute.remat, **options)
        evaluation = make_evaluation(combine, **options)
        full_rate = rate * (1 if mesh is None else mesh.size)

        def tell(measured: Measured) -> None:
            metrics.add(measured)
            told(measured)

        watch = Watch(
            steps,
            settings.optimizer.rate(steps),
            lambda seconds, lengths: step_flops(config, lengths, learned) / seconds / full_rate,
            tell,
        )
        if done < steps:
            self.say("Compiling the step")
        for number in range(done, steps):
            batch, lengths = rows.batch(number)
            state, found = step(state, frozen, self._placed(batch))
            watch.dispatched(number, found, lengths)
            stopped = stop()
            if stopped or (number + 1) % settings.saving.every == 0 or number + 1 == steps:
                watch.finish()
                if validation is not None:
                    batches = (self._placed(validation.once(i)) for i in range(validation.steps(1)))
                    each = [jax.device_get(evaluation(state.trained, frozen, batch)) for batch in batches]
                    sums = {name: float(sum(x[name] for x in each)) for name in each[0]}
                    count = sums.pop("count")
                    metrics.validated(number + 1, {name: x / count for name, x in sums.items()})
                checkpoints.save(self.output / CHECKPOINTS, state, self._about, keep=settings.saving.keep)
                watch.restart()
            if stopped and number + 1 < steps:
                return Trained(number + 1, steps, watch.loss, None)
        return Trained(steps, steps, watch.loss, self._export(state, config))

    def _compared(self, combine: Combine, trained: Any, frozen: Any, steps: int) -> _Run:
        """The run with texts that know what the model says of them before it is trained."""
        settings, mesh = self.base.settings, self.base.mesh
        sets = {"texts": self.texts} | ({} if self.validation is None else {"validation": self.validation})
        about = self._about | {name: texts.digest for name, texts in sets.items()}
        found = reference.read(self.output / REFERENCE, about)
        if found is None:
            self.say("Computing what the model says of the texts before it is trained")
            entropies = make_entropies(combine, mesh=mesh, logits=settings.compute.logits)
            found = {
                name: reference.measure(
                    self.rows(texts),
                    texts.texts,
                    steps if name == "texts" else None,
                    lambda batch: entropies(trained, frozen, self._placed(batch)),
                    self.counted,
                )
                for name, texts in sets.items()
            }
            reference.write(self.output / REFERENCE, about, found)

        def referring(name: str, texts: Texts) -> Texts:
            return dataclasses.replace(texts, texts=reference.with_reference(texts.texts, found[name]))

        made = {name: referring(name, texts) for name, texts in sets.items()}
        return dataclasses.replace(self, texts=made["texts"], validation=made.get("validation"))

    @property
    def _about(self) -> dict[str, str]:
        return {"settings": self.base.settings.digest, "data": self.texts.digest, "base weights": self.base.digest}

    def _placed(self, batch: Batch) -> Batch:
        return place_batch(batch, self.base.settings.rows.parts, self.base.mesh)

    def _resumed(self, state: State, steps: int) -> State:
        """The state of the last checkpoint, or the given one if there is none."""
        folder = self.output / CHECKPOINTS
        if (last := checkpoints.latest(folder)) is not None:
            like = checkpoints.abstract(state)
            jax.tree.map(lambda x: x.delete(), state)  # makes room
            state = checkpoints.restore(folder, last, like, self._about)
            self.say(f"Resuming after step {last} of {steps}")
        with disk.storage_errors(self.output):
            text = json.dumps(dataclasses.asdict(self.base.settings), indent=1)
            disk.write_file(self.output / SETTINGS, text.encode())
        return state

    def _method(self, params: Any, config: LlamaConfig) -> tuple[Combine, Any, Any, float | None]:
        """The parameters, which of them are trained and which frozen, and how many weights an adapter multiplies."""
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
        count, kept = (
            sum(x.size for x in jax.tree.leaves(tree))
            for tree in (trained, jax.eval_shape(settings.optimizer.transformation(1).init, trained))
        )
        memory = step_memory(
            config,
            rows=settings.rows.rows // settings.rows.parts,
            length=settings.rows.length,
            trained=count,
            frozen=0 if frozen is None else held_bytes(config, self.base.dtype.itemsize),
            itemsize=self.base.dtype.itemsize,
            remat=settings.compute.remat,
            logits=settings.compute.logits,
            moments=kept / count,
            mesh=self.base.mesh,
        )
        self.say(f"{count:,} numbers are trained; a step takes about {disk.size_text(memory.total)} on each device")

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
