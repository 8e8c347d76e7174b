# SPDX-License-Identifier: MIT
"""Which layers of a discriminator are its last ones: read from the autograd graph of one forward pass.

A layer is last when its output reaches the logits without passing another layer that has parameters. Without an
example input there is no graph, and the rule is: every layer with one output unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize

from san.logits import SANLogits
from san.preserve import preserved_state
from san.twins import PLAIN_TYPES, Converters, SanifyError, as_plain

HINT = "name the last layers with names=[...]"


def list_layers(D: nn.Module) -> dict[str, nn.Module]:
    """Name -> module that has parameters of its own and contains no other such module, in registration order."""
    owners = {}
    for name, module in D.named_modules():
        is_inside_norm = "parametrizations" in name.split(".")
        has_own = any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module)
        if has_own and not is_inside_norm:
            owners[name] = module
    parts = {name: name.split(".") if name else [] for name in owners}
    containers = {tuple(path[:i]) for path in parts.values() for i in range(len(path))}
    return {name: module for name, module in owners.items() if tuple(parts[name]) not in containers}


def guess_last_layers(D: nn.Module, converters: Converters) -> list[str]:
    """Every linear or convolutional layer with one output unit; nothing is guessed next to an embedding."""
    layers = list_layers(D)
    single, embeddings = [], []
    for name, layer in layers.items():
        with preserved_state(layer), parametrize.cached():
            try:
                plain = as_plain(layer, converters)
            except SanifyError:
                continue
            if isinstance(plain, nn.Embedding):
                embeddings.append(name)
            elif isinstance(plain, PLAIN_TYPES) and plain.weight.shape[0] == 1:
                single.append(name)
    if single and not embeddings:
        return single
    found = ", ".join(single + embeddings) or f"none; the last layer registered is {list(layers)[-1:]}"
    reason = "an embedding may belong to a projection head" if embeddings else "no layer has one output unit"
    raise SanifyError(
        f"cannot tell the last layers of {type(D).__name__} without an example: {reason} (candidates: {found}); "
        f"pass example=(inputs of D) or {HINT}"
    )


def trace_last_layers(D: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the layers that D's outputs come from, by running D once. D is left as it was."""
    nodes: dict[Node, str] = {}
    layers = list_layers(D)

    def record(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            nodes.update((t.grad_fn, name) for t in list_tensors(output) if t.grad_fn is not None)

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        with preserved_state(D), torch.enable_grad():
            for parameter in D.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            outputs = list_tensors(D(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    names = {id(p): name for name, p in D.named_parameters()}
    return select_last([t.grad_fn for t in outputs if t.grad_fn is not None], nodes, list(layers), names)


def select_last(
    outputs: list[Node], nodes: Mapping[Node, str], order: list[str], parameter_names: Mapping[int, str]
) -> list[str]:
    """Layers reached from the outputs without passing another, less those whose output feeds one of them."""
    reached = walk(outputs, stop=nodes)
    last = {nodes[node] for node in reached if node in nodes}
    ends = [node for node, name in nodes.items() if name in last]
    before = walk([n for node in ends for n, _ in node.next_functions if n is not None], stop=())
    last -= {nodes[node] for node in before if node in nodes}
    after = [v for v in (getattr(node, "variable", None) for node in reached - before) if v is not None]
    loose = sorted(parameter_names[id(v)] for v in after if id(v) in parameter_names)
    if loose:
        raise SanifyError(
            f"parameter {loose[0]!r} acts on the output outside of a layer's forward, after the layers "
            f"{sorted(last)}: end D in a layer, or {HINT}"
        )
    if not last:
        raise SanifyError(f"no layer with parameters was found on the way to D's outputs: {HINT}")
    return [name for name in order if name in last]


def walk(starts: Iterable[Node], stop: Iterable[Node]) -> set[Node]:
    """Nodes of the graph from `starts` backwards; those in `stop` are reached but not passed."""
    stop, seen, todo = set(stop), set(), list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node not in stop:
                todo += [n for n, _ in node.next_functions if n is not None]
    return seen


def list_tensors(output: Any) -> list[Tensor]:
    """As `list_outputs`, with SANLogits taken apart."""
    views = [(o.fun, o.dir) if isinstance(o, SANLogits) else (o,) for o in list_outputs(output)]
    return [tensor for pair in views for tensor in pair]


def list_outputs(output: Any) -> Iterator[Tensor | SANLogits]:
    """Floating-point tensors and SANLogits in nested lists, tuples, dictionaries and dataclasses."""
    parts: Iterable[Any] = ()
    if isinstance(output, SANLogits) or (isinstance(output, Tensor) and output.is_floating_point()):
        yield output
    elif isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, list | tuple):
        parts = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = (getattr(output, field.name) for field in dataclasses.fields(output))
    for part in parts:
        yield from list_outputs(part)
