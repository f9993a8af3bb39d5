"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from llama_jax.cli.adapter_options import adapter_option, given_adapter
from llama_jax.errors import RequestError
from llama_jax.kernels.registry import VARIABLE, parse_backends
from llama_jax.library import DEFAULT_MODEL, network

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llama_jax.model.loaded import Model
    from llama_jax.plan import AutoMesh, MeshRequest
    from llama_jax.text.tokenizer import Tokenizer

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


drafts_option = click.option(
    "--drafts",
    type=click.IntRange(0, 7),
    default=0,
    show_default=True,
    metavar="N",
    help="Try up to N tokens in one step that the text suggests itself: the same text, faster where it repeats itself.",
)

draft_model_option = click.option(
    "--draft-model",
    metavar="MODEL",
    help="Let a smaller model of the same vocabulary suggest them; with --drafts. The text stays the same.",
)


def check_drafts(drafts: int, draft_model: str | None) -> None:
    """Raises UsageError where a draft model is given that nothing would be asked of, before anything is loaded."""
    if draft_model is not None and not drafts:
        raise click.UsageError("--draft-model needs --drafts N: how many tokens a step tries, e.g. 4")


batch_invariant_option = click.option(
    "--batch-invariant",
    is_flag=True,
    help="Bitwise identical results, whatever else is in the batch; slower.",
)


def examples(*lines: str, more: str = "") -> str:
    """The epilog of a command's help: example command lines, kept as they are, and what else there is to say."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) + (f"\n\n{more}" if more else "")


def _together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order of `--help`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _agree(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Answers yes for this process, and for those that it starts."""
    if value:
        os.environ[network.YES] = "1"


yes_option: Decorator = click.option(
    "--yes",
    is_flag=True,
    expose_value=False,
    callback=_agree,
    help=f"Fetch the default model without asking, if it is not here. [also: {network.YES}=1]",
)
model_option = _together(
    click.option(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        metavar="MODEL",
        help="A folder, a GGUF file, org/name on the Hugging Face hub, or a name from `llama-jax list`.",
    ),
    yes_option,
)
"""`--model`, and `--yes` for the model that nobody names."""
dtype_option: Decorator = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Compute dtype. [default: float32 on a CPU, bfloat16 on a GPU]",
)
weights_option: Decorator = click.option(
    "--weights",
    metavar="FORM",
    help="How weights are kept: stored, as in the model; float; or int8, int4, fp8 or another layout, to quantise "
    "them while loading. [default: float on a CPU; on GPUs stored, where the codes can be read directly]",
)
kv_dtype_option: Decorator = click.option(
    "--kv-dtype",
    type=click.Choice(("int8", "k8v4", "int4", "fp8")),
    help="Quantise the cache: to about a half (int8; fp8, less exact), 3/8 (k8v4: keys in 8 bits, values in 4) or a "
    "quarter (int4, which changes what small models say). [default: kept in the dtype of the model]",
)
batch_tokens_option: Decorator = click.option(
    "--batch-tokens", type=int, metavar="N", help="Tokens at once. [default: 16384 on a GPU, 2048 on a CPU]"
)
activations_option: Decorator = click.option(
    "--activations",
    type=click.Choice(("int8",)),
    help="Also round the inputs of quantised weights, each token by itself, and multiply integers. "
    "[default: not rounded]",
)
convert_option: Decorator = click.option(
    "--convert/--no-convert",
    default=True,
    help="Keep a converted copy of the model in the cache, or read its original files each time. [default: convert]",
)
page_sizes = click.Choice((16, 32, 64, 128, 256))
page_size_option: Decorator = click.option(
    "--page-size",
    type=page_sizes,
    default=64,
    show_default=True,
    help="Tokens per page of the KV cache.",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _name_backends(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, str]:
    """Maps operations to backends, for `load`; misspellings are found before jax is imported."""
    return parse_backends(value or "", "--kernels")


kernels_option: Decorator = click.option(
    "--kernels",
    metavar="OP=BACKEND,...",
    callback=_name_backends,
    help=f"Choose implementations, e.g. flash_attention=reference. [default: ${VARIABLE}, else the fastest known]",
)
memory_fraction_option: Decorator = click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="F",
    help="Fraction of a device's memory that jax may use. [default: XLA_CLIENT_MEM_FRACTION, or jax's 0.75; 0.9 for "
    "an engine]",
)
quiet_option: Decorator = click.option("-q", "--quiet", is_flag=True, help="Print only results and errors.")

mesh_options = _together(
    click.option("--tp", type=int, metavar="N", help="Split the model over N devices; short for --mesh tensor=N."),
    click.option(
        "--mesh",
        metavar="AXES",
        help="Devices to use, e.g. data=2,tensor=4: 2 groups of rows, each over 4 devices; auto chooses by memory.",
    ),
)
"""`--tp` and `--mesh`, as `requested_mesh` takes them."""


def is_auto(mesh: str | None, tp: int | None) -> bool:
    """Whether the options ask for an automatic mesh.

    Raises:
      RequestError: they also ask for a size.
    """
    if mesh == AUTO and tp is not None:
        raise RequestError("--mesh auto chooses --tp by itself", param="mesh", hint="give one of them")
    return mesh == AUTO


def requested_mesh(
    mesh: str | None, tp: int | None, *, batch: int = 1, context: int | None = None, prompt: int | None = None
) -> Mesh | AutoMesh | None:
    """The mesh that the options ask for, or None. Imports jax.

    Args:
      batch, context, prompt: sizes that `--mesh auto` must make room for (`plan.AutoMesh`).

    Raises:
      RequestError, NoDevice: see `sharding.requested_axes` and `sharding.make_mesh`.
    """
    if is_auto(mesh, tp):
        from llama_jax.plan import AutoMesh

        return AutoMesh(batch, context, prompt)
    from llama_jax.sharding import make_mesh, requested_axes

    sizes = requested_axes(mesh, tp)
    return None if sizes is None else make_mesh(sizes)


def claim_memory() -> None:
    """Lets jax take most of a GPU's memory, for a command that runs an engine there; to be called before jax starts.
    A fraction that the user has set is left alone."""
    from jax._src import xla_bridge  # nothing public says whether jax has started without starting it

    from llama_jax.plan import device_memory

    device_memory.claim_memory(os.environ, started=xla_bridge.backends_are_initialized())


class Told(Protocol):
    """Receiver of loading progress: a `Reporter`, or a wrapper that forwards to one."""

    def notify(self, message: str) -> None:
        """Take a line of text; see `llama_jax.load`."""
        ...

    def progress(self, done: int, total: int, name: str) -> None:
        """Take bytes done, bytes in all, and a tensor's name."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """Command-line options for loading a model; see `load_options`."""

    dtype: str | None
    weights: str | None
    kv_dtype: str | None
    activations: str | None
    convert: bool
    mesh: str | None
    tp: int | None
    kernels: dict[str, str]
    adapters: tuple[str, ...] = ()

    def load_draft(self, name: str | None, model: Model, tokenizer: Tokenizer | None, reporter: Told) -> Model | None:
        """Loads the draft model, if requested, onto the model's devices.

        Raises:
          RequestError: it does not match this model.
        """
        from llama_jax.generation.draft import opened_draft

        return opened_draft(name, model, tokenizer, **self._options(reporter))

    def load(self, model: str, devices: MeshRequest, reporter: Told, *, named: bool = False) -> tuple[Model, Tokenizer]:
        """Loads a model on the devices that `requested_mesh` gives for `mesh` and `tp`.

        Args:
          named: see `given_adapter`.
        """
        from llama_jax.loading import load

        return load(
            model,
            adapter=given_adapter(self.adapters, named=named),
            dtype=self.dtype,
            mesh=devices,
            kv_dtype=self.kv_dtype,
            **self._options(reporter),
        )

    def _options(self, reporter: Told) -> dict[str, Any]:
        """Options of `load` for every model."""
        return {
            "convert": self.convert,
            "weights": self.weights,
            "activations": self.activations,
            "kernels": self.kernels,
            "progress": reporter.progress,
            "notify": reporter.notify,
        }


def gathered(kind: type, name: str, *options: Decorator) -> Decorator:
    """Options of a command as its argument `name`: a dataclass `kind`, which has a field for each of their values."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            fields = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
            return function(**{name: kind(**fields)}, **values)

        return _together(*options)(command)

    return decorate


load_options = gathered(
    LoadOptions,
    "loading",
    dtype_option,
    weights_option,
    kv_dtype_option,
    activations_option,
    convert_option,
    mesh_options,
    kernels_option,
    adapter_option,
)
"""`--dtype`, `--weights`, `--kv-dtype`, `--activations`, `--convert`, `--tp`, `--mesh`, `--kernels` and `--adapter`: a
command's argument `loading`, of `LoadOptions`."""


sampling_options = _together(
    click.option(
        "--top-p", type=float, metavar="P", help="Sample from the likeliest tokens whose probabilities add up to P."
    ),
    click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens."),
    click.option(
        "--min-p", type=float, metavar="P", help="Sample from tokens at least P times as likely as the likeliest."
    ),
    click.option(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="Subtracted from the logits of tokens that have occurred, -2 to 2.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="Subtracted from a token's logit for each occurrence, -2 to 2.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="Divides the logits of tokens seen so far; 1 has no effect.",
    ),
    click.option("--seed", type=int, metavar="N", help="Makes sampling reproducible."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated."),
    click.option("--stop-token-ids", type=int, multiple=True, metavar="ID", help="End after this id. May be repeated."),
    click.option("--min-tokens", type=int, metavar="N", help="Do not end before N tokens."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Continue past the model's end of text."),
)
"""The fields of SamplingParams besides temperature and max_tokens, whose defaults differ between commands.

The names are those of the fields; the value of an option that was not given is None or ().
"""


def in_a_folder(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Refuses a file that could not be written, before anything that takes long; a callback of options."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.absolute().parent}", ctx, param)
    return path


receipt_option = click.option(
    "--receipt",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=in_a_folder,
    metavar="FILE",
    help="Record what the run was made of in FILE, for `llama-jax replay`.",
)


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in fields.items() if value is not None and value != ()}
