"""Requests to quantise a model, and the scheme that a request implies for each leaf."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError, did_you_mean
from llama_jax.kernels.dispatch.operation import REFERENCE
from llama_jax.kernels.dispatch.tables import shipped_rules
from llama_jax.params import canonical_specs
from llama_jax.quantized import CODES, Layout, layout_named, stored_layout
from llama_jax.quantized.methods import METHODS
from llama_jax.targets import Target

PLAIN = "bfloat16"
"""The name of what is not quantised, and what it is stored in."""
GROUPS = {"int4": 64}
"""Numbers that share a scale by default; for other kinds, a whole row does."""
WHOLE_ROWS = -1
NEAREST = "rtn"
"""The default method, and that of embeddings and heads if the method is calibrated on a text."""

STORED, FLOAT = "stored", "float"
"""Forms of a quantised model's weights on devices: as they are stored, or decoded."""
ACTIVATIONS = ("int8",)
"""Dtypes that inputs of quantised weights may be rounded to, token by token (`llama_jax.kernels.integer_matmul`)."""


def usual_form(
    target: Target, stored: Iterable[tuple[str, str]], *, split: bool, activations: str | None = None
) -> str:
    """The default form (docs/quantization.md has the measurements).

    On a CPU, decoding costs more time than reading fewer bytes saves. On AMD GPUs weights stay as they are stored. On
    NVIDIA GPUs they do if kernels or XLA read the codes, on one device, since XLA cannot partition kernels: integers,
    and those of routed experts where a kernel multiplies with them.

    Args:
      target: the device.
      stored: leaves and their schemes, as `LlamaConfig.schemes`.
      split: whether the model is spread over several devices.
      activations: one of `ACTIVATIONS`, which are multiplied with codes; or None.
    """
    if target.vendor == "amd" or activations is not None:
        return STORED
    if target.vendor == "cpu" or split:
        return FLOAT
    experts = any(rule.backend != REFERENCE for rule in shipped_rules("quantized_moe", target))
    layouts = [(leaf, stored_layout(name)) for leaf, name in stored]
    read = all(layout and layout.kind != "fp8" and (experts or ".experts." not in leaf) for leaf, layout in layouts)
    return STORED if read else FLOAT


@dataclass(frozen=True)
class Recipe:
    """The layouts of a quantised model's parts. Norms, biases and routers stay as they are.

    Attributes:
      weights: of all projections and experts.
      lm_head: of the output projection, or of the embedding that it is tied to; None leaves it as it is.
      embed: of an untied embedding, of which a token reads one row.
      ignore: patterns of leaves that stay as they are, with `*`, `?` and `[...]` as in file names.
      method: how codes are found, a key of `METHODS`.
    """

    weights: Layout
    lm_head: Layout | None
    embed: Layout | None
    ignore: tuple[str, ...] = ()
    method: str = NEAREST

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a text."""
        return METHODS[self.method].calibrated

    def check_text(self, *, given: bool) -> None:
        """Raises RequestError if the method needs a calibration text and none is given, or the other way round."""
        if given != self.calibrated:
            what = "needs a calibration text" if self.calibrated else "takes no calibration text"
            other = [name for name, method in METHODS.items() if method.calibrated == given]
            raise RequestError(
                f"the method {self.method} {what}",
                param="calibration",
                hint=f"{'leave it out' if given else 'give one'}, or choose the method {' or '.join(other)}",
            )


def recipe(
    weights: str,
    *,
    group: int | None = None,
    symmetric: bool | None = None,
    lm_head: str = "int8",
    embed: str = PLAIN,
    ignore: str | Sequence[str] = (),
    method: str = NEAREST,
) -> Recipe:
    """Reads a request.

    Args:
      weights: "int8", "int4" or "fp8", which `group` and `symmetric` complete, or the full name of a layout, such as
        "int4_g128_zero".
      group: neighbours in a row that share a scale, -1 for the whole row. By default 64 in int4, else the whole row.
      symmetric: whether code 0 represents 0, so that no minima are stored. By default False in int4, else True.
      lm_head, embed: name of a layout, or "bfloat16".
      ignore: patterns of leaves, e.g. "layers.0.*" or "*.down_proj".
      method: how codes are found. "rtn": each is the nearest; "hqq" also needs no data; the others take a text.

    Raises:
      RequestError: one of them is unknown, or they contradict each other.
    """
    if weights in CODES:
        layout = _layout(weights, group, symmetric)
    else:
        layout = _named(weights, "weights")
        if group is not None or symmetric is not None:
            raise RequestError(
                f"weights {weights!r} is the name of a whole layout, so that group and symmetric add nothing",
                param="weights",
                hint=f"leave them out, or give weights={layout.kind!r}",
            )
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    wanted = Recipe(layout, _top(lm_head, "lm_head"), _top(embed, "embed"), patterns)
    _check_method(method, wanted)
    return replace(wanted, method=method)


def _check_method(method: str, wanted: Recipe) -> None:
    if method not in METHODS:
        raise RequestError(
            f"method {method!r} is not known",
            param="method",
            hint=f"{did_you_mean(method, METHODS)} there are {', '.join(METHODS)}".strip(),
        )
    for layout in (wanted.weights, wanted.lm_head, wanted.embed):
        if layout is not None and not METHODS[method].takes(layout):
            raise RequestError(
                f"the method {method} does not make {layout.name}",
                param="method",
                hint=f"choose a layout with minima or a symmetric one of whole numbers, or the method {NEAREST}",
            )


def requested(form: str | None) -> Recipe | None:
    """The recipe that a form's name requests; None for a form that leaves weights as they are.

    Raises:
      RequestError: it is neither a form nor the name of a layout.
    """
    return None if form in (None, STORED, FLOAT) else recipe(form)


def check_activations(config: LlamaConfig, activations: str | None) -> None:
    """Checks that a model's products can take these activations; None means those of the model's dtype.

    Args:
      config: with the schemes that weights have on the devices.

    Raises:
      RequestError: they are unknown, or no weight of the model has integer codes.
    """
    if activations is None:
        return
    if activations not in ACTIVATIONS:
        raise RequestError(
            f"activations {activations!r} are not known",
            param="activations",
            hint=f"choose {' or '.join(ACTIVATIONS)}, or leave it out for the dtype of the model",
        )
    if not any((layout := stored_layout(name)) and layout.kind != "fp8" for _, name in config.schemes):
        raise RequestError(
            f"{activations} activations are multiplied with weights in int8 or int4, and the model has none",
            param="activations",
            hint="quantise it while loading, by weights='int8', or keep a quantised model's weights='stored'",
        )


def _top(name: str, param: str) -> Layout | None:
    return None if name in (PLAIN, "bf16") else _named(name, param)


def _layout(kind: str, group: int | None, symmetric: bool | None) -> Layout:
    if group is None:
        group = GROUPS.get(kind, WHOLE_ROWS)
    if group != WHOLE_ROWS and (group < 2 or group % 2):
        raise RequestError(f"group {group}", param="group", hint="an even number from 2 on, or -1 for whole rows")
    if symmetric is None:
        symmetric = kind != "int4"
    if not symmetric and kind != "int4":
        raise RequestError(
            f"weights in {kind} are symmetric",
            param="symmetric",
            hint="leave it out, or choose int4, which need not be",
        )
    return Layout(kind, None if group == WHOLE_ROWS else group, None if symmetric else "min")


def _named(name: str, param: str) -> Layout:
    layout = layout_named(name)
    if layout is None:
        known = (*CODES, *(() if param == "weights" else (PLAIN,)))
        raise RequestError(
            f"{param} {name!r} names no layout",
            param=param,
            hint=f"{did_you_mean(name, known)} there are {', '.join(known)}; with endings for groups of N (_gN) and "
            "asymmetric int4 (_min or _zero), e.g. int4_g64_min".strip(),
        )
    return layout


def schemes(config: LlamaConfig, wanted: Recipe) -> tuple[tuple[str, str], ...]:
    """The scheme of each leaf of a model, for `LlamaConfig.schemes`.

    Raises:
      RequestError: rows of a leaf do not divide into groups, a pattern matches no leaf, or the model is quantised.
    """
    if config.schemes:
        names = sorted({scheme for _, scheme in config.schemes})
        raise RequestError(
            f"the model is quantised already ({', '.join(names)})",
            param="weights",
            hint="take its weights in floating point: load(weights='float'), or its original files",
        )
    found, unused = [], set(wanted.ignore)
    for spec in canonical_specs(config):
        if len(spec.shape) < 2 or spec.path[-2] == "router":
            continue
        fits = {pattern for pattern in wanted.ignore if fnmatch.fnmatchcase(spec.leaf, pattern)}
        unused -= fits
        layout = _of_leaf(spec.leaf, config, wanted)
        if fits or layout is None:
            continue
        if not layout.fits(spec.shape[-1]):
            raise _uneven(spec.leaf, spec.shape[-1], layout)
        found.append((spec.leaf, layout.name))
    if unused:
        raise RequestError(
            f"no weight is called {sorted(unused)[0]!r}",
            param="ignore",
            hint="patterns are of names such as layers.0.attn.q_proj, layers.*.mlp.down_proj, embed, lm_head",
        )
    return tuple(found)


def _of_leaf(leaf: str, config: LlamaConfig, wanted: Recipe) -> Layout | None:
    if leaf == "lm_head" or (leaf == "embed" and config.tie_word_embeddings):
        return wanted.lm_head
    return wanted.embed if leaf == "embed" else wanted.weights


def _uneven(leaf: str, columns: int, layout: Layout) -> RequestError:
    sizes = [group for group in (256, 128, 64, 32, 16) if columns % group == 0]
    other = f"choose a group of {sizes[0]} or less" if sizes else "choose whole rows (-1)"
    return RequestError(
        f"rows of {leaf} have {columns} numbers, which do not divide into "
        + (f"groups of {layout.group}" if layout.group else "pairs"),
        param="group",
        hint=f"{other}, or leave it as it is by ignore={leaf!r}",
    )
