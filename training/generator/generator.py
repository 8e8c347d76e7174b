# SPDX-License-Identifier: MIT
"""The generator: mapping network and synthesis network behind one call, with or without super-resolution stages.

Parameter names, shapes and order equal those of StyleGAN-XL, so that official weights load unchanged.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.config import GeneratorConfig
from training.generator.mapping import MappingNetwork
from training.generator.network_plan import plan_network
from training.generator.synthesis import SynthesisNetwork


class Generator(nn.Module):
    """Latents and classes to images: `images = G(z, c)`.

    The trainer calls `mapping` and `synthesis` separately; attributes repeat the numbers that callers need.
    Raises ConfigError for a configuration that gives no network.
    """

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.z_dim = cfg.mapping.z_dim
        self.w_dim = cfg.mapping.w_dim
        self.c_dim = cfg.mapping.c_dim
        plan = plan_network(cfg)
        self.img_resolution = plan.img_resolution
        self.img_channels = plan.img_channels
        self.num_ws = plan.num_ws
        # The official parameter order: synthesis first in a stem, mapping first in a super-resolution network.
        if cfg.superres:
            self.mapping = MappingNetwork(cfg.mapping, self.num_ws)
        self.synthesis = SynthesisNetwork(plan, self.w_dim)
        if not cfg.superres:
            self.mapping = MappingNetwork(cfg.mapping, self.num_ws)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Images (N, img_channels, H, W), float32, nominally in [-1, 1] (not clamped).

        z: (N, z_dim); c: one-hot (N, c_dim), class ids (N,), or None if unconditional. `update_emas` moves
        the running means of w and of the layers' input magnitudes. Raises UserError for classes that do not
        fit.
        """
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.synthesis(ws, update_emas=update_emas)

    def styles_of(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """Style vectors (N, num_ws, w_dim) as `mapping` gives them, for training: nothing waits for the device.

        z: (N, z_dim); ids: int64 (N,), classes that are known to exist, or None if unconditional.
        """
        return self.mapping.map_ids(z, ids).unsqueeze(1).repeat(1, self.num_ws, 1)

    def update_w_avg_(self, w: Tensor, ids: Tensor | None, num_moves: float) -> None:
        """Move the running mean of w as `MappingNetwork.update_w_avg_` does."""
        self.mapping.update_w_avg_(w, ids, num_moves)
