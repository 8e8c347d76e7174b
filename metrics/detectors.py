# SPDX-License-Identifier: MIT
"""Detectors by name, and where their weights are found: `get_detector("inception")`.

A file of weights is looked for in this order: the path given, the folder `detectors` of the cache, torch's own
downloads (torch-fidelity and torchvision put theirs there), the internet. The SHA-256 of published files is checked.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from torch_utils.download import DownloadError, cache_folder, fetch, is_url
from torch_utils.errors import UserError

if TYPE_CHECKING:
    from metrics.features import Detector
    from metrics.inception_detectors import InceptionDetector
    from metrics.lpips import Lpips

_CHUNK_BYTES = 1 << 20
BuiltT = TypeVar("BuiltT")


class MissingDetectorError(UserError):
    """A detector whose weights are not here; the message says what to fetch and where to put it."""


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights."""

    name: str  # under which it is looked for
    url: str | None = None  # where it comes from; None = only ever put there by hand
    sha256: str | None = None  # None = not known; then the weights' names and shapes are all that is checked
    size: str = ""  # for people


_TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
_STYLEGAN_XL = "https://s3.eu-central-1.amazonaws.com/avg-projects/stylegan_xl/feature_networks"
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def _file(folder: str, name: str, sha256: str | None = None, size: str = "") -> WeightsFile:
    return WeightsFile(name, f"{folder}/{name}", sha256, size)


# Files of each network, best first; the first one is what is downloaded.
SOURCES: dict[str, tuple[WeightsFile, ...]] = {
    "inception": (
        _file(_TORCH_FIDELITY, "weights-inception-2015-12-05-6726825d.pth", _INCEPTION_SHA256, "96 MB"),
        _file(_PYTORCH_FID, "pt_inception-2015-12-05-6726825d.pth", _INCEPTION_SHA256, "96 MB"),
        _file(
            _NVIDIA,
            "inception-2015-12-05.pt",  # clean-fid's too
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
            "96 MB",
        ),
        WeightsFile("inception-v3-2015-12-05.pkl"),
        WeightsFile("inception-2015-12-05.pkl"),
    ),
    "inception_random": (_file(_STYLEGAN_XL, "inception_rand_full.pkl", None, "about 90 MB"),),
    "vgg16": (
        _file(
            "https://download.pytorch.org/models",
            "vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "553 MB",
        ),
        _file(_NVIDIA, "vgg16.pt"),
        WeightsFile("vgg16.pkl"),
    ),
    "lpips": (_file(_TORCH_FIDELITY, "weights-vgg16-lpips.pth", None, "7 kB"),),
}


def get_detector(name: str, device: torch.device | str = "cpu", path: str | Path | None = None) -> Detector:
    """The detector `name` of DETECTORS on `device`; built once, then shared.

    path: a file of weights or its https address; None = look in the cache, then download. Raises UserError for an
    unknown name or a file that does not fit, and MissingDetectorError when there are no weights. The random numbers
    of torch are left as they were.
    """
    if name not in DETECTORS:
        raise UserError(f"detector {name!r} is not known; valid detectors: {', '.join(DETECTORS)}")
    return DETECTORS[name](torch.device(device), path)


def get_inception(
    device: torch.device | str = "cpu", path: str | Path | None = None, resize: str = "tf1"
) -> InceptionDetector:
    """As `get_detector`, for callers that also want sFID's maps and probabilities (`outputs`)."""
    from metrics.inception_detectors import RESIZES, InceptionDetector, read_inception

    if resize not in RESIZES:
        raise UserError(f"resize {resize!r} is not known; valid ways: {', '.join(RESIZES)}")
    file = find_weights("inception", path)
    return _shared(
        f"inception-{resize}",
        file,
        torch.device(device),
        lambda d: InceptionDetector(read_inception(file), d, resize),
    )


def get_lpips(
    device: torch.device | str = "cpu", path: str | Path | None = None, lpips_path: str | Path | None = None
) -> Lpips:
    """LPIPS on VGG16. path: VGG16's weights, as for `get_detector`; lpips_path: those of LPIPS' own layers.

    None for the latter = the installed package `lpips`, else the cache, else a download.
    """
    from metrics.lpips import Lpips, find_packaged_weights, read_lpips_weights
    from metrics.vgg16 import read_vgg16_maps

    layers = find_weights("lpips", lpips_path or find_packaged_weights())
    file = find_weights("vgg16", path)
    weights = read_lpips_weights(layers)
    return _shared(
        f"lpips-{layers}", file, torch.device(device), lambda d: Lpips(read_vgg16_maps(file), weights, d)
    )


def detector_folder() -> Path:
    """Where weights that somebody fetched by hand are looked for."""
    return cache_folder().parent / "detectors"


def find_weights(name: str, path: str | Path | None = None) -> Path:
    """The file of weights `name` of SOURCES. Raises MissingDetectorError, or UserError if it is damaged."""
    if path is not None and is_url(str(path)):
        return _fetched(name, str(path))
    if path is not None:
        if not Path(path).is_file():
            raise MissingDetectorError(f"{path} is no file; {_instruction(name)}")
        return _checked(Path(path))
    for folder in (detector_folder(), Path(torch.hub.get_dir()) / "checkpoints"):
        for file in SOURCES[name]:
            if (folder / file.name).is_file():
                return _checked(folder / file.name)
    return _fetched(name, SOURCES[name][0].url or "")


def _fetched(name: str, url: str) -> Path:
    known = {file.url: file.sha256 for file in SOURCES[name]}
    try:
        return fetch(url, known.get(url))
    except DownloadError as error:
        raise MissingDetectorError(f"{_instruction(name)} ({error})") from error


def _instruction(name: str) -> str:
    first, *rest = SOURCES[name]
    others = f"; {', '.join(file.name for file in rest)} will do as well" if rest else ""
    return (
        f"the weights of {name!r} are missing: fetch {first.url} ({first.size}) and put it into "
        f"{detector_folder()}, or give its path to calc_metrics.py --detector{others}"
    )


def _checked(path: Path) -> Path:
    """`path`, once its SHA-256 is that of the published file of this name, if there is one."""
    known = {file.name: file.sha256 for files in SOURCES.values() for file in files}
    expected = known.get(path.name)
    if expected is not None:
        stat = path.stat()
        found = _sha256(path, stat.st_size, stat.st_mtime_ns)
        if found != expected:
            raise UserError(
                f"{path} has the SHA-256 {found}, the published file of this name {expected}; download it again, "
                "or give your own file another name"
            )
    return path


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Remembered for as long as the file's size and time of change stay."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


_cache: dict[tuple[str, str, int, str], object] = {}  # (kind, file, its time of change, device) -> detector


def _shared(
    kind: str, path: Path | None, device: torch.device, build: Callable[[torch.device], BuiltT]
) -> BuiltT:
    """What `build` gives, built once for a file and a device."""
    file = ("", 0) if path is None else (os.path.realpath(path), path.stat().st_mtime_ns)
    key = (kind, *file, str(device))
    if key not in _cache:
        with torch.random.fork_rng(devices=[]):  # initial weights, which timm's networks have, are drawn
            _cache[key] = build(device)
    return _cache[key]  # type: ignore[return-value]


def _build_random_inception(device: torch.device, path: str | Path | None) -> Detector:
    from metrics.inception_detectors import RandomInceptionDetector, read_random_inception

    file = find_weights("inception_random", path)
    return _shared(
        "inception_random", file, device, lambda d: RandomInceptionDetector(read_random_inception(file), d)
    )


def _build_vgg16(device: torch.device, path: str | Path | None) -> Detector:
    from metrics.vgg16 import VGG16Detector, read_vgg16

    file = find_weights("vgg16", path)
    return _shared("vgg16", file, device, lambda d: VGG16Detector(read_vgg16(file), d))


def _build_dinov2(device: torch.device, path: str | Path | None) -> Detector:
    from metrics.vision_transformers import dinov2_detector

    return _build_vit("dinov2", dinov2_detector, device, path)


def _build_clip(device: torch.device, path: str | Path | None) -> Detector:
    from metrics.vision_transformers import clip_detector

    return _build_vit("clip", clip_detector, device, path)


def _build_vit(
    name: str,
    build: Callable[[torch.device, Path | None], Detector],
    device: torch.device,
    path: str | Path | None,
) -> Detector:
    if path is not None and is_url(str(path)):
        path = fetch(str(path))
    if path is not None and not Path(path).is_file():
        raise MissingDetectorError(
            f"{path} is no file; give timm's weights, or none to have timm download them"
        )
    file = None if path is None else Path(path)
    try:
        return _shared(name, file, device, lambda d: build(d, file))
    except UserError as error:
        if path is None:
            raise MissingDetectorError(f"the weights of {name!r} are missing: {error}") from error
        raise


def _build_lite0(device: torch.device, path: str | Path | None) -> Detector:
    from metrics.features import lite0_detector

    if path is not None:
        raise UserError(f"detector 'lite0' has its own weights and takes no file, got {path}; leave it out")
    return lite0_detector(device)


# Networks are imported when they are asked for: timm takes seconds.
DETECTORS: dict[str, Callable[[torch.device, str | Path | None], Detector]] = {
    "inception": get_inception,
    "inception_clean": functools.partial(get_inception, resize="clean"),
    "inception_random": _build_random_inception,
    "vgg16": _build_vgg16,
    "dinov2": _build_dinov2,
    "clip": _build_clip,
    "lite0": _build_lite0,
}
