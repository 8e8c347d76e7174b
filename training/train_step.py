# SPDX-License-Identifier: MIT
"""The three updates of a training iteration: generator_step, path_length_step, discriminator_step. Start reading here.

Each accumulates gradients over micro-batches, averages them over processes and makes one optimizer step. A mean over
the batch is the mean of its parts' means, and random numbers belong to samples (`Batch.draws`), so neither
`--batch-gpu` nor the number of processes changes the gradient. A step waits for the device once, in `apply_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import san
from torch_utils.distributed import average_gradients_, gather_samples, mean_over_processes, world_size
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.discriminator.kinds import AnyDiscriminator
from training.generator.generator import Generator
from training.generator.kinds import AnyGenerator
from training.health import GradientNorms, Health, Step
from training.loss import PAPER_MICROBATCH_SIZE, AdversarialLoss, path_length_penalty, path_lengths

__all__ = [
    "Batch",
    "StepContext",
    "apply_gradients",
    "discriminator_step",
    "generator_step",
    "mix_styles",
    "path_length_step",
]

PAPER_PASS_SIZE = 8 * PAPER_MICROBATCH_SIZE  # published: 8 GPUs, and a move of running means per pass


@dataclass
class StepContext:
    """What all steps share: configuration, loss, statistics, and the clock."""

    config: TrainConfig
    loss: AdversarialLoss
    stats: StatsCollector
    cur_nimg: int = 0  # real images seen before this iteration
    cur_iteration: int = 0  # iterations finished before this one
    warn: Callable[[str], None] = print  # tells the user about a skipped step
    health: Health = field(default_factory=Health)  # counts gradients that are not finite


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
    apply_gradients(G, optimizer, context, "G")


def path_length_step(
    G: Generator, optimizer: Optimizer, batch: Batch, pl_mean: Tensor, context: StepContext
) -> Tensor:
    """One update of G towards equal path lengths; returns the new running mean.

    The penalty needs the mean length of the whole batch, so more than one micro-batch is measured before.
    """
    terms = context.config.loss_terms
    optimizer.zero_grad(set_to_none=True)
    shrink = terms.pl_batch_shrink
    batch = batch[: max(len(batch) // shrink, 1)]  # of all processes: the first part of the common batch
    microbatches = batch.split(max(context.config.microbatch_size // shrink, 1))
    batch_mean = None
    if len(microbatches) > 1:
        lengths = torch.cat([measure_path_lengths(G, mb, keeps_graph=False) for mb in microbatches])
        batch_mean = mean_over_processes(lengths.mean())
    for mb in microbatches:
        lengths = measure_path_lengths(G, mb, keeps_graph=True)
        if batch_mean is None:
            batch_mean = mean_over_processes(lengths.mean())
        penalty = path_length_penalty(lengths, batch_mean, pl_mean, terms.pl_decay)
        loss = terms.pl_weight * penalty.mean()
        context.stats.report("Loss/pl_penalty", penalty)
        context.stats.report("Loss/G/reg", loss)
        (loss * (len(mb) / len(batch) / PAPER_MICROBATCH_SIZE)).backward()
    apply_gradients(G, optimizer, context, "path_length")
    moved = pl_mean.lerp(batch_mean, 1 - (1 - terms.pl_decay) ** moves_per_step(context.config))
    return torch.where(moved.isfinite(), moved, pl_mean)  # a step that is not finite was skipped


def measure_path_lengths(G: Generator, batch: Batch, keeps_graph: bool) -> Tensor:
    """Path lengths (N,) of the batch's latents."""
    ws = G.styles_of(batch.z, batch.fake_labels)
    images = G.synthesis(ws)
    noise = batch.draws.normal("noise", *images.shape[1:])
    return path_lengths(images, ws, noise / (images.shape[2] * images.shape[3]) ** 0.5, keeps_graph)


def discriminator_step(
    G: AnyGenerator, D: AnyDiscriminator, optimizer: Optimizer, batch: Batch, context: StepContext
) -> None:
    """One update of what is trained in D; G receives no gradient, but its running mean of w moves.

    Fake and real images pass D apart: its BatchNorm layers must not see them as one batch, or D wins at once.
    """
    D.set_trainable_(True)
    optimizer.zero_grad(set_to_none=True)
    microbatches, styles = batch.split(context.config.microbatch_size), []
    for mb in microbatches:
        with torch.no_grad():
            ws = G.styles_of(mb.z, mb.fake_labels)
            fake_images = G.synthesis(ws)
        styles.append(ws[:, 0])
        parts = []
        for loss in context.loss.discriminator_losses(D, fake_images, mb, context.cur_nimg, context.stats):
            (loss / len(microbatches)).backward()
            parts.append(loss.detach())
        context.stats.report("Loss/D/loss", sum(parts))
    D.set_trainable_(False)
    update_style_average_(G, torch.cat(styles), batch, context.config)
    apply_gradients(D, optimizer, context, "D")
    context.loss.finish_step_(D, context.stats)
    san.normalize_directions_(D)
    if context.loss.directions is not None:
        context.loss.directions.finish_step(context.stats)


def mix_styles(G: AnyGenerator, batch: Batch, probability: float) -> Tensor:
    """Style vectors (N, num_ws, w_dim); each image's layers after a random one take a second latent's style.

    So they do with `probability`, for each image apart.
    """
    ws = G.styles_of(batch.z, batch.fake_labels)
    if probability == 0:
        return ws
    draws = batch.draws.within("mixing")
    other_ws = G.styles_of(draws.normal("z", G.z_dim), batch.fake_labels)
    is_mixed = draws.uniform("chance") < probability  # (N,)
    crossovers = draws.integers("crossover", 1, G.num_ws)  # (N,): the first layer of the second latent
    layers = torch.arange(G.num_ws, device=ws.device)
    takes_other = is_mixed[:, None] & (layers >= crossovers[:, None])  # (N, num_ws)
    return torch.where(takes_other.unsqueeze(2), other_ws, ws)


def update_style_average_(G: AnyGenerator, w: Tensor, batch: Batch, config: TrainConfig) -> None:
    """Move G's running mean of w, if it has one, towards w (N, w_dim) of the batches of all processes."""
    labels = None if batch.fake_labels is None else gather_samples(batch.fake_labels)
    G.update_w_avg_(gather_samples(w), labels, moves_per_step(config))


def moves_per_step(config: TrainConfig) -> float:
    """How often a published run would move a running mean in a step of so many images: at least once.

    Counted in images, so that the mean follows the training equally fast however a batch is divided.
    """
    return max(config.batch_size / PAPER_PASS_SIZE, 1.0)


def apply_gradients(network: nn.Module, optimizer: Optimizer, context: StepContext, step: Step) -> None:
    """Average gradients over processes and step, unless one is not finite: then skip the step and say which.

    Whether the run goes on is for `Health.enforce` to say, after the iteration. That it steps or not is decided here,
    on the host, so that a skipped step moves nothing, not even what the optimizer counts: the step's one wait.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.grad is not None]
    own = averaged = GradientNorms.of(named)
    if world_size() > 1:
        average_gradients_(p for _, p in named)
        averaged = GradientNorms.of(named)
    is_finite = bool(averaged.norms.isfinite().all())  # waits for the device
    context.stats.report(f"Health/nonfinite_{step}", averaged.norms.new_full((), float(not is_finite)))
    norm = torch.linalg.vector_norm(averaged.norms)
    context.stats.report(f"Health/gradient_norm_{step}", norm if is_finite else norm.new_empty(0))
    if is_finite:
        optimizer.step()
        context.stats.forget_recent()
        context.health.note_success(step)
    else:
        place = f"{context.cur_nimg / 1000:g} kimg (iteration {context.cur_iteration})"
        context.warn(context.health.note_fault(step, own, averaged, context.stats, place))
