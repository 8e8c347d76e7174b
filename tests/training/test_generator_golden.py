# SPDX-License-Identifier: MIT
"""The generator against official numbers: style vectors, images, gradients, path length, running means.

Weights are not stored but drawn from names (the fixture `generator_fill`). An array's error is max|a - b| / max|b|.

    pytest tests/training/test_generator_golden.py
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.config import GeneratorConfig, MappingConfig, SuperresConfig, SynthesisConfig
from training.generator.generator import Generator
from training.generator.synthesis import SynthesisInput
from training.superres import freeze_stem_

DATA = Path(__file__).parents[1] / "data"
STEMS = ("g_gen_t_cond", "g_gen_r_cond", "g_gen_t_uncond")
CASES = (*STEMS, "g_superres_t_up2")
WS, IMAGES, GRADIENTS, OPS_INPUT = 3e-6, 1e-4, 3e-4, 5e-5  # tolerances


@cache
def load_golden(name):
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta_json")))
    return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}, meta


def assert_close(actual, expected, tolerance, what=""):
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: {error:.2g} > {tolerance:.2g}"


def fill_(G, salt, generator_fill):
    for name, tensor in G.state_dict().items():
        value = generator_fill(name, tuple(tensor.shape), salt)
        if value is not None:
            tensor.copy_(value)


def build(name, generator_fill):
    """The case's filled generator, its arrays and meta data."""
    golden, meta = load_golden(name)
    is_stage = "stem" in meta
    kwargs = dict(meta["stem" if is_stage else "kwargs"])
    mapping = MappingConfig(
        z_dim=kwargs.pop("z_dim"),
        w_dim=kwargs.pop("w_dim"),
        c_dim=kwargs.pop("c_dim"),
        num_layers=kwargs.pop("mapping_kwargs")["num_layers"],
    )
    superres = (SuperresConfig(**meta["kwargs"]),) if is_stage else ()
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=SynthesisConfig(**kwargs), superres=superres))
    fill_(G, meta["salt"], generator_fill)
    if is_stage:
        freeze_stem_(G, trains_stem_input=True)  # as the official trainer
    return G, golden, meta


def one_hot(golden, meta):
    if meta["c_dim"] == 0:
        return torch.zeros(len(golden["labels"]), 0)
    return F.one_hot(golden["labels"], meta["c_dim"]).float()


@pytest.fixture(params=CASES)
def case(request, generator_fill):
    return build(request.param, generator_fill)


def trained_parameters(G):
    """(name, parameter) of those that receive gradients."""
    return [(name, p) for name, p in G.named_parameters() if p.requires_grad]


def assert_gradients(G, gradients, golden, meta, draw, prefix=""):
    """Full gradients where stored; of every parameter the norm and a projection."""
    by_name = dict(zip((name for name, _ in trained_parameters(G)), gradients, strict=True))
    stored = [key for key in golden if key.startswith(f"{prefix}dparam/")]
    assert stored
    for key in stored:
        name = key.removeprefix(f"{prefix}dparam/")
        if name.endswith("[labels]"):
            actual = by_name[name.removesuffix("[labels]")][golden["labels"].unique()]
        else:
            actual = by_name[name]
        assert_close(actual, golden[key], GRADIENTS, key)
    norms, projections = golden[f"{prefix}grad_norm"], golden[f"{prefix}grad_proj"]
    assert meta["grad_names"] == list(by_name)
    assert meta[f"{prefix}grad_none"] == [name for name in by_name if by_name[name] is None]
    by_name = {name: torch.zeros(1) if g is None else g for name, g in by_name.items()}
    actual_norms = torch.stack([by_name[name].double().norm() for name in meta["grad_names"]])
    assert_close(actual_norms, norms, GRADIENTS, "norms")
    for name, norm, expected, actual_norm in zip(
        meta["grad_names"], norms, projections, actual_norms, strict=True
    ):
        direction = draw("proj/" + name, meta["parameters"][name]).float().double()
        projection = (by_name[name].double() * direction).sum()
        # Against the norm: a projection on a random direction may happen to be near zero.
        assert (actual_norm - norm).abs() <= GRADIENTS * norm + 1e-12, name
        assert (projection - expected).abs() <= GRADIENTS * norm + 1e-12, name


def test_parameters_and_buffers_have_official_names_shapes_and_order(case):
    G, _, meta = case
    parameters = {name: list(p.shape) for name, p in G.named_parameters()}
    assert list(parameters.items()) == list(meta["parameters"].items())
    buffers = {name: list(b.shape) for name, b in G.named_buffers()}
    assert list(buffers.items()) == list(meta["buffers"].items())
    assert G.synthesis.layer_names == meta["layer_names"]
    assert G.img_resolution == meta["img_resolution"]
    assert (G.num_ws, G.z_dim, G.w_dim, G.c_dim) == tuple(
        meta[k] for k in ("num_ws", "z_dim", "w_dim", "c_dim")
    )


def test_a_stage_trains_and_freezes_the_official_parameters(generator_fill):
    G, _, meta = build("g_superres_t_up2", generator_fill)
    trained = [name for name, _ in trained_parameters(G)]
    assert trained == meta["trainable"]
    assert [name for name, p in G.named_parameters() if not p.requires_grad] == meta["frozen"]
    assert [layer.name for layer in G.synthesis.plan.head] == meta["head_layer_names"]
    freeze_stem_(G, trains_stem_input=False)
    assert [name for name, _ in trained_parameters(G)] == [n for n in trained if ".input." not in n]


@torch.no_grad()
def test_style_vectors_and_images(case):
    G, golden, meta = case
    z, c = golden["z"], one_hot(golden, meta)
    ws = G.mapping(z, c)
    assert_close(ws, golden["ws"].unsqueeze(1).expand(-1, G.num_ws, -1), WS, "ws")
    images = G(z, c)
    assert images.dtype == torch.float32
    assert_close(images, golden["img"], IMAGES, "img")
    ws = G.mapping(z, c, truncation_psi=0.7)
    assert_close(ws, golden["ws_psi07"].unsqueeze(1).expand(-1, G.num_ws, -1), WS, "ws_psi07")
    assert_close(G(z, c, truncation_psi=0.7), golden["img_psi07"], IMAGES, "img_psi07")
    ws = G.mapping(z, c, truncation_psi=0.4, truncation_cutoff=3)
    assert_close(ws, golden["ws_psi04_cut3"], WS, "ws_psi04_cut3")
    images = G(z, c, truncation_psi=0.4, truncation_cutoff=3)
    assert_close(images, golden["img_psi04_cut3"], IMAGES, "img_psi04_cut3")


@pytest.mark.parametrize("name", ["g_gen_t_cond", "g_gen_r_cond", "g_superres_t_up2"])
@torch.no_grad()
def test_user_transform(name, generator_fill):
    G, golden, meta = build(name, generator_fill)
    G.synthesis.input.transform.copy_(golden["transform"])
    assert_close(G(golden["z"], one_hot(golden, meta)), golden["img_transform"], IMAGES)


@torch.no_grad()
def test_activations(case):
    """Of whole feature maps, as the layers give them by themselves; the network leaves out what images do not show."""
    G, golden, meta = case
    ws = G.mapping(golden["z"], one_hot(golden, meta))
    outputs = {"input": G.synthesis.input(ws[:, 0])}
    x = outputs["input"]
    for index, name in enumerate(G.synthesis.layer_names):
        x = G.synthesis.get_submodule(name)(x, ws[:, index + 1])
        outputs[name] = x
    for index, name in enumerate(meta["act_names"]):
        x = outputs[name]
        assert list(x.shape) == meta["act_shapes"][index]
        assert_close(x[0, :2, x.shape[2] // 2], golden[f"act/{name}"], IMAGES, name)
        rms = golden["act_rms"][index]
        assert_close(x.double().square().mean().sqrt(), rms, IMAGES, f"{name} rms")
        assert (x.double().mean() - golden["act_mean"][index]).abs() <= IMAGES * rms, f"{name} mean"


def test_gradients(case, draw):
    G, golden, meta = case
    z = golden["z"].clone().requires_grad_()
    images = G(z, one_hot(golden, meta))
    loss = (images * golden["r"]).sum()
    dz, *gradients = torch.autograd.grad(loss, [z, *(p for _, p in trained_parameters(G))], allow_unused=True)
    assert_close(dz, golden["dz"], GRADIENTS, "dz")
    assert_gradients(G, gradients, golden, meta, draw)


@pytest.mark.parametrize("name", STEMS)
def test_path_length_through_both_networks(name, draw, generator_fill):
    """Needs the gradient of the gradient with respect to the style vectors."""
    G, golden, meta = build(name, generator_fill)
    num_samples = len(golden["z"]) // 2
    ws = G.mapping(golden["z"][:num_samples], one_hot(golden, meta)[:num_samples])
    images = G.synthesis(ws)
    noise = golden["pl_noise_raw"] / math.sqrt(images.shape[2] * images.shape[3])
    (pl_grads,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    lengths = pl_grads.square().sum(dim=2).mean(dim=1).sqrt()
    pl_mean = golden["pl_mean_in"].lerp(lengths.mean(), meta["pl"]["pl_decay"])
    penalty = (lengths - pl_mean).square()
    loss = (penalty * meta["pl"]["pl_weight"]).mean()
    for key, actual in (
        ("pl_grads", pl_grads),
        ("pl_lengths", lengths),
        ("pl_mean_out", pl_mean),
        ("pl_penalty", penalty),
        ("pl_loss", loss),
    ):
        assert_close(actual, golden[key], GRADIENTS, key)
    gradients = torch.autograd.grad(loss, list(G.parameters()), allow_unused=True)
    # No gradient and a gradient of zero are one: the last bias is added to the image and has no second derivative.
    gradients = [
        torch.zeros_like(p) if g is None and name not in meta["pl_grad_none"] else g
        for g, (name, p) in zip(gradients, G.named_parameters(), strict=True)
    ]
    assert_gradients(G, gradients, golden, meta, draw, prefix="pl_")


@torch.no_grad()
def test_running_mean_of_w(case):
    G, golden, meta = case
    ws = G.mapping(golden["z"], one_hot(golden, meta), update_emas=True)
    assert_close(ws[:, 0], golden["ema_map/ws"], WS, "ws")
    assert_close(G.mapping.w_avg, golden["ema_map/w_avg"], WS, "w_avg")
    G.mapping.w_avg.zero_()
    G.mapping(golden["z"], one_hot(golden, meta))
    assert not G.mapping.w_avg.any()


@torch.no_grad()
def test_running_magnitudes(case):
    G, golden, meta = case
    images = G(golden["z"], one_hot(golden, meta), update_emas=True)
    assert_close(images, golden["ema_all/img"], IMAGES, "img")
    assert_close(G.mapping.w_avg, golden["ema_all/w_avg"], WS, "w_avg")
    magnitudes = torch.stack([layer.magnitude_ema for layer in G.synthesis.layers])
    assert_close(magnitudes, golden["ema_all/magnitude_ema"], IMAGES, "magnitude_ema")


@torch.no_grad()
def test_update_precedes_truncation(case):
    G, golden, meta = case
    images = G(golden["z"], one_hot(golden, meta), truncation_psi=0.5, update_emas=True)
    assert_close(images, golden["ema_trunc/img"], IMAGES)


@pytest.mark.parametrize("key", ["case00", "case01", "case02"])
def test_synthesis_input(key):
    golden, all_meta = load_golden("g_ops_synthesis_input")
    meta = all_meta[key]
    width, height = (meta["size"], meta["size"]) if isinstance(meta["size"], int) else meta["size"]
    layer = SynthesisInput(
        meta["w_dim"], meta["channels"], width, height, meta["sampling_rate"], meta["bandwidth"]
    )
    names = {"affine.weight": "affine_weight", "affine.bias": "affine_bias"}
    layer.load_state_dict({name: golden[f"{key}/{names.get(name, name)}"] for name in layer.state_dict()})
    w = golden[f"{key}/w"].clone().requires_grad_()
    features = layer(w)
    assert_close(features, golden[f"{key}/out"], OPS_INPUT, "out")
    loss = (features * golden[f"{key}/r"]).sum()
    gradients = torch.autograd.grad(loss, [w, layer.weight, layer.affine.weight, layer.affine.bias])
    for name, gradient in zip(("dw", "dweight", "daffine_weight", "daffine_bias"), gradients, strict=True):
        assert_close(gradient, golden[f"{key}/{name}"], GRADIENTS, name)
