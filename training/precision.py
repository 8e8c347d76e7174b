# SPDX-License-Identifier: MIT
"""In which precision a run computes: whether its device can, and the networks told so.

A way to carry out training, not a part of a network: weights, gradients, optimizers and files are float32 in all of
them, and so are D's heads and the losses.
"""

from __future__ import annotations

import time

import torch

from training.config import ConfigError, TrainConfig
from training.discriminator.kinds import AnyDiscriminator
from training.generator.kinds import AnyGenerator

PRODUCT_SIDE, PRODUCT_TRIALS = 512, 4
TENSOR_CORES = (8, 0)  # compute capability of the first NVIDIA GPUs with TF32 and bfloat16, Ampere


def apply_precision_(G: AnyGenerator, D: AnyDiscriminator, config: TrainConfig, device: torch.device) -> None:
    """Make the networks of a run compute as its configuration says. Raises ConfigError if they cannot on the device."""
    check_precision(config, device)
    if not config.is_dcgan:
        G.synthesis.set_precision_(config.precision)
        D.set_feature_precision_(config.feature_precision)


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError unless the device can compute as the configuration says."""
    precision, features = config.precision, config.feature_precision
    if config.is_dcgan:
        for flag, value in (("--precision", precision), ("--feature-precision", features)):
            if value != "paper":
                raise ConfigError(
                    f"{flag} {value} has no effect: --cfg dcgan is float32 and has no frozen features; leave it out"
                )
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"--precision fp16 needs a CUDA GPU, and this run is on {device.type}; use --precision bf16, or paper, "
            "which is float32 here"
        )
    if precision == "bf16" and not has_bfloat16(device):
        raise ConfigError(
            f"--precision bf16: {name_of(device)} has no bfloat16; use --precision paper, which takes float16 on CUDA"
        )
    if features == "bf16" and not has_bfloat16(device):
        raise ConfigError(
            f"--feature-precision bf16: {name_of(device)} has no bfloat16; use --feature-precision paper"
        )
    if features == "tf32" and not has_tf32(device):
        raise ConfigError(
            f"--feature-precision tf32: {name_of(device)} has no TF32, which NVIDIA GPUs have from Ampere on; use "
            "--feature-precision paper"
        )


def precision_note(config: TrainConfig, device: torch.device) -> str | None:
    """A line for those who ask for bfloat16 on a CPU that multiplies it more slowly; None = nothing to say.

    Measured, in some ten milliseconds, as instruction sets do not tell: an Intel Xeon with AVX-512's bfloat16
    instructions and without AMX takes twice as long as in float32.
    """
    flags = {"--precision": config.precision, "--feature-precision": config.feature_precision}
    chosen = [f"{flag} bf16" for flag, value in flags.items() if value == "bf16"]
    if not chosen or device.type != "cpu":
        return None
    ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    if ratio <= 1:
        return None
    return (
        f"Note: {' and '.join(chosen)}: matrix products in bfloat16 take {ratio:.1f} times as long as in float32 on "
        "this processor; paper is faster on it."
    )


def product_seconds(dtype: torch.dtype) -> float:
    """Of a matrix product on the CPU, the best of a few."""
    x = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=dtype)
    times = []
    for _ in range(PRODUCT_TRIALS):
        start = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - start)
    return min(times)


def has_tf32(device: torch.device) -> bool:
    """Whether float32 products on the device can be rounded to TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES


def has_bfloat16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 work on the device; on CUDA, whether its hardware has them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= TENSOR_CORES
    try:
        x = torch.ones(1, 1, 2, 2, device=device, dtype=torch.bfloat16)
        return bool(torch.nn.functional.conv2d(x, x).item() == 4)
    except (RuntimeError, TypeError):  # older versions of Metal
        return False


def name_of(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"--device {device.type}"
