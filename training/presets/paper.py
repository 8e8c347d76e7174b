# SPDX-License-Identifier: MIT
"""StyleSAN-XL's published runs (arXiv:2301.12811), one function per stage; the stage above starts from best_model.

All ran on 8 GPUs; kind and hours are not reported. The commands below make the same updates on one GPU, 8 images at a
time. FID is the authors' `fid50k_full`, reported for the last stages only. We have not run any of them to the end.
"""

from __future__ import annotations

from training.config import TrainConfig
from training.presets.base import paper_stage, paper_stem


def cifar10_16() -> TrainConfig:
    """CIFAR10 at 16x16, class-conditional: the stem of StyleSAN-XL's CIFAR10 model.

    python train.py --loss san --preset cifar10-16 --data cifar10_16.zip
    300 million images, batch 2048. FID: not reported.
    """
    return paper_stem("stylegan3-r", c_dim=10, num_layers=6, batch_size=2048, total_kimg=300000)


def cifar10_32() -> TrainConfig:
    """CIFAR10 at 32x32, class-conditional, on `cifar10-16`.

    python train.py --loss san --preset cifar10-32 --data cifar10_32.zip --path_stem best_model.safetensors
    250 million images, batch 2048. FID 1.36 (SAN paper and official README; StyleGAN-XL 1.85, a smaller model).
    """
    return paper_stage(cifar10_16(), "stylegan3-r", head_layers=7, batch_size=2048, total_kimg=250000)


def ffhq_16() -> TrainConfig:
    """FFHQ at 16x16: the stem of StyleSAN-XL's FFHQ models.

    python train.py --loss san --preset ffhq-16 --data ffhq_16.zip
    300 million images, batch 2048. FID: not reported.
    """
    return paper_stem("stylegan3-r", c_dim=0, num_layers=6, batch_size=2048, total_kimg=300000)


def ffhq_32() -> TrainConfig:
    """FFHQ at 32x32, on `ffhq-16`.

    python train.py --loss san --preset ffhq-32 --data ffhq_32.zip --path_stem best_model.safetensors
    175 million images, batch 2048. FID: not reported.
    """
    return paper_stage(ffhq_16(), "stylegan3-r", head_layers=7, batch_size=2048, total_kimg=175000)


def ffhq_64() -> TrainConfig:
    """FFHQ at 64x64, on `ffhq-32`: from here on with 3x3 kernels, on a stem with 1x1 kernels.

    python train.py --loss san --preset ffhq-64 --data ffhq_64.zip --path_stem best_model.safetensors
    95 million images, batch 256. FID: not reported.
    """
    return paper_stage(ffhq_32(), "stylegan3-t", head_layers=4, batch_size=256, total_kimg=95000)


def ffhq_128() -> TrainConfig:
    """FFHQ at 128x128, on `ffhq-64`.

    python train.py --loss san --preset ffhq-128 --data ffhq_128.zip --path_stem best_model.safetensors
    57 million images, batch 256. FID: not reported.
    """
    return paper_stage(ffhq_64(), "stylegan3-t", head_layers=4, batch_size=256, total_kimg=57000)


def ffhq_256() -> TrainConfig:
    """FFHQ at 256x256, on `ffhq-128`.

    python train.py --loss san --preset ffhq-256 --data ffhq_256.zip --path_stem best_model.safetensors
    11 million images, batch 256. FID 1.68 (official README; StyleGAN-XL 2.19).
    """
    return paper_stage(ffhq_128(), "stylegan3-t", head_layers=4, batch_size=256, total_kimg=11000)


def ffhq_512() -> TrainConfig:
    """FFHQ at 512x512, on `ffhq-256`.

    python train.py --loss san --preset ffhq-512 --data ffhq_512.zip --path_stem best_model.safetensors
    4 million images, batch 128. FID 1.77 (official README; StyleGAN-XL 2.23).
    """
    return paper_stage(ffhq_256(), "stylegan3-t", head_layers=4, batch_size=128, total_kimg=4000)


def ffhq_1024() -> TrainConfig:
    """FFHQ at 1024x1024, on `ffhq-512`.

    python train.py --loss san --preset ffhq-1024 --data ffhq_1024.zip --path_stem best_model.safetensors
    4 million images, batch 128. FID 1.61 (official README; StyleGAN-XL 2.02).
    """
    return paper_stage(ffhq_512(), "stylegan3-t", head_layers=4, batch_size=128, total_kimg=4000)
