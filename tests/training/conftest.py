# SPDX-License-Identifier: MIT
"""Files as the official code writes them, pickled by Python itself, and the rules that golden weights follow."""

from __future__ import annotations

import hashlib
import math
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_utils.errors import UserError
from training.generator.generator import Generator
from training.network_io import read_network

Draw = Callable[[str, tuple[int, ...]], torch.Tensor]


class Persistent:
    """Pickles as `torch_utils.persistence` pickles an object: its class's name, a source text and its attributes."""

    def __init__(self, class_name: str, **state) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        source = "raise RuntimeError('this source must never be executed')"
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": self.class_name,
            "state": self.state,
        }
        return rebuild, (meta,)


def node(class_name: str, module: nn.Module, children: dict | None = None, **attributes) -> Persistent:
    """`module` of ours as an official object; children replace its submodules."""
    return Persistent(
        class_name,
        training=False,
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _non_persistent_buffers_set=set(),
        _forward_hooks={},
        _modules=children or {},
        **attributes,
    )


def linear_node(layer: nn.Module, multiplier: float = 1.0) -> Persistent:
    return node("FullyConnectedLayer", layer, weight_gain=np.float64(0.1), bias_gain=multiplier)


def layer_node(layer: nn.Module) -> Persistent:
    plan = layer.plan
    return node(
        "SynthesisLayer",
        layer,
        {"affine": linear_node(layer.affine)},
        in_size=np.array([plan.source.size] * 2),
        out_size=np.array([plan.target.size] * 2),
        in_channels=plan.source.channels,
        out_channels=plan.target.channels,
        in_sampling_rate=plan.source.sampling_rate,
        out_sampling_rate=plan.target.sampling_rate,
        in_cutoff=np.float64(plan.source.cutoff),
        out_cutoff=np.float64(plan.target.cutoff),
        in_half_width=np.float64(plan.source.half_width),
        out_half_width=np.float64(plan.target.half_width),
        is_torgb=plan.is_torgb,
        is_critically_sampled=np.bool_(plan.is_critically_sampled),
        use_fp16=np.bool_(plan.use_fp16),
        conv_kernel=plan.conv_kernel,
        conv_clamp=None if plan.conv_clamp is None else int(plan.conv_clamp),
        magnitude_ema_beta=plan.magnitude_ema_beta,
        filter_size=6,
        lrelu_upsampling=2,
        use_radial_filters=plan.down_radial,
        up_factor=plan.up_factor,
        down_factor=plan.down_factor,
        up_taps=plan.up_taps,
        down_taps=plan.down_taps,
        padding=list(plan.padding),
    )


def official_generator(G: Generator, easy_dict: type = dict, is_stylegan3: bool = False) -> Persistent:
    """G as the official code would save it. StyleGAN3's has no class table and stores fewer attributes."""
    stem, mapping, synthesis = G.cfg.synthesis, G.cfg.mapping, G.synthesis
    layers = {name: layer_node(synthesis.get_submodule(name)) for name in synthesis.layer_names}
    block = synthesis.input
    inputs = node(
        "SynthesisInput",
        block,
        {"affine": linear_node(block.affine)},
        bandwidth=np.float64(block.bandwidth),
        sampling_rate=block.sampling_rate,
    )
    settings = {
        name: getattr(stem, name)
        for name in ("channel_base", "channel_max", "first_cutoff", "first_stopband", "last_stopband_rel")
    }
    synthesis_node = node(
        "SynthesisNetwork",
        synthesis,
        {"input": inputs, **layers},
        w_dim=mapping.w_dim,
        num_ws=G.num_ws,
        img_resolution=G.img_resolution,
        img_channels=3,
        num_layers=len(layers) - 1,
        num_critical=stem.num_critical,
        margin_size=stem.margin_size,
        output_scale=stem.output_scale,
        num_fp16_res=stem.num_fp16_res,
        layer_names=list(layers),
        **({} if is_stylegan3 else settings),
        _init_kwargs=easy_dict(
            {
                "img_resolution": stem.img_resolution,
                "num_layers": stem.num_layers,
                "conv_kernel": stem.conv_kernel,
            }
            | settings
        ),
    )
    children = {
        f"fc{i}": linear_node(G.mapping.get_submodule(f"fc{i}"), 0.01) for i in range(mapping.num_layers)
    }
    if not is_stylegan3:
        embed = nn.Embedding(*G.mapping.embed.weight.shape)
        embed.weight = G.mapping.embed.weight
        children = {"embed": embed, **children}
    if mapping.c_dim:
        children["embed_proj"] = linear_node(G.mapping.embed_proj)
    mapping_node = node(
        "MappingNetwork",
        G.mapping,
        children,
        **{name: getattr(mapping, name) for name in ("z_dim", "w_dim", "c_dim", "num_layers", "w_avg_beta")},
    )
    modules = {"synthesis": synthesis_node, "mapping": mapping_node}
    if not G.cfg.superres:
        return node("Generator", G, modules, img_resolution=G.img_resolution)
    return node(
        "SuperresGenerator",
        G,
        modules,
        img_resolution=G.img_resolution,
        up_factor=G.cfg.superres[-1].up_factor,
        head_layer_names=[layer.name for layer in synthesis.plan.head],
    )


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def official(monkeypatch) -> types.SimpleNamespace:
    """What writes official files: stand-ins for the classes that they name, importable while the test runs, and

    node(class_name, module, children, **attributes), generator(G, easy_dict, is_stylegan3), write(path, content).
    """
    made = types.SimpleNamespace(node=node, generator=official_generator, write=write)

    def make(module: str, name: str, base: type = nn.Module) -> type:
        new = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        monkeypatch.setattr(sys.modules[module], name, new, raising=False)
        setattr(made, name, new)
        return new

    make("torch_utils.persistence", "_reconstruct_persistent_obj", object)
    make("feature_networks.vit", "store_activation", object)
    for name in ("ProjectedDiscriminator", "MultiScaleD", "SingleDisc", "SingleDiscCond"):
        make("pg_modules.discriminator", name)
    make("pg_modules.blocks", "DownBlock")
    make("pg_modules.projector", "F_RandomProj")
    make("pg_modules.san_modules", "SANEmbedding")
    make("pg_modules.san_modules", "SANConv2d")
    make("timm.models.of_another_time", "VisionTransformer")
    make("timm.models.of_another_time", "InvertedResidual")
    make("dnnlib.util", "EasyDict", dict)
    make("dnnlib.tflib.network", "Network", object)
    return made


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    """written(data) -> path of a file net.pkl that holds these bytes."""

    def write_bytes(data: bytes) -> Path:
        path = tmp_path / "net.pkl"
        path.write_bytes(data)
        return path

    return write_bytes


@pytest.fixture(scope="session")
def refused() -> Callable[[Path], str]:
    """refused(path) -> the one short line with which a network file is refused."""

    def message_of(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_network(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < 500
        return message

    return message_of


# Weights and inputs of the golden files: rules instead of numbers.


def rng_of(name: str) -> np.random.Generator:
    """Random numbers that depend on the name alone."""
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    )


@pytest.fixture(scope="session")
def draw() -> Draw:
    """draw(name, shape) -> standard normal numbers, float64, that depend on the name alone."""
    return lambda name, shape: torch.from_numpy(np.asarray(rng_of(name).standard_normal(shape)))


@pytest.fixture(scope="session")
def uniform() -> Draw:
    """uniform(name, shape) -> numbers of [-1, 1), float32, that depend on the name alone."""
    return lambda name, shape: torch.from_numpy((-1 + 2 * rng_of(name).random(shape)).astype(np.float32))


@pytest.fixture(scope="session")
def generator_fill(draw: Draw) -> Callable[[str, tuple[int, ...], str], torch.Tensor | None]:
    """generator_fill(name, shape, salt) -> float64 value of G's tensor in golden files; None for the derived ones."""

    def fill(name: str, shape: tuple[int, ...], salt: str) -> torch.Tensor | None:
        if name.endswith(("transform", "_filter")):
            return None
        numbers = draw(salt + name, shape)
        if name.endswith("magnitude_ema"):
            return (0.3 * numbers).exp()
        if name.startswith("mapping.fc"):
            return numbers * (100 if name.endswith("weight") else 10)
        if name == "synthesis.input.affine.bias":
            return 0.1 * numbers + torch.tensor([1.0, 0, 0, 0])
        if name.endswith(".bias"):
            return 0.1 * numbers + (1 if name.endswith("affine.bias") else 0)
        scales = {"mapping.w_avg": 0.5, "synthesis.input.affine.weight": 0.3, "synthesis.input.phases": 0.3}
        return scales.get(name, 1) * numbers

    return fill


@pytest.fixture(scope="session")
def filled() -> Callable[[str, list], dict[str, torch.Tensor]]:
    """filled(salt, [(name, shape), ...]) -> float32 weights of D and of timm's networks in golden files, by name."""
    return fill_by_kind


def fill_by_kind(salt: str, names: list) -> dict[str, torch.Tensor]:
    """Normal numbers seeded by name, scaled by kind of tensor; power iterations have converged."""
    values = {}
    for name, shape in names:
        x = rng_of(f"{salt}:{name}").standard_normal(shape)
        last = name.rsplit(".", 1)[-1]
        if last in ("running_mean", "bias"):
            x = 0.1 * x
        elif last == "running_var":
            x = 1 + 0.2 * np.abs(x)
        elif last in ("weight_u", "weight_v"):
            x = x / np.linalg.norm(x)
        elif last in ("cls_token", "dist_token", "pos_embed"):
            x = 0.2 * x
        elif last == "scale":
            x = 0.5 + np.abs(x)
        elif len(shape) == 1:
            x = 1 + 0.1 * x
        else:
            x = x * math.sqrt(2 / np.prod(shape[1:]))
        values[name] = x.astype(np.float32)
    for name in [n for n in values if n.endswith("weight_orig")]:
        stem = name.removesuffix("weight_orig")
        matrix = values[name].astype(np.float64).reshape(len(values[name]), -1)
        u = values[stem + "weight_u"].astype(np.float64)
        for _ in range(10):
            v = matrix.T @ u
            v /= np.linalg.norm(v)
            u = matrix @ v
            u /= np.linalg.norm(u)
        values[stem + "weight_u"], values[stem + "weight_v"] = u.astype(np.float32), v.astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in values.items()}
