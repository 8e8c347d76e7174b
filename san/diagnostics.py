# SPDX-License-Identifier: MIT
"""SAN's three conditions, measured on the discriminator of a running training, head by head.

`SANDiagnostics` listens to the SAN layers while the discriminator sees real and generated samples, and turns what
they got into a dictionary of numbers. The formulas are those of `san.conditions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from san.conditions import compare_slices, direction_angle, direction_cosine, expansion_ratios
from san.layers import SANEmbedding, SANLayer, split_norms
from san.logits import SANLogits
from san.losses import AnyObjective
from san.objectives import OBJECTIVES, PairedObjective, bind_potential
from san.trace import list_outputs

MAX_COMPARED = 32  # samples of a pass that are compared pair by pair, for collisions

Side = Literal["real", "fake"]


@dataclass
class _Pass:
    """What one recording heard: calls of the SAN layers, inputs and outputs of D."""

    calls: list[tuple[str, Tensor, SANLogits]] = field(default_factory=list)  # layer, its input, its output
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[SANLogits] = field(default_factory=list)


@dataclass
class _Evidence:
    """One side's share of a layer's measures; more calls add up."""

    features: Tensor  # (2, directions, ...): r_J-weighted features, summed over even and over odd samples
    counts: Tensor  # (2, directions): how many logits these are
    slices: list[Tensor] = field(default_factory=list)  # per call: projections on each direction
    labels: list[Tensor] = field(
        default_factory=list
    )  # per call of an embedding: which direction each is for
    collision: list[float] = field(default_factory=list)  # per call: smallest over median expansion ratio


class SANDiagnostics:
    """Measures direction optimality, separability and injectivity of every SAN layer in a discriminator.

    Record a pass of real and one of generated samples, in the discriminator's own training step, and measure after
    the optimizer's step and the normalisation. Nothing is attached to D outside of a recording, and no gradient,
    buffer or random number is touched, so that training goes on as it would without.

    `measure()` returns, as `<measure>/<layer>` for each layer and as `<measure>` for the mean over layers:

    * cosine: between each direction and the optimal one, the normalised difference of r_J-weighted feature means.
      mean_difference: length of that difference. agreement: cosine between the optimal directions by even and by
      odd samples alone; where it is near 0 the optimal direction is noise, and the cosine says little.
    * in_order, separability_gap: fraction of quantiles in order, and (W1 - mean difference) / W1 of the slices,
      0 if separable. slice_distance: W1 itself.
    * collision: smallest over median ratio of feature distance to input distance among pairs of real inputs, where
      0 is a collision. It can refute injectivity, and never show it. Left out if there are no two inputs.
    * drift_deg: angle between the directions at the recording and now. scale: the layer's scale, signed.

    Values are means over the directions of a layer. Patches of a convolution count as samples. An embedding's are
    means over the classes that both passes showed; its features are summed over the positions of a map.

    Raises ValueError when D has no SAN layer. `normalize_weights` of the losses is not followed: weights are plain.

    >>> D = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), SANLayerExample(8, 1))
    >>> diagnostics = SANDiagnostics(D, OBJECTIVES["nonsaturating"])
    >>> with diagnostics.record("real"):
    ...     real = D(torch.randn(64, 2) + 1)
    >>> with diagnostics.record("fake"):
    ...     fake = D(torch.randn(64, 2))
    >>> sorted(name for name in diagnostics.measure() if "/" not in name)  # doctest: +NORMALIZE_WHITESPACE
    ['agreement', 'collision', 'cosine', 'drift_deg', 'in_order', 'mean_difference', 'scale',
     'separability_gap', 'slice_distance']
    """

    def __init__(self, D: nn.Module, objective: AnyObjective = OBJECTIVES["hinge"]) -> None:
        self.D, self.objective = D, objective
        self.layers = {name or "D": m for name, m in D.named_modules() if isinstance(m, SANLayer)}
        if not self.layers:
            raise ValueError("SANDiagnostics found no SAN layer in D: call san.sanify(D) first")
        self.forget()

    def forget(self) -> None:
        """Drop what has been recorded."""
        self._evidence: dict[Side, dict[str, _Evidence]] = {"real": {}, "fake": {}}
        self._pending: list[_Pass] = []
        self._real_outputs: list[SANLogits] = []
        self._directions: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def record(self, side: Side) -> Iterator[None]:
        """Listen to the calls of D inside, all on real or all on generated samples. May be repeated: calls add up.

        D runs as in its training step: with gradients, its directions trainable, and before the backward pass.
        For a paired objective that pass comes after both recordings.

        Raises ValueError when D was not called, called without gradients, or when a side is unknown.
        """
        if side not in ("real", "fake"):
            raise ValueError(f"record({side!r}): a side is 'real' or 'fake'")
        heard = _Pass()
        handles = [m.register_forward_hook(_note_call(name, heard)) for name, m in self.layers.items()]
        handles.append(self.D.register_forward_hook(_note_pass(heard), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._digest(side, heard)

    def measure(self) -> dict[str, float]:
        """Measures of everything recorded since the last call, which is then forgotten.

        Raises ValueError when a side is missing.
        """
        missing = [side for side, layers in self._evidence.items() if not layers]
        if missing or self._pending:
            raise ValueError(f"measure() needs a recording of the {(missing or ['real'])[0]} samples as well")
        per_layer = {}
        for name in self.layers:
            if name in self._evidence["real"] and name in self._evidence["fake"]:
                per_layer[name] = self._measure_layer(name)
        self.forget()
        values: dict[str, list[float]] = {}
        for measures in per_layer.values():
            for measure, value in measures.items():
                values.setdefault(measure, []).append(value)
        result = {measure: sum(v) / len(v) for measure, v in values.items()}
        for name, measures in per_layer.items():
            result.update({f"{measure}/{name}": value for measure, value in measures.items()})
        return result

    def _digest(self, side: Side, heard: _Pass) -> None:
        """Reduce what was heard to evidence; fakes of a paired objective wait for the reals' logits."""
        if not heard.outputs or not heard.calls:
            raise ValueError(
                f"record({side!r}) heard nothing: call D itself inside, not compiled and not a copy; it must "
                "return its SANLogits"
            )
        if not any(out.dir.requires_grad for out in heard.outputs):
            raise ValueError(
                f"record({side!r}) needs gradients: run D as in the discriminator's step, with grad enabled and "
                "with trainable directions"
            )
        is_paired = isinstance(self.objective, PairedObjective)
        if side == "real":
            self._real_outputs = heard.outputs
        if is_paired and side == "fake" and not self._real_outputs:
            self._pending.append(heard)
            return
        self._weigh(side, heard)
        if side == "real":
            for waiting in self._pending:
                self._weigh("fake", waiting)
            self._pending = []

    def _weigh(self, side: Side, heard: _Pass) -> None:
        """Add the calls' features, weighted by the slope of the objective's potential at D's outputs."""
        views = [view.dir for _, _, view in heard.calls]
        with torch.enable_grad(), torch.autocast(views[0].device.type, enabled=False):
            potential = sum(self._potential(i, out) for i, out in enumerate(heard.outputs))
            weights = torch.autograd.grad(potential, views, retain_graph=True, allow_unused=True)
            is_pooled = any(isinstance(self.layers[name], SANEmbedding) for name, _, _ in heard.calls)
            total = sum(out.dir.sum() for out in heard.outputs) if is_pooled else None
            plain = (
                torch.autograd.grad(total, views, retain_graph=True, allow_unused=True)
                if is_pooled
                else weights
            )
        with torch.no_grad(), torch.autocast(views[0].device.type, enabled=False):
            for (name, x, _), weight, pooled in zip(heard.calls, weights, plain, strict=True):
                if weight is None:
                    raise ValueError(f"the logits of {name!r} do not reach D's output")
                layer = self.layers[name]
                self._directions.setdefault(name, split_norms(layer.weight.detach())[0].clone())
                if isinstance(layer, SANEmbedding):
                    evidence, features = _weigh_embedding(layer, x, weight.float(), pooled.float())
                else:
                    evidence, features = _weigh_product(layer, x.detach().float(), weight.float())
                if side == "real" and heard.inputs:
                    evidence.collision = _find_collision(heard.inputs[0], features)
                _merge(self._evidence[side], name, evidence)
