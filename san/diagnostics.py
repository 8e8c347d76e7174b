# SPDX-License-Identifier: MIT
"""SAN's three conditions, measured on the discriminator of a running training, head by head.

`SANDiagnostics` listens to the SAN layers while the discriminator sees real and generated samples, and turns what
they got into a dictionary of numbers. The formulas are those of `san.conditions` (SAN, arXiv:2301.12811).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from san.evidence import MEASURES, Evidence, list_collisions, measure_layer, weigh_classes, weigh_product
from san.layers import SANEmbedding, SANLayer, split_norms
from san.logits import SANLogits
from san.losses import AnyObjective
from san.objectives import OBJECTIVES, bind_potential, direction_weights
from san.trace import list_outputs

Side = Literal["real", "fake"]


@dataclass
class Recording:
    """What one recording hears. D's own runs are noted by themselves."""

    calls: list[tuple[str, Tensor, SANLogits]] = field(default_factory=list)  # layer, its input, its output
    inputs: list[Tensor] = field(default_factory=list)  # of D, per run
    outputs: list[SANLogits] = field(default_factory=list)  # of D, of all runs

    def note_run(self, inputs: Any, output: Any) -> None:
        """Note a run of D by another method than its forward. output: what holds the SANLogits."""
        self.inputs += list(list_outputs(inputs))[:1]
        self.outputs += [out for out in list_outputs(output) if isinstance(out, SANLogits)]


class SANDiagnostics:
    """Measures direction optimality, separability and injectivity at every SAN layer of a discriminator.

    Record a pass of real and one of generated samples, in the discriminator's own training step, and measure after
    the optimizer's step and the normalisation. Nothing is attached to D outside of a recording, and gradients,
    buffers and random numbers are left alone: training goes on as it would without.

    `measure()` returns `<measure>/<layer>` for each layer, and `<measure>` for the mean over layers:

    * cosine: between each direction and the optimal one, the normalised difference of r_J-weighted feature means;
      mean_difference: length of that difference, with any factor that D puts on the layer's logits; agreement:
      cosine between the optimal directions by one and by the other half of the samples alone. Where that is near
      0, the optimal direction is noise and the cosine says nothing.
    * in_order, separability_gap: fraction of quantiles in order, and (W1 - mean difference) / W1 of the slices,
      which is 0 when they are separable; slice_distance: W1.
    * collision: smallest over median ratio of feature distance to input distance, among pairs of real inputs. 0 is
      a collision. It can refute that the features are injective, and never show it. Inputs are compared as D gets
      them: noise or augmentation that D adds inside moves features apart, and so hides collisions.
    * drift_deg: angle between the directions at the recording and now, degrees; scale: of the layer.

    These are means over the directions of a layer; one with a negative scale counts reversed. Patches of a
    convolution count as samples. Embeddings: means over the classes that both sides showed, with features summed over
    the positions of a map. Weights are the plain r_J, or with `normalize_weights`, as of the losses, r_J over its mean
    in each output of D. slices are those of all samples, unweighted.

    Raises ValueError when D has no SAN layer.

    >>> from san import SANLinear
    >>> D = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), SANLinear(8, 1))
    >>> diagnostics = SANDiagnostics(D, OBJECTIVES["nonsaturating"])
    >>> with diagnostics.record("real"):
    ...     real = D(torch.randn(64, 2) + 1)
    >>> with diagnostics.record("fake"):
    ...     fake = D(torch.randn(64, 2))
    >>> list(diagnostics.measure())[:4]
    ['cosine', 'mean_difference', 'agreement', 'in_order']
    """

    def __init__(
        self, D: nn.Module, objective: AnyObjective = OBJECTIVES["hinge"], normalize_weights: bool = False
    ) -> None:
        self.D, self.objective, self.normalize_weights = D, objective, normalize_weights
        self.layers = {name or "D": m for name, m in D.named_modules() if isinstance(m, SANLayer)}
        if not self.layers:
            raise ValueError("SANDiagnostics found no SAN layer in D: call san.sanify(D) first")
        self.forget()

    @property
    def names(self) -> list[str]:
        """All that `measure()` can return; what there is no evidence for, e.g. no class on both sides, is left out."""
        return [*MEASURES, *(f"{measure}/{layer}" for layer in self.layers for measure in MEASURES)]

    def forget(self) -> None:
        """Drop what has been recorded."""
        self._evidence: dict[str, dict[str, Evidence]] = {"real": {}, "fake": {}}
        self._directions: dict[str, Tensor] = {}  # at the first recording
        self._real_outputs: list[SANLogits] | None = None
        self._waiting: list[Recording] = []  # fakes of a paired objective, which need the reals' logits

    @contextlib.contextmanager
    def record(self, side: Side) -> Iterator[Recording]:
        """Listen while D runs inside, on real or on generated samples only. May be repeated: micro-batches add up.

        D runs as in its training step, with gradients and trainable directions, and its backward pass comes later;
        for a paired objective after both recordings.

        Raises ValueError when D itself did not run, or ran without gradients; or for another side.
        """
        if side not in ("real", "fake"):
            raise ValueError(f"record({side!r}): a side is 'real' or 'fake'")
        heard = Recording()
        hooks = [(layer, _note_call(name, heard)) for name, layer in self.layers.items()]
        hooks.append((self.D, _note_run(heard)))
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()
        self._require_graph(side, heard)
        if side == "real":
            self._real_outputs = heard.outputs
            self._digest("real", heard)
        else:
            self._waiting.append(heard)
        if self._waiting and (self._real_outputs is not None or not self.objective.is_paired):
            for fake in self._waiting:
                self._digest("fake", fake)
            self._waiting, self._real_outputs = [], None  # the next fakes meet reals of their own micro-batch

    def measure(self) -> dict[str, float]:
        """Measures of everything recorded since the last call, which is forgotten now.

        Raises ValueError when a side has not been recorded.
        """
        real, fake = self._evidence["real"], self._evidence["fake"]
        if not (real and fake):
            raise ValueError(f"measure() needs a recording of {'fake' if real else 'real'} samples as well")
        both = [name for name in self.layers if name in real and name in fake]
        with torch.no_grad():
            per_layer = {
                name: measure_layer(self.layers[name], self._directions[name], real[name], fake[name])
                for name in both
            }
        self.forget()
        result = {}
        for measure in MEASURES:
            values = [measures[measure] for measures in per_layer.values() if measure in measures]
            if values:
                result[measure] = sum(values) / len(values)
        for name, measures in per_layer.items():
            result.update({f"{measure}/{name}": value for measure, value in measures.items()})
        return result

    def _require_graph(self, side: str, heard: Recording) -> None:
        if not (heard.calls and heard.outputs):
            raise ValueError(
                f"record({side!r}) heard nothing: run D itself inside, neither a copy nor compiled, and let it "
                "return its SANLogits"
            )
        if not any(out.dir.requires_grad for out in heard.outputs):
            raise ValueError(
                f"record({side!r}) heard a run without gradients: run D as in the discriminator's step, with grad "
                "enabled and its directions trainable"
            )

    def _digest(self, side: Side, heard: Recording) -> None:
        """Add the evidence of every call, its features weighted by the potential's slope at D's outputs."""
        views = [view.dir for _, _, view in heard.calls]
        with torch.enable_grad():
            slopes = _grad(sum(self._potential(i, out) for i, out in enumerate(heard.outputs)), views)
            units = _grad(sum(out.dir.sum() for out in heard.outputs), views)
        for (name, x, view), slope, unit in zip(heard.calls, slopes, units, strict=True):
            if slope is None:
                continue  # frozen, or its logits are not in the output
            layer, device = self.layers[name], view.device.type
            self._directions.setdefault(name, split_norms(layer.weight.detach().float())[0])
            with torch.no_grad(), torch.autocast(device, enabled=False):
                if isinstance(layer, SANEmbedding):
                    evidence, features = weigh_classes(layer, x, slope.float(), unit.float())
                else:
                    evidence, features = weigh_product(layer, x, slope, unit)
                if side == "real" and len(heard.inputs) == 1:
                    evidence.collisions = list_collisions(heard.inputs[0], features)
            if name in self._evidence[side]:
                self._evidence[side][name].add(evidence)
            else:
                self._evidence[side][name] = evidence

    def _potential(self, index: int, output: SANLogits) -> Tensor:
        reals = self._real_outputs[index].fun.float() if self.objective.is_paired else None
        directional = output.dir.float()
        if not self.normalize_weights:
            return bind_potential(self.objective, reals)(directional).sum()
        weights = direction_weights(self.objective, directional, reals)
        mean = weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
        return (weights / mean * directional).sum()


def _note_call(name: str, heard: Recording) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: SANLogits) -> None:
        heard.calls.append((name, (*args, *kwargs.values())[0], output))

    return hook


def _note_run(heard: Recording) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        heard.note_run((*args, *kwargs.values()), output)

    return hook


def _grad(total: Tensor, views: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients that leave the graph as it is, for the backward pass of the training step."""
    trained = [view for view in views if view.requires_grad]
    grads = iter(torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True))
    return tuple(next(grads) if view.requires_grad else None for view in views)
