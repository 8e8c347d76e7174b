# SPDX-License-Identifier: MIT
"""Mapping network of StyleGAN-XL: a latent and a class to style vectors (arXiv:2202.00273, section 3.1).

The class enters through a table of pretrained image features, one row per class, that is projected to the
latent's width and normalised like it. Truncation and its running mean of w (one per class) live here too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_utils.errors import UserError
from torch_utils.layers import FullyConnectedLayer
from training.config import ConfigError, MappingConfig


def labels_to_ids(c: Tensor | None, c_dim: int, batch_size: int) -> Tensor | None:
    """Class ids, int64 (N,), from one-hot rows (N, c_dim) or integer ids (N,); None if `c_dim` is 0.

    Rows are read by their largest entry. Raises UserError if classes are missing, of the wrong shape or
    dtype, out of range (this check waits for the device; one-hot rows need none), or given to an
    unconditional network.
    """
    if c_dim == 0:
        if c is not None and not (c.ndim == 2 and c.shape[1] == 0):
            raise UserError(f"classes of shape {tuple(c.shape)} given to an unconditional network; pass None")
        return None
    if c is None:
        raise UserError(
            f"this network is conditional on {c_dim} classes and got none; pass class ids or one-hot rows"
        )
    if c.ndim == 2 and c.shape[1] != c_dim:
        raise UserError(
            f"one-hot classes of width {c.shape[1]} given to a network with {c_dim} classes; use that width"
        )
    if c.ndim not in (1, 2) or c.shape[0] != batch_size:
        raise UserError(
            f"classes of shape {tuple(c.shape)} do not fit {batch_size} latents; "
            f"pass ids ({batch_size},) or one-hot rows ({batch_size}, {c_dim})"
        )
    if c.ndim == 2:
        return c.float().argmax(dim=1)
    if c.is_floating_point() or c.is_complex() or c.dtype == torch.bool:
        raise UserError(f"class ids of dtype {c.dtype} are not integers; pass int64, or one-hot rows")
    ids = c.long()
    is_outside = (ids < 0) | (ids >= c_dim)
    if is_outside.any():
        first_outside = int(ids[is_outside][0])
        raise UserError(f"class {first_outside} is outside 0...{c_dim - 1}; this network has {c_dim} classes")
    return ids


def normalize_second_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """`x` (N, features) scaled to a mean square of one per row."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class MappingNetwork(nn.Module):
    """Latents (N, z_dim) and classes to style vectors (N, num_ws, w_dim), float32.

    The class table `embed` is a parameter like any other, and present in unconditional networks too, as in
    the official weights. Raises ConfigError if it has fewer rows than there are classes.
    """

    def __init__(self, cfg: MappingConfig, num_ws: int) -> None:
        super().__init__()
        if cfg.c_dim > cfg.num_embeddings:
            raise ConfigError(
                f"c_dim={cfg.c_dim} classes need as many rows of class embeddings, and num_embeddings="
                f"{cfg.num_embeddings}; set num_embeddings to at least {cfg.c_dim}"
            )
        if cfg.num_layers < 1:
            raise ConfigError(f"num_layers={cfg.num_layers} of the mapping network must be at least 1; use 2")
        self.cfg = cfg
        self.num_ws = num_ws
        self.embed = nn.Embedding(cfg.num_embeddings, cfg.embedding_dim)
        if cfg.c_dim > 0:
            self.embed_proj = FullyConnectedLayer(cfg.embedding_dim, cfg.z_dim, activation="lrelu")
        in_features = cfg.z_dim * (2 if cfg.c_dim > 0 else 1)
        self._layer_names = [f"fc{index}" for index in range(cfg.num_layers)]  # names of the official weights
        for name in self._layer_names:
            layer = FullyConnectedLayer(
                in_features, cfg.w_dim, activation="lrelu", lr_multiplier=cfg.lr_multiplier
            )
            self.add_module(name, layer)
            in_features = cfg.w_dim
        self.register_buffer("w_avg", torch.zeros([cfg.c_dim, cfg.w_dim] if cfg.c_dim > 0 else [cfg.w_dim]))

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Style vectors, of each image the first `truncation_cutoff` (None = all) pulled to the mean by psi.

        z: (N, z_dim); c: one-hot (N, c_dim), ids (N,) or None. `update_emas` moves the running mean of w
        first, with the vectors before truncation; training does so once per step (`update_w_avg_`). Raises
        UserError for classes that do not fit (see `labels_to_ids`).
        """
        if z.ndim != 2 or z.shape[1] != self.cfg.z_dim:
            raise ValueError(
                f"z of shape {tuple(z.shape)} is not (N, {self.cfg.z_dim}); pass latents of that width"
            )
        if truncation_cutoff is not None and truncation_cutoff < 0:
            raise ValueError(
                f"truncation_cutoff={truncation_cutoff} is negative; pass 0...{self.num_ws} or None"
            )
        ids = labels_to_ids(c, self.cfg.c_dim, len(z))
        w = self.map_ids(z, ids)
        if update_emas:
            self.update_w_avg_(w, ids)
        if truncation_psi == 1:
            return w.unsqueeze(1).repeat(1, self.num_ws, 1)
        mean = self.w_avg if ids is None else self.w_avg[ids]
        truncated = mean + (w - mean) * truncation_psi
        num_truncated = self.num_ws if truncation_cutoff is None else min(truncation_cutoff, self.num_ws)
        parts = [truncated] * num_truncated + [w] * (self.num_ws - num_truncated)
        return torch.stack(parts, dim=1)  # (N, num_ws, w_dim)

    def map_ids(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """One style vector per image, (N, w_dim), without truncation; ids: int64 (N,), known to be classes.

        They are not looked at, so this does not wait for the device, as `forward` does.
        """
        x = normalize_second_moment(z.float())
        if ids is not None:
            y = self.embed_proj(self.embed(ids))
            x = torch.cat([x, normalize_second_moment(y)], dim=1)
        for name in self._layer_names:
            x = self.get_submodule(name)(x)
        return x

    @torch.no_grad()
    def update_w_avg_(self, w: Tensor, ids: Tensor | None, num_moves: float = 1) -> None:
        """Move the running mean of w towards a batch: a class's mean once per sample of it, in the batch's order.

        w: (N, w_dim); ids: int64 (N,). Without classes (ids None) the mean moves `num_moves` times to the batch's.
        """
        beta = self.cfg.w_avg_beta
        if ids is None:
            self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, beta**num_moves))
            return
        # Closed form of the sequential update: a sample decays once for each later one of its class.
        is_same = ids.unsqueeze(0) == ids.unsqueeze(1)  # (N, N)
        num_later = is_same.triu(diagonal=1).sum(dim=1)
        counts = torch.zeros(self.cfg.c_dim, device=w.device).index_add_(0, ids, torch.ones_like(w[:, 0]))
        steps = w * ((1 - beta) * beta**num_later).unsqueeze(1)
        self.w_avg.mul_((beta**counts).unsqueeze(1)).index_add_(0, ids, steps)
