# SPDX-License-Identifier: MIT
"""The generator: mapping network and synthesis network behind one call.

Parameter names, shapes and order equal those of StyleGAN-XL, so that official weights load unchanged.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.config import GeneratorConfig
from training.generator.mapping import MappingNetwork
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
        self.img_resolution = cfg.synthesis.img_resolution
        self.img_channels = cfg.synthesis.img_channels
        # Synthesis first: the official parameter order.
        self.synthesis = SynthesisNetwork(cfg.synthesis, self.w_dim)
        self.num_ws = self.synthesis.num_ws
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
