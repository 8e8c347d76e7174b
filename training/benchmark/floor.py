# SPDX-License-Identifier: MIT
"""The least time that a training iteration can take here: its arithmetic and its traffic over what the machine does.

Counted on the meta device, without computing anything: convolutions and matrix products by torch's FlopCounterMode,
each of which reads its operands once and writes its result once; all else is taken to be fused into them. The filters
of G are counted by their taps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.benchmark.measure import Machine, set_up, synchronize
from training.config import TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.generator import Generator
from training.generator.reach import reached_paddings
from training.generator.synthesis import SynthesisLayer
from training.loss import GuidanceClassifier
from training.superres import freeze_stem_

ITEM_BYTES = 4  # of a float32
ADAM_PASSES = 7  # over the weights: four tensors are read and three written
EMA_PASSES = 3  # two and one
MATRIX_SIDE, COPY_BYTES, TRIALS = 2048, 2**28, 5  # for the ceilings
NEGLIGIBLE = 1e-6  # singular values of a filter, relative to the largest
_OPERATORS = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip


@dataclass
class Work:
    """What something needs, in one kind of number."""

    flops: float = 0.0  # additions and multiplications
    bytes: float = 0.0  # from and to memory

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine reaches at best."""

    flops_per_s: float  # of a large matrix product in float32
    half_flops_per_s: float  # in float16 on CUDA; on a CPU that of float32
    bytes_per_s: float  # of a large copy, reads and writes together


@dataclass(frozen=True)
class PhaseWork:
    """Work of a phase of an iteration."""

    full: Work  # in float32
    half: Work  # in float16

    def seconds(self, ceilings: Ceilings) -> float:
        """Least time: arithmetic or traffic, whichever takes longer, as the two overlap at best."""
        arithmetic = self.full.flops / ceilings.flops_per_s + self.half.flops / ceilings.half_flops_per_s
        return max(arithmetic, (self.full.bytes + self.half.bytes) / ceilings.bytes_per_s)


@contextmanager
def counting() -> Iterator[Work]:
    """Work of the convolutions and matrix products inside, filled in at the end."""
    work = Work()
    operators = [getattr(torch.ops.aten, name) for name in _OPERATORS if hasattr(torch.ops.aten, name)]
    traffic = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(operators, _count_bytes))
    arithmetic = FlopCounterMode(display=False)
    with arithmetic, traffic:
        yield work
    work.flops, work.bytes = float(arithmetic.get_total_flops()), float(traffic.get_total_flops())


def _count_bytes(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Bytes of all tensors of an operator, given by their shapes, as FlopCounterMode calls its formulas."""
    outputs = [out_shape] if isinstance(out_shape, torch.Size) else list(out_shape or ())
    return ITEM_BYTES * sum(s.numel() for s in [*shapes, *outputs] if isinstance(s, torch.Size))


def iteration_work(config: TrainConfig, device_type: str) -> dict[str, PhaseWork]:
    """Work of each phase of `phases.PHASES` but the data, for a batch of `config`."""
    with torch.device("meta"):
        G = Generator(config.generator)  # its filters are designed on the CPU, and stay there
        D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
        guidance = GuidanceClassifier.random() if config.loss_terms.cls_weight else None
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    num_images, terms = config.batch_size, config.loss_terms
    forward, backward = generator_work(G, num_images, device_type)
    D_judged, D_trained = discriminator_work(D, guidance, config)
    G_weights = count_numbers(p for p in G.parameters() if p.requires_grad)
    phases = {
        "G forward": forward,
        "G through D": PhaseWork(D_judged, Work()),
        "G backward": backward,
        "optimizer of G": memory_work(ADAM_PASSES * G_weights),
        "G for D": forward,
        "D fake": PhaseWork(D_trained, Work()),
        "D real": PhaseWork(D_trained, Work()),
        "optimizer of D": memory_work(ADAM_PASSES * count_numbers(D.trainable_parameters())),
        "EMA": memory_work(EMA_PASSES * count_numbers(G.parameters())),
    }
    interval = config.generator_optimizer.reg_interval
    if terms.pl_weight > 0 and interval > 0:
        # Forward, gradient, and the way back through both, on a part of the batch; then the optimizer.
        share = max(num_images // terms.pl_batch_shrink, 1) / num_images / interval
        full = (forward.full + backward.full) * (2 * share) + phases["optimizer of G"].full * (1 / interval)
        phases["path length"] = PhaseWork(full, (forward.half + backward.half) * (2 * share))
    return phases


def generator_work(G: Generator, num_images: int, device_type: str) -> tuple[PhaseWork, PhaseWork]:
    """Work of a forward and of a backward pass."""
    works = {(is_half, is_back): Work() for is_half in (False, True) for is_back in (False, True)}
    with torch.device("meta"):
        w, source = torch.zeros(num_images, G.w_dim), G.synthesis.input
        has_nodes = device_type == "cpu" and source.is_determined_by_nodes()
        interpolation = source.interpolation if has_nodes else None
        x, works[False, False], works[False, True] = count_both_ways(
            lambda: source.at_nodes(w) if has_nodes else source(w)
        )
        needs_grad, size = x.requires_grad, x.shape[2]
        paddings = reached_paddings(G.synthesis.plan.layers)
        for layer, padding in zip(G.synthesis.layers, paddings, strict=True):
            is_half = layer.plan.use_fp16 and device_type == "cuda"
            x = torch.zeros(num_images, layer.plan.source.channels, size, size).requires_grad_(needs_grad)
            y, forward, backward = count_both_ways(
                lambda layer=layer, x=x, nodes=interpolation: layer.convolve(
                    x, layer.affine(w), torch.float32, nodes
                )
            )
            interpolation, needs_grad = None, y.requires_grad
            size, filters = filter_work(layer, y, padding[0] + padding[1])
            item = 0.5 if is_half else 1.0
            for is_back, found in (
                (False, forward + filters),
                (True, backward + filters * float(needs_grad)),
            ):
                works[is_half, is_back] += Work(found.flops, found.bytes * item)
    forward, backward = (PhaseWork(works[False, b], works[True, b]) for b in (False, True))
    return forward, backward


def count_both_ways(run: Callable[[], Tensor]) -> tuple[Tensor, Work, Work]:
    """What something gives, its work, and that of the gradient of all that has one."""
    with counting() as forward:
        y = run()
    backward = Work()
    if y.requires_grad:
        with counting() as backward:
            y.sum().backward()
    return y, forward, backward


def filter_work(layer: SynthesisLayer, x: Tensor, padding: int) -> tuple[int, Work]:
    """Side of the output of a layer's filtered leaky ReLU on x (N, C, size, size), and its work.

    padding: before and after, in sum. The work is that of the filters' taps, and moving input and output once. A radial
    filter is a sum of separable ones or a square of taps, whichever is less.
    """
    plan, size, maps = layer.plan, x.shape[2], x.shape[0] * x.shape[1]
    full = size * plan.up_factor + padding - (plan.up_taps - 1)  # side while up-sampled
    out = (full - plan.down_taps) // plan.down_factor + 1
    up_taps = plan.up_taps / plan.up_factor  # others meet inserted zeros
    macs = (size * full + full * full) * up_taps if plan.up_taps > 1 else 0.0
    if plan.down_taps > 1:
        separable = (full * out + out * out) * plan.down_taps
        down = layer.down_filter
        if down.ndim == 2:
            singular = torch.linalg.svdvals(down.double())
            rank = int((singular > NEGLIGIBLE * singular[0]).sum())
            separable = min(separable * rank, out * out * plan.down_taps**2)
        macs += separable
    return out, Work(2.0 * maps * macs, float(ITEM_BYTES * maps * (size * size + out * out)))


def discriminator_work(
    D: ProjectedDiscriminator, guidance: nn.Module | None, config: TrainConfig
) -> tuple[Work, Work]:
    """Work of a pass whose gradient goes to the images, guidance included, and of one for the heads' gradient."""
    num_images, size = config.batch_size, config.generator.img_resolution
    with torch.device("meta"):
        images = torch.zeros(num_images, 3, size, size)
        labels = torch.zeros(num_images, dtype=torch.int64)

        def run(x: Tensor) -> None:
            sum(logits.fun.sum() + logits.dir.sum() for logits in D(x, labels).values()).backward()
            if guidance is not None and x.requires_grad:
                guidance(x).sum().backward()

        D.set_trainable_(False)
        judged = _count(lambda: run(images.clone().requires_grad_()))
        D.set_trainable_(True)
        trained = _count(lambda: run(images))
    return judged, trained


def _count(run: Callable[[], None]) -> Work:
    with counting() as work:
        run()
    return work


def memory_work(num_numbers: float) -> PhaseWork:
    """Traffic alone."""
    return PhaseWork(Work(0.0, ITEM_BYTES * num_numbers), Work())


def count_numbers(tensors: Iterator[Tensor]) -> int:
    """Numbers in all tensors."""
    return sum(t.numel() for t in tensors)


def measure_ceilings(config: TrainConfig, machine: Machine) -> Ceilings:
    """The best of a few large matrix products and copies."""
    device = set_up(machine, config, "ours")
    x = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    flops = 2 * MATRIX_SIDE**3
    full = flops / _best_seconds(lambda: x @ x)
    half = full
    if device.type == "cuda":
        y = x.half()
        half = flops / _best_seconds(lambda: y @ y)
    source = torch.zeros(COPY_BYTES // ITEM_BYTES, device=device)
    target = torch.ones_like(source)
    copied = 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source))
    return Ceilings(flops_per_s=full, half_flops_per_s=half, bytes_per_s=copied)


def _best_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIALS + 1):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
