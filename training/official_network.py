# SPDX-License-Identifier: MIT
"""Official snapshots (.pkl) as network files of ours: StyleGAN-XL, StyleSAN-XL, and unconditional StyleGAN3.

The weights go over unchanged, under the names that the official code gave them. What the file tells about the run
goes into `info`. See `official_pickle` for what makes this safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_utils.errors import UserError
from training.network_file import PARTS, NetworkFile, NetworkFileError, Parts
from training.official_discriminator import read_discriminator
from training.official_generator import (
    describe_generator,
    official_generator_config,
    official_generator_tensors,
)
from training.official_globals import InertModule, printable
from training.official_modules import OfficialModule, StateCopier, plain
from training.official_pickle import load_official_pickle

_REPEATED_BYTES = 64 << 20  # views of one storage may repeat so much


def read_official(path: Path, parts: Parts = PARTS) -> NetworkFile:
    """An official snapshot. G_ema is always read; of the others only `parts`.

    A discriminator that is no projected one, or not whole, is left out; `info["discriminator"]` says why.
    Tensors are copies in float32 and take the size of the file at most (twice, if it is in half precision) plus
    64 MiB. Raises NetworkFileError (UserError if it is no
    usable pickle) for what cannot be used.
    """
    snapshot = load_official_pickle(path)
    copier = StateCopier(path.stat().st_size + _REPEATED_BYTES)
    try:
        return _read(path, _networks(snapshot), parts, copier)
    except UserError as error:
        raise NetworkFileError(f"{path}: {error}") from error
    except Exception as error:  # attributes of a damaged file can be anything, anywhere
        reason = printable(str(error)) or type(error).__name__
        raise NetworkFileError(f"{path} is damaged ({reason}); download it again") from error


def _networks(snapshot: Any) -> dict[str, Any]:
    """The top level of the file, by name. Raises NetworkFileError saying what else it is."""
    if isinstance(snapshot, (tuple, list)) and any(isinstance(item, InertModule) for item in snapshot):
        first = next(item for item in snapshot if isinstance(item, InertModule))
        if first.name.startswith("dnnlib.tflib."):
            raise NetworkFileError(
                "this is a TensorFlow StyleGAN network, which has another generator; only StyleGAN-XL, StyleSAN-XL "
                "and unconditional StyleGAN3 are read"
            )
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("G_ema"), InertModule):
        raise NetworkFileError("there is no network G_ema in this pickle; give an official snapshot")
    return snapshot


def _read(path: Path, snapshot: dict[str, Any], parts: Parts, copier: StateCopier) -> NetworkFile:
    G_ema = OfficialModule(snapshot["G_ema"], "G_ema")
    config = official_generator_config(G_ema)
    info: dict[str, Any] = _progress(snapshot)
    info["source"] = (
        f"official {describe_generator(G_ema)} pickle"  # the generators of both XL codes are the same
    )
    states = {"G_ema": copier.copy(official_generator_tensors(G_ema, config), "G_ema")}
    if "G" in parts and isinstance(snapshot.get("G"), InertModule):
        G = OfficialModule(snapshot["G"], "G")
        if official_generator_config(G) != config:
            raise NetworkFileError("G and G_ema are different networks; use the official file")
        states["G"] = copier.copy(official_generator_tensors(G, config), "G")
    D = None
    if "D" in parts and isinstance(snapshot.get("D"), InertModule):
        try:
            official = OfficialModule(snapshot["D"], "D")
            if any(module.full_name.startswith("pg_modules.san_modules.") for _, module in official.walk()):
                info["source"] = "official StyleSAN-XL pickle"
            D = read_discriminator(official, config.img_resolution, config.mapping.c_dim, copier)
            info["discriminator"] = (
                f"{D.head_kind.upper()} heads on {', '.join(D.config.backbones)}; {D.num_left_out} tensors of the "
                "pretrained feature networks left out"
            )
        except NetworkFileError as error:
            info["discriminator"] = f"left out: {error}"
    return NetworkFile(
        path=path,
        generator_config=config,
        train_config_json=None,
        G_ema=states["G_ema"],
        G=states.get("G"),
        D=None if D is None else D.state,
        discriminator_config=None if D is None else D.config,
        head_kind=None if D is None else D.head_kind,
        info=info,
    )


def _progress(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What the file tells about the run: cur_nimg and the like, and the data set's settings."""
    info = plain(snapshot.get("progress"))
    info = {k: v for k, v in info.items() if v is not None} if isinstance(info, dict) else {}
    if isinstance(data := plain(snapshot.get("training_set_kwargs")), dict):
        info["training_set"] = data
    return info
