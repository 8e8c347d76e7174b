# SPDX-License-Identifier: MIT
"""The three updates of a training iteration: generator_step, path_length_step, discriminator_step. Start reading here.

Each accumulates gradients over micro-batches, averages them over processes and makes one optimizer step. A mean over
the batch is the mean of the micro-batches' means, so `--batch-gpu` changes memory and speed, not the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import san
from torch_utils.distributed import average_gradients_
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.discriminator.kinds import AnyDiscriminator
from training.generator.generator import Generator
from training.generator.kinds import AnyGenerator
from training.loss import PAPER_MICROBATCH_SIZE, AdversarialLoss, path_length_penalty

__all__ = [
    "Batch",
    "StepContext",
    "apply_gradients",
    "discriminator_step",
    "generator_step",
    "mix_styles",
    "path_length_step",
]


@dataclass
class StepContext:
    """What all steps share: configuration, loss, statistics, and the clock."""

    config: TrainConfig
    loss: AdversarialLoss
    stats: StatsCollector
    cur_nimg: int = 0  # real images seen before this iteration
    warn: Callable[[str], None] = print  # tells the user about a skipped step


def generator_step(
    G: AnyGenerator, D: AnyDiscriminator, optimizer: Optimizer, batch: Batch, context: StepContext
) -> None:
    """One update of G; D receives no gradient."""
    optimizer.zero_grad(set_to_none=True)
    microbatches = batch.split(context.config.microbatch_size)
    for mb in microbatches:
        fake_images = G.synthesis(mix_styles(G, mb, context.config.loss_terms.style_mixing_prob))
        loss = context.loss.generator_loss(D, fake_images, mb, context.cur_nimg, context.stats)
        (loss / len(microbatches)).backward()
    apply_gradients(G, optimizer, context)


def path_length_step(
    G: Generator, optimizer: Optimizer, batch: Batch, pl_mean: Tensor, context: StepContext
) -> Tensor:
    """One update of G towards equal path lengths; returns the new running mean."""
    terms = context.config.loss_terms
    optimizer.zero_grad(set_to_none=True)
    microbatches = batch.split(context.config.microbatch_size)
    for mb in microbatches:
        num_samples = max(len(mb.z) // terms.pl_batch_shrink, 1)
        labels = None if mb.fake_labels is None else mb.fake_labels[:num_samples]
        ws = G.mapping(mb.z[:num_samples], labels)
        images = G.synthesis(ws)
        noise = torch.randn_like(images) / (images.shape[2] * images.shape[3]) ** 0.5
        penalty, pl_mean = path_length_penalty(images, ws, noise, pl_mean, terms.pl_decay)
        loss = terms.pl_weight * penalty.mean()
        context.stats.report("Loss/pl_penalty", penalty)
        context.stats.report("Loss/G/reg", loss)
        (loss / (PAPER_MICROBATCH_SIZE * len(microbatches))).backward()
    apply_gradients(G, optimizer, context)
    return pl_mean


def discriminator_step(
    G: AnyGenerator, D: AnyDiscriminator, optimizer: Optimizer, batch: Batch, context: StepContext
) -> None:
    """One update of what is trained in D; G receives no gradient, but its running mean of w moves.

    Fake and real images pass D apart: its BatchNorm layers must not see them as one batch, or D wins at once.
    """
    D.set_trainable_(True)
    optimizer.zero_grad(set_to_none=True)
    microbatches = batch.split(context.config.microbatch_size)
    for mb in microbatches:
        with torch.no_grad():
            ws = G.mapping(mb.z, mb.fake_labels, update_emas=True)
            fake_images = G.synthesis(ws)
        parts = []
        for loss in context.loss.discriminator_losses(D, fake_images, mb, context.cur_nimg, context.stats):
            (loss / len(microbatches)).backward()
            parts.append(loss.detach())
        context.stats.report("Loss/D/loss", sum(parts))
    D.set_trainable_(False)
    apply_gradients(D, optimizer, context)
    context.loss.finish_step_(D, context.stats)
    san.normalize_directions_(D)
    if context.loss.directions is not None:
        context.loss.directions.finish_step(context.stats)


def mix_styles(G: AnyGenerator, batch: Batch, probability: float) -> Tensor:
    """Style vectors (N, num_ws, w_dim); with `probability`, layers after a random one take a second latent's style."""
    ws = G.mapping(batch.z, batch.fake_labels)
    if probability > 0 and torch.rand(()).item() < probability:
        crossover = int(torch.randint(1, G.num_ws, ()).item())
        other_ws = G.mapping(torch.randn_like(batch.z), batch.fake_labels)
        ws = torch.cat([ws[:, :crossover], other_ws[:, crossover:]], dim=1)
    return ws


def apply_gradients(network: nn.Module, optimizer: Optimizer, context: StepContext) -> None:
    """Average gradients over processes and step, unless one is not finite: then skip the step and say which.

    The official code turns NaN into 0 and goes on, which hides the fault: docs/fidelity.md#non-finite-gradients.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.grad is not None]
    average_gradients_(p for _, p in named)
    is_finite = bool(torch.stack([p.grad.sum() for _, p in named]).isfinite().all())  # waits for the device
    kind = type(network).__name__
    context.stats.report(f"Gradients/{kind}/skipped_steps", float(not is_finite))
    if is_finite:
        optimizer.step()
    else:
        first = next((n for n, p in named if not p.grad.sum().isfinite()), "?")
        context.warn(
            f"Warning: {kind} got a gradient that is not finite (first: {first}); this step was skipped."
        )
