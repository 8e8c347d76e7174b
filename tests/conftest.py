# SPDX-License-Identifier: MIT
"""What every test gets: few threads, a fixed seed, tiny data sets and networks, no gpu tests where there is no GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# Before torch is imported: also for the processes that tests start.
# With pytest-xdist, each worker has a core.
os.environ.setdefault(
    "OMP_NUM_THREADS", "2" if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else "1"
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py
# Compiled once for all tests, which have cache folders of their own.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "stylesan" / "extensions"))

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import DiscriminatorConfig, GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator
from training.network_io import save_network

torch.set_num_threads(min(2, torch.get_num_threads()))

TINY_NAMES = ("B/5.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "c.png")  # as a data set sorts them
TINY_LABELS = (2, 0, 1, 2, 0, 1)

WriteDataset = Callable[..., Path]
MakeGeneratorConfig = Callable[..., GeneratorConfig]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_images() -> dict[str, np.ndarray]:
    """File name -> uint8 (16, 16, 3)."""
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for name in TINY_NAMES}


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """write_dataset(name, files, labels=None) -> path of a folder, or of a zip if the name ends so.

    files: name -> array, PIL image or bytes; labels: file name -> class id, or the text of dataset.json.
    """

    def write(
        name: str,
        files: Mapping[str, np.ndarray | Image.Image | bytes],
        labels: Mapping[str, object] | str | None = None,
    ) -> Path:
        contents = {file: encode_image(content) for file, content in files.items()}
        if labels is not None:
            text = (
                labels
                if isinstance(labels, str)
                else json.dumps({"labels": [list(x) for x in labels.items()]})
            )
            contents["dataset.json"] = text.encode()
        path = tmp_path / name
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file, content in contents.items():
                    archive.writestr(file, content)
            return path
        path.mkdir()
        for file, content in contents.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        return path

    return write


@pytest.fixture
def tiny_folder(write_dataset: WriteDataset, tiny_images: dict[str, np.ndarray]) -> Path:
    """Six 16x16 RGB images of three classes, in a folder with subfolders."""
    return write_dataset("tiny", tiny_images, dict(zip(TINY_NAMES, TINY_LABELS, strict=True)))


@pytest.fixture
def tiny_zip(write_dataset: WriteDataset, tiny_images: dict[str, np.ndarray]) -> Path:
    """The same files as `tiny_folder`, in a zip."""
    return write_dataset("tiny.zip", tiny_images, dict(zip(TINY_NAMES, TINY_LABELS, strict=True)))


def encode_image(content: np.ndarray | Image.Image | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def tiny_generator_config() -> MakeGeneratorConfig:
    """tiny_generator_config(c_dim, **synthesis): z of 4, w of 8; 16x16 images from four layers of six channels."""

    def make(c_dim: int, **synthesis: object) -> GeneratorConfig:
        sizes = {"img_resolution": 16, "channel_max": 6, "num_layers": 4, "margin_size": 2}
        return GeneratorConfig(
            mapping=MappingConfig(
                z_dim=4, w_dim=8, c_dim=c_dim, num_embeddings=max(c_dim, 1), embedding_dim=6
            ),
            synthesis=SynthesisConfig(**(sizes | synthesis)),
        )

    return make


@pytest.fixture(scope="session")
def tiny_discriminator_config() -> Callable[..., DiscriminatorConfig]:
    """tiny_discriminator_config(c_dim, **changes): 16x16 images, seen by Lite0 at 32x32.

    Two heads, of two blocks and of one, at most eight channels wide; one class embedding more than classes.
    """

    def make(c_dim: int, **changes: object) -> DiscriminatorConfig:
        config = DiscriminatorConfig(
            img_resolution=16,
            c_dim=c_dim,
            backbones=("tf_efficientnet_lite0",),
            feature_resolution=32,
            nominal_resolution=32,
            projected_channels=8,
            num_levels=2,
            head_resolution=4,
            max_head_channels=8,
            class_dim=4,
            num_class_embeddings=c_dim + 1,
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def write_network(tiny_generator_config: MakeGeneratorConfig) -> Callable[..., str]:
    """write_network(path, c_dim, img_channels=3, info=None) -> path of an untrained tiny generator, always the same."""

    def write(path: Path, c_dim: int, img_channels: int = 3, info: dict[str, object] | None = None) -> str:
        torch.manual_seed(1)
        G = Generator(tiny_generator_config(c_dim, img_channels=img_channels))
        G.mapping.w_avg.normal_()
        save_network(path, G, info=info)
        return str(path)

    return write


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of one MiB, or of the size that the test gives it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
