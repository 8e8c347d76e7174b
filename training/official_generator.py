# SPDX-License-Identifier: MIT
"""Configuration of an official generator, read from its attributes and checked against every layer in the file.

StyleGAN-XL and StyleSAN-XL, stems and chains of super-resolution stages, and unconditional StyleGAN3, whose
synthesis is the same and whose mapping network lacks only the class embedding. Others are refused by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from training.config import ConfigError, GeneratorConfig, MappingConfig, SuperresConfig, SynthesisConfig
from training.generator.layer_plan import LayerPlan
from training.generator.network_plan import UP_FACTORS, NetworkPlan, plan_network
from training.network_file import NetworkFileError
from training.official_modules import OfficialModule

_USE_IT_THERE = "only StyleGAN-XL, StyleSAN-XL and unconditional StyleGAN3 generators are read"
_NO_EMBEDDING_DIM = 1  # width of the empty class table of a network that has none
_MAX_LAYERS = 100  # a chain of stages up to 1024 pixels has 42
_MAX_OVERSAMPLING = 16  # of a layer's filter; bounds what planning and filter design may take


def describe_generator(G: OfficialModule) -> str:
    """What kind of generator it is: "StyleGAN-XL" (StyleSAN-XL's is the same) or "StyleGAN3".

    Raises NetworkFileError naming the kind if it is one that cannot be used here.
    """
    names = set(G.module("synthesis").module_names) if "synthesis" in G.module_names else set()
    if any(name.startswith("b") and name[1:].isdigit() for name in names):
        raise NetworkFileError(f"{G.where} is a StyleGAN2 generator; {_USE_IT_THERE}")
    if any(name.startswith("feat_") for name in names):
        raise NetworkFileError(f"{G.where} is a FastGAN generator (Projected GAN); {_USE_IT_THERE}")
    if "input" not in names or "mapping" not in G.module_names:
        raise NetworkFileError(f"{G.where} is an unknown {G.class_name or 'object'}; {_USE_IT_THERE}")
    mapping = G.module("mapping")
    if "embed" not in mapping.module_names:
        return "StyleGAN3"
    if mapping.module("embed").class_name != "Embedding":
        raise NetworkFileError(
            f"{G.where} is a conditional StyleGAN3 generator, with another class embedding; {_USE_IT_THERE}"
        )
    return "StyleGAN-XL"


def official_generator_config(G: OfficialModule) -> GeneratorConfig:
    """The configuration that builds `G`. Raises NetworkFileError if there is none that gives its layers."""
    kind = describe_generator(G)
    synthesis = G.module("synthesis")
    layers = [synthesis.module(name) for name in _layer_names(synthesis)]
    try:
        config = GeneratorConfig(
            mapping=_mapping_config(G.module("mapping"), kind), synthesis=_stem_config(synthesis, layers[0])
        )
        if G.class_name == "SuperresGenerator":
            config = _with_stages(config, G, layers)
        plan = plan_network(config)
    except ConfigError as error:
        raise NetworkFileError(f"{G.where} cannot be rebuilt: {error}") from error
    except (ArithmeticError, TypeError) as error:
        raise NetworkFileError(
            f"{G.where} has settings of no network ({error}); use the official file"
        ) from error
    _check_plan(plan, synthesis, layers)
    return config


def official_generator_tensors(G: OfficialModule, config: GeneratorConfig) -> dict[str, Tensor]:
    """State dict of `G` for `Generator(config)`: views of the file."""
    tensors = G.tensors()
    if config.mapping.num_embeddings == 0:  # StyleGAN3 has no class table; ours has an empty one
        tensors["mapping.embed.weight"] = torch.empty(0, config.mapping.embedding_dim)
    return tensors


def _layer_names(synthesis: OfficialModule) -> list[str]:
    names = synthesis.text_list("layer_names")
    if (
        not 0 < len(names) <= _MAX_LAYERS
        or [name for name in synthesis.module_names if name != "input"] != names
    ):
        raise NetworkFileError(f"{synthesis.where}.layer_names are not its layers; use the official file")
    return names


def _mapping_config(mapping: OfficialModule, kind: str) -> MappingConfig:
    table = mapping.module("embed").tensors().get("weight") if kind == "StyleGAN-XL" else None
    if kind == "StyleGAN-XL" and (table is None or table.ndim != 2):
        raise NetworkFileError(
            f"{mapping.where}.embed holds no table of class embeddings; use the official file"
        )
    rows, width = (0, _NO_EMBEDDING_DIM) if table is None else table.shape
    num_layers = mapping.integer("num_layers")
    if num_layers > _MAX_LAYERS:
        raise NetworkFileError(f"{mapping.where} has {num_layers} layers; use the official file")
    return MappingConfig(
        z_dim=mapping.integer("z_dim"),
        w_dim=mapping.integer("w_dim"),
        c_dim=mapping.integer("c_dim"),
        num_layers=num_layers,
        num_embeddings=rows,
        embedding_dim=width,
        lr_multiplier=mapping.module("fc0").number("bias_gain"),  # under this name only
        w_avg_beta=mapping.number("w_avg_beta"),
    )


def _stem_config(synthesis: OfficialModule, first: OfficialModule) -> SynthesisConfig:
    """first: the stem's first layer. A stage overwrites some attributes of `synthesis`, never its arguments."""
    num_layers = synthesis.integer_argument("num_layers", 14)
    filter_size, oversampling = first.integer("filter_size", 6), first.integer("lrelu_upsampling", 2)
    if num_layers > _MAX_LAYERS or not 0 < max(filter_size, oversampling) <= _MAX_OVERSAMPLING:
        raise NetworkFileError(
            f"{synthesis.where} has the layers or filters of no network; use the official file"
        )
    return SynthesisConfig(
        img_resolution=synthesis.integer_argument("img_resolution", synthesis.attribute("img_resolution")),
        img_channels=synthesis.integer("img_channels"),
        channel_base=synthesis.integer("channel_base", 32768),
        channel_max=synthesis.integer("channel_max", 512),
        num_layers=num_layers,
        num_critical=synthesis.integer("num_critical", 2),
        first_cutoff=float(synthesis.number("first_cutoff", 2)),
        first_stopband=float(synthesis.number("first_stopband", 2**2.1)),
        last_stopband_rel=float(synthesis.number("last_stopband_rel", 2**0.3)),
        margin_size=synthesis.integer("margin_size", 10),
        output_scale=float(synthesis.number("output_scale", 0.25)),
        num_fp16_res=synthesis.integer("num_fp16_res", 4),
        conv_kernel=first.integer("conv_kernel"),
        use_radial_filters=_is_radial(first),
        filter_size=filter_size,
        lrelu_upsampling=oversampling,
        conv_clamp=_clamp(first),
        magnitude_ema_beta=first.number("magnitude_ema_beta"),
    )


def _is_radial(layer: OfficialModule) -> bool:
    return layer.flag("use_radial_filters", layer.attribute("down_radial", False))


def _clamp(layer: OfficialModule) -> float | None:
    return None if layer.attribute("conv_clamp") is None else float(layer.number("conv_clamp"))


# Super-resolution stages.


def _with_stages(stem: GeneratorConfig, G: OfficialModule, layers: list[OfficialModule]) -> GeneratorConfig:
    """The chain of stages on `stem` that gives `layers`: the file tells the last stage, the names the others."""
    last_head, last_factor = len(G.text_list("head_layer_names")) - 1, G.integer("up_factor")
    todo = [stem]
    while todo:
        below = todo.pop()
        remaining = G.integer("img_resolution") // below.img_resolution
        num_kept = len(_kept(plan_network(below)))
        if num_kept >= len(layers):
            continue
        if remaining == last_factor:
            config = _with_stage(below, last_factor, last_head, layers[num_kept])
            if _fits(plan_network(config).layers, layers, is_whole=True):
                return config
        for up_factor in [factor for factor in UP_FACTORS if factor < remaining]:
            for head_layers in range(3, len(layers) - num_kept + 1):
                config = _with_stage(below, up_factor, head_layers, layers[num_kept])
                kept = _kept(plan_network(config))
                if len(kept) > num_kept and _fits(kept, layers, is_whole=False):
                    todo.append(config)
    raise NetworkFileError(
        f"{G.where}: no chain of super-resolution stages gives its layers; use the official file"
    )


def _kept(plan: NetworkPlan) -> list[LayerPlan]:
    """The layers that a further stage leaves in place."""
    return [layer for layer in plan.layers if not layer.is_critically_sampled]


def _with_stage(
    below: GeneratorConfig, up_factor: int, head_layers: int, first: OfficialModule
) -> GeneratorConfig:
    """`below` with one more stage; `first` is the first layer of its head."""
    stage = SuperresConfig(
        up_factor=up_factor,
        head_layers=head_layers,
        conv_kernel=first.integer("conv_kernel"),
        use_radial_filters=_is_radial(first),
        conv_clamp=_clamp(first),
        magnitude_ema_beta=first.number("magnitude_ema_beta"),
    )
    return replace(below, superres=(*below.superres, stage))


def _fits(
    plans: list[LayerPlan] | tuple[LayerPlan, ...], layers: list[OfficialModule], is_whole: bool
) -> bool:
    """Whether the first layers of the file, or all of them, have the names and cutoffs of `plans`."""
    if len(plans) != len(layers) if is_whole else len(plans) > len(layers):
        return False
    return all(
        layer.where.endswith(f".{plan.name}") and _is_close(layer.number("out_cutoff"), plan.target.cutoff)
        for plan, layer in zip(plans, layers, strict=False)
    )


# Check of the geometry.


def _check_plan(plan: NetworkPlan, synthesis: OfficialModule, layers: list[OfficialModule]) -> None:
    """Raise NetworkFileError naming the first property of a layer that the plan does not give."""
    names, found = [layer.name for layer in plan.layers], [layer.where.rpartition(".")[2] for layer in layers]
    if names != found:
        odd = next((n for n, m in zip(found, names, strict=False) if n != m), found[-1])
        raise NetworkFileError(
            f"{synthesis.where} has a layer {odd} that its settings do not give; use the official file"
        )
    block = synthesis.module("input")
    _compare(block, "bandwidth", plan.input.cutoff)
    _compare(block, "sampling_rate", plan.input.sampling_rate)
    for layer_plan, layer in zip(plan.layers, layers, strict=True):
        for name, value in _properties(layer_plan).items():
            _compare(layer, name, value)


def _properties(plan: LayerPlan) -> dict[str, Any]:
    """Official attribute names and their values."""
    return {
        "in_channels": plan.source.channels,
        "out_channels": plan.target.channels,
        "in_sampling_rate": plan.source.sampling_rate,
        "out_sampling_rate": plan.target.sampling_rate,
        "in_cutoff": plan.source.cutoff,
        "out_cutoff": plan.target.cutoff,
        "in_half_width": plan.source.half_width,
        "out_half_width": plan.target.half_width,
        "is_torgb": plan.is_torgb,
        "is_critically_sampled": plan.is_critically_sampled,
        "conv_kernel": plan.conv_kernel,
        "conv_clamp": plan.conv_clamp,
        "up_factor": plan.up_factor,
        "down_factor": plan.down_factor,
        "up_taps": plan.up_taps,
        "down_taps": plan.down_taps,
        "padding": list(plan.padding),
    }


def _compare(module: OfficialModule, name: str, expected: Any) -> None:
    value = module.attribute(name)
    if isinstance(expected, list) or expected is None:
        is_same = value == expected if isinstance(value, list) and len(value) == 4 else value is expected
    else:
        is_same = _is_close(module.number(name), expected)
    if not is_same:
        raise NetworkFileError(
            f"{module.where}.{name} is not the {expected} that the network's settings give; use the official file"
        )


def _is_close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-9)
