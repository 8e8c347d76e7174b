# SPDX-License-Identifier: MIT
"""`sanify(D)`: put SAN twins in the place of a discriminator's last layers, without changing what D computes.

Everything is built and compared before anything is replaced, and put back when the whole of D, run on an example,
does not give the same logits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from san.layers import SANLayer
from san.logits import SANLogits
from san.preserve import preserved_state
from san.trace import HINT, guess_last_layers, list_layers, list_outputs, trace_last_layers
from san.twins import Converters, SanifyError, make_twin


@dataclass(frozen=True)
class ReplacedLayer:
    """One line of the report."""

    name: str  # of the layer in D
    was: str  # the layer before
    now: str  # its twin
    num_directions: int  # output units; classes of an embedding
    direction_dim: int  # length of each direction vector
    difference: float  # largest change of the layer's output on random input, over its largest output


@dataclass(frozen=True)
class SanifyReport:
    """What `sanify` replaced. Prints as a table."""

    replaced: tuple[ReplacedLayer, ...]  # in the order of D's modules

    def __str__(self) -> str:
        header = ("layer", "was", "now", "directions", "difference")
        rows = [
            (r.name, r.was, r.now, f"{r.num_directions} x {r.direction_dim}", f"{r.difference:.1e}")
            for r in self.replaced
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in [header, *rows]
        ]
        return "\n".join(line.rstrip() for line in lines)


def sanify(
    D: nn.Module,
    names: str | Iterable[str] | None = None,
    example: Any = None,
    converters: Converters | None = None,
) -> SanifyReport:
    """Replace the last layers of a discriminator by SAN twins, in place; D computes the same. Returns what changed.

    Call it once D has its weights, before its optimizer, EMA copy, DistributedDataParallel and torch.compile. D
    then returns `SANLogits` where it returned logits.

    names: the last layers, as in `D.named_modules()`. example: inputs for one run of D: a tensor, a tuple of
    positional or a dictionary of keyword arguments. With neither, the last layers are all linear and
    convolutional layers with one output unit, if D has no embedding. With an example they are found in the graph
    of a run: layers whose output reaches D's without passing another layer with parameters. An example also makes
    sure of the whole: D runs before and after, and its outputs and the way to every direction are compared. It
    leaves buffers, random state and gradients alone.

    converters: what to do with layers of your own, see `convert_layer`, which also says what is understood.

    Projection heads: name the embedding, and write `san.project(h, self.embed(y))` for the product in D's
    forward. A label vector from a mapping network needs that line only, and no call of `sanify` for it.

    Raises SanifyError, with the reason and D unchanged, when the last layers cannot be told or have no twin.

    >>> D = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    >>> report = sanify(D)
    >>> [layer.name for layer in report.replaced], D[2]
    (['2'], SANLinear(8, 1, input_bias=True))
    """
    _refuse_wrapped(D)
    args, kwargs = _unpack(example)
    converters = converters or {}
    if names is not None:
        chosen = _check_names(D, names)
    elif example is None:
        chosen = guess_last_layers(D, converters)
    else:
        try:
            chosen = trace_last_layers(D, args, kwargs)
        except TypeError as error:  # an edited projection head adds SANLogits to the plain head's logits
            raise SanifyError(f"{type(D).__name__} does not run on the example: {error}; {HINT}") from error
    before = None if example is None else run(D, args, kwargs)
    twins, replaced = build_twins(D, chosen, converters)
    originals = replace_(D, twins)
    if before is not None:
        try:
            check_whole(D, before, args, kwargs, twins)
        except BaseException:
            replace_(D, originals)
            raise
    return SanifyReport(tuple(replaced))


def build_twins(
    D: nn.Module, names: list[str], converters: Converters
) -> tuple[dict[str, nn.Module], list[ReplacedLayer]]:
    """Twins by name, and a line of the report for each. D is not touched."""
    twins: dict[str, nn.Module] = {}
    replaced = []
    for name in names:
        layer = D.get_submodule(name)
        try:
            _refuse_shared_parameters(D, name, layer)
            twin, difference = make_twin(layer, converters)
        except SanifyError as error:
            raise SanifyError(
                f"cannot make {name!r} ({type(layer).__name__}) a SAN layer: {error}"
            ) from error
        aliases = [n for n, m in D.named_modules(remove_duplicate=False) if m is layer]
        twins.update(dict.fromkeys(aliases, twin))
        weight = find_san_layer(twin).weight
        was = f"{type(layer).__name__}{'' if getattr(layer, 'bias', None) is None else ' with bias'}"
        now = (
            " + ".join(type(m).__name__ for m in twin)
            if isinstance(twin, nn.Sequential)
            else type(twin).__name__
        )
        replaced.append(ReplacedLayer(name, was, now, len(weight), weight[0].numel(), difference))
    return twins, replaced


def replace_(D: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in by name; returns the former ones."""
    former = {name: D.get_submodule(name) for name in modules}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(D.get_submodule(parent), child, module)
    return former


@torch.no_grad()
def run(D: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """D's outputs on the example, the fun view of SANLogits. D is left as it was."""
    with preserved_state(D):
        return _values(list_outputs(D(*args, **kwargs)))


def check_whole(
    D: nn.Module,
    before: list[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    twins: Mapping[str, nn.Module],
) -> None:
    """D's outputs are what they were, and the dir views of its logits lead to every new direction."""
    with preserved_state(D), torch.enable_grad():
        for parameter in D.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            outputs = list(list_outputs(D(*args, **kwargs)))
        except TypeError as error:
            raise SanifyError(
                f"the forward of {type(D).__name__} does not take SANLogits: {error}"
            ) from error
        _compare(before, _values(outputs))
        directions = [find_san_layer(twin).weight for twin in twins.values()]
        views = [output.dir.float().sum() for output in outputs if isinstance(output, SANLogits)]
        is_led = bool(views) and sum(views).requires_grad
        grads = torch.autograd.grad(sum(views), directions, allow_unused=True) if is_led else [None]
    lost = [name for name, grad in zip(twins, grads, strict=False) if grad is None]
    if lost:
        raise SanifyError(
            f"the direction of {lost[0]!r} does not reach D's output: D must return the SANLogits as they are, "
            "not .fun, and must not run in torch.no_grad() or a reentrant checkpoint"
        )


def _values(outputs: Iterable[Tensor | SANLogits]) -> list[Tensor]:
    return [output.fun if isinstance(output, SANLogits) else output for output in outputs]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    is_same = [a.shape for a in after] == [b.shape for b in before]
    if is_same:
        for a, b in zip(after, before, strict=True):
            size = b.double().abs().max().clamp_min(1e-12) if b.numel() else 1.0
            tolerance = 5e-2 if b.dtype in (torch.float16, torch.bfloat16) else 2e-3  # 1e-3 is TF32
            is_same &= b.numel() == 0 or bool((a.double() - b.double()).abs().max() <= tolerance * size)
    if not is_same:
        raise SanifyError(
            "D's outputs on the example changed with its last layers: either D reaches the old layers in another "
            "way than as submodules, or it draws random numbers outside of torch (then pass names, no example)"
        )


def find_san_layer(twin: nn.Module) -> SANLayer:
    """The SAN layer of a twin, which may stand behind a padding layer."""
    return next(m for m in twin.modules() if isinstance(m, SANLayer))


def _unpack(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _check_names(D: nn.Module, names: str | Iterable[str]) -> list[str]:
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    known = dict(D.named_modules(remove_duplicate=False))
    if not chosen:
        raise SanifyError("names is empty: name at least one layer, or leave it out")
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or list(list_layers(D))[-3:]
            raise SanifyError(f"{type(D).__name__} has no module {name!r}; there are {', '.join(close)}")
    return chosen


def _refuse_wrapped(D: nn.Module) -> None:
    is_parallel = isinstance(D, nn.parallel.DistributedDataParallel | nn.DataParallel)
    if is_parallel or "_orig_mod" in dict(D.named_children()):
        raise SanifyError(f"D is a {type(D).__name__}: call sanify before wrapping or compiling it")


def _refuse_shared_parameters(D: nn.Module, name: str, layer: nn.Module) -> None:
    if layer is D:
        raise SanifyError("it is the whole of D, which cannot replace itself: use san.convert_layer(D)")
    own, inside = {id(p) for p in layer.parameters()}, set(layer.modules())
    for other, parameter in D.named_parameters(remove_duplicate=False):
        if id(parameter) in own and D.get_submodule(other.rpartition(".")[0]) not in inside:
            raise SanifyError(f"it shares a parameter with {other!r}, which would no longer follow it")
