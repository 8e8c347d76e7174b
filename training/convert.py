# SPDX-License-Identifier: MIT
"""python -m training.convert FILE_OR_URL OUT.safetensors: an official .pkl as a network file of this project.

Everything here takes official files as they are, too. A converted one loads faster, is smaller (the pretrained
feature networks stay out), and can be read by anybody without fear.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

from torch_utils.errors import UserError
from training.generator.generator import Generator
from training.generator.network_plan import plan_network
from training.network_io import NetworkFile, build_generator, read_network, save_network

SUFFIX = ".safetensors"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="FILE_OR_URL")
@click.argument("out", metavar=f"OUT{SUFFIX}")
@click.option(
    "--fp16", is_flag=True, help="Store weights in half precision: half the size, images barely differ."
)
@click.option("--force", is_flag=True, help=f"Replace OUT{SUFFIX} if it exists.")
@click.option(
    "--offline", is_flag=True, help="Do not download: use an address only if it was downloaded before."
)
def main(source: str, out: str, fp16: bool, force: bool, offline: bool) -> None:
    """Convert an official StyleGAN-XL, StyleSAN-XL or StyleGAN3 network to a .safetensors file."""
    try:
        click.echo(convert(source, Path(out), torch.float16 if fp16 else torch.float32, force, offline))
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None


def convert(
    source: str, out: Path, dtype: torch.dtype = torch.float32, force: bool = False, offline: bool = False
) -> str:
    """Write the network at `source` to `out` and return a summary of it.

    Raises UserError, before anything is written, if `source` cannot be used or `out` must not be written.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"{out} does not end with {SUFFIX}; give the converted file such a name")
    if out.exists() and not force:
        raise UserError(f"{out} exists; give another name, or --force to replace it")
    stored = read_network(source, offline)
    G_ema = build_generator(stored.generator_config, stored.G_ema, stored.path)
    G = None if stored.G is None else build_generator(stored.generator_config, stored.G, stored.path)
    has_discriminator = stored.discriminator_config is not None and stored.head_kind is not None
    try:
        save_network(
            out,
            G_ema,
            G=G,
            D_state=stored.D,
            discriminator=(stored.discriminator_config, stored.head_kind) if has_discriminator else None,
            config=stored.train_config,
            info=stored.info,
            dtype=dtype,
        )
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another place") from error
    except UserError:
        raise
    except ValueError as error:  # values that half precision cannot hold
        raise UserError(f"{source}: {error}; leave out --fp16") from error
    return f"{summarize(stored, G_ema)}\nWritten:       {out} ({out.stat().st_size / 1e6:,.1f} MB)"


def summarize(stored: NetworkFile, G_ema: Generator) -> str:
    """What a network file holds, in lines."""
    config, info = stored.generator_config, stored.info
    plan = plan_network(config)
    num_parameters = sum(parameter.numel() for parameter in G_ema.parameters())
    stages = [f"{config.synthesis.img_resolution} pixels, {config.synthesis.num_layers + 1} layers"]
    resolution = config.synthesis.img_resolution
    for stage in config.superres:
        resolution *= stage.up_factor
        stages.append(f"{resolution} pixels, head of {stage.head_layers + 1} layers")
    classes = config.mapping.c_dim
    lines = {
        "Source": f"{stored.path} ({info.get('source', 'network file of this project')})",
        "Resolution": f"{plan.img_resolution}x{plan.img_resolution}, {plan.img_channels} channels",
        "Classes": f"{classes}" if classes else "none (unconditional)",
        "Stages": " -> ".join(stages),
        "Layers": f"{len(plan.layers)}: {', '.join(layer.name for layer in plan.layers)}",
        "Generator": f"{num_parameters:,} parameters; G_ema{' and G' if stored.G is not None else ' only'}",
        "Discriminator": _describe_discriminator(stored),
    }
    if progress := [f"{key} {info[key]}" for key in ("cur_nimg", "best_fid") if key in info]:
        lines["Progress"] = ", ".join(progress)
    return "\n".join(f"{f'{title}:':<14} {text}" for title, text in lines.items())


def _describe_discriminator(stored: NetworkFile) -> str:
    if stored.D is None:
        return stored.info.get("discriminator", "none in the file")
    num_values = sum(x.numel() for x in stored.D.values())
    return f"{len(stored.D)} tensors, {num_values:,} numbers. {stored.info.get('discriminator', '')}".strip()


if __name__ == "__main__":
    sys.exit(main())
