# SPDX-License-Identifier: MIT
"""The ImageNet models, class-conditional: StyleGAN-XL's ladder (arXiv:2202.00273), and StyleSAN-XL's stage at 256.

Known: StyleSAN-XL's command for 256 (on StyleGAN-XL's released 128x128 model), 11 layers in the stem, heads of 7.
Believed, not verified: 5 layers in the last head (39 layers in all), batch sizes as in the FFHQ runs, guidance from 64
on. Not reported: how long StyleGAN-XL trained each stage ("until FID stops improving"); 25,000 kimg, the command
line's default, stand for it. FIDs are of StyleGAN-XL's released checkpoints. We have not run any stage to the end.
"""

from __future__ import annotations

from training.config import TrainConfig
from training.presets.base import paper_stage, paper_stem


def imagenet_16() -> TrainConfig:
    """ImageNet at 16x16: StyleGAN-XL's stem.

    python train.py --loss gan --preset imagenet-16 --data imagenet_16.zip
    Batch 2048; length and hardware not reported. FID 0.73 (official README).
    """
    return paper_stem("stylegan3-t", c_dim=1000, num_layers=11, batch_size=2048)


def imagenet_32() -> TrainConfig:
    """ImageNet at 32x32, on `imagenet-16`.

    python train.py --loss gan --preset imagenet-32 --data imagenet_32.zip --path_stem best_model.safetensors
    Batch 2048; length and hardware not reported. FID 1.11 (official README).
    """
    return paper_stage(imagenet_16(), "stylegan3-t", head_layers=7, batch_size=2048)


def imagenet_64() -> TrainConfig:
    """ImageNet at 64x64, on `imagenet-32`, with classifier guidance.

    python train.py --loss gan --preset imagenet-64 --data imagenet_64.zip --path_stem best_model.safetensors
    Batch 256; length and hardware not reported. FID 1.52 (official README).
    """
    return paper_stage(imagenet_32(), "stylegan3-t", head_layers=7, batch_size=256, cls_weight=8)


def imagenet_128() -> TrainConfig:
    """ImageNet at 128x128, on `imagenet-64`: the model that StyleSAN-XL's stage stands on.

    python train.py --loss gan --preset imagenet-128 --data imagenet_128.zip --path_stem best_model.safetensors
    Batch 256; length and hardware not reported. FID 1.77 (official README; 1.81 in the paper).
    """
    return paper_stage(imagenet_64(), "stylegan3-t", head_layers=7, batch_size=256, cls_weight=8)


def imagenet_256() -> TrainConfig:
    """ImageNet at 256x256, on `imagenet-128`: StyleSAN-XL's published stage.

    python train.py --loss san --preset imagenet-256 --data imagenet_256.zip --path_stem imagenet128.pkl
    11 million images, batch 256, 8 GPUs (kind and hours not reported). FID 2.14 (SAN paper and official README).
    StyleGAN-XL, `--loss gan`: FID 2.30 in its paper, 2.26 its released checkpoint; its length is not reported.
    """
    return paper_stage(
        imagenet_128(), "stylegan3-t", head_layers=7, batch_size=256, total_kimg=11000, cls_weight=8
    )


def imagenet_512() -> TrainConfig:
    """ImageNet at 512x512, on `imagenet-256`.

    python train.py --loss gan --preset imagenet-512 --data imagenet_512.zip --path_stem best_model.safetensors
    Batch 128; length not reported; all stages to here 400 V100-days (StyleGAN-XL paper). FID 2.41 (paper; 2.42 README).
    """
    return paper_stage(imagenet_256(), "stylegan3-t", head_layers=7, batch_size=128, cls_weight=8)


def imagenet_1024() -> TrainConfig:
    """ImageNet at 1024x1024, on `imagenet-512`.

    python train.py --loss gan --preset imagenet-1024 --data imagenet_1024.zip --path_stem best_model.safetensors
    Batch 128; length and hardware not reported. FID 2.51 (official README).
    """
    return paper_stage(imagenet_512(), "stylegan3-t", head_layers=5, batch_size=128, cls_weight=8)
