# SPDX-License-Identifier: MIT
"""Official snapshots: golden ones, and ones in their format that are written here, with every part a real one has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_utils.errors import UserError
from training.config import (
    GeneratorConfig,
    MappingConfig,
    SuperresConfig,
    SynthesisConfig,
)
from training.generator.generator import Generator
from training.network_io import build_generator, load_network, read_network

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
SNAPSHOTS = ("xl_stem", "san_stem", "xl_superres", "san_superres")
DEIT, LITE0 = "deit_tiny_distilled_patch16_224", "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def rule_filled(generator_fill):
    """rule_filled(name, shape, salt) -> float32 value of a tensor in golden snapshots; None for the derived ones."""

    def fill(name: str, shape: tuple[int, ...], salt: str) -> torch.Tensor | None:
        if name.endswith("magnitude_ema"):
            return torch.ones(())
        value = generator_fill(name, shape, salt)
        return None if value is None else value.float()

    return fill


def golden(name: str) -> tuple[dict, dict]:
    with np.load(DATA / f"g_snapshot_{name}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    return arrays, json.loads(str(arrays.pop("meta_json")))


def assert_images_match(G: Generator, arrays: dict, prefix: str) -> None:
    z, labels = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["labels"])
    with torch.no_grad():
        found = {
            "ws": (G.mapping(z, labels)[:, 0], 3e-6),
            "img": (G(z, labels), 1e-4),
            "img_psi07": (G(z, labels, truncation_psi=0.7), 1e-4),
        }
    for key, (value, tolerance) in found.items():
        expected = arrays[f"{prefix}/{key}"]
        error = np.abs(value.numpy() - expected).max() / np.abs(expected).max()
        assert error < tolerance, (key, error)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_golden_snapshots_make_the_official_images(name):
    arrays, meta = golden(name)
    stored = read_network(DATA / f"g_snapshot_{name}.pkl")
    for prefix, state in (("G", stored.G), ("G_ema", stored.G_ema)):
        G = build_generator(stored.generator_config, state, stored.path).eval()
        assert G.synthesis.layer_names == meta["layer_names"]
        assert G.num_ws == meta["num_ws"]
        assert_images_match(G, arrays, prefix)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_golden_weights_are_read_exactly(name, rule_filled):
    _, meta = golden(name)
    stored = read_network(DATA / f"g_snapshot_{name}.pkl")
    for prefix, state in (("G/", stored.G), ("Gema/", stored.G_ema)):
        assert {k: list(x.shape) for k, x in state.items()} == meta["parameters"] | meta["buffers"]
        for key, value in state.items():
            expected = rule_filled(key, value.shape, meta["salt"] + prefix)
            assert value.dtype == torch.float32 and value.is_contiguous()
            assert expected is None or torch.equal(value, expected), key


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_golden_filters_are_those_of_our_plan(name):
    stored = read_network(DATA / f"g_snapshot_{name}.pkl")
    designed = Generator(stored.generator_config).state_dict()
    for key, value in stored.G_ema.items():
        if key.endswith("_filter"):
            torch.testing.assert_close(value, designed[key], rtol=1e-6, atol=1e-7)


def test_golden_configurations():
    stem = read_network(DATA / "g_snapshot_san_stem.pkl").generator_config
    assert stem.synthesis.use_radial_filters and stem.synthesis.conv_kernel == 1
    assert (stem.mapping.num_embeddings, stem.mapping.embedding_dim) == (16, 24)
    assert stem.synthesis.magnitude_ema_beta == pytest.approx(0.5 ** (64 / 20000))
    superres = read_network(DATA / "g_snapshot_san_superres.pkl").generator_config
    stage = SuperresConfig(up_factor=2, head_layers=4, conv_kernel=1, use_radial_filters=True)
    assert superres == replace(stem, superres=(stage,))


def test_golden_progress_is_told():
    info = read_network(DATA / "g_snapshot_xl_superres.pkl").info
    assert (info["cur_nimg"], info["cur_tick"], info["best_fid"]) == (1550032, 387, 9.25)
    assert info["source"] == "official StyleGAN-XL pickle"
    assert read_network(DATA / "g_snapshot_san_stem.pkl").info["source"] == "official StyleSAN-XL pickle"
    assert info["training_set"]["resolution"] == 32 and info["training_set"]["use_labels"] is True
    json.dumps(info)


def test_a_miniature_discriminator_is_left_out_with_a_reason():
    stored = read_network(DATA / "g_snapshot_xl_stem.pkl")
    assert stored.D is None and stored.discriminator_config is None and stored.head_kind is None
    assert stored.info["discriminator"].startswith("left out: D ")


def test_reads_where_nothing_that_the_file_names_can_be_imported():
    code = (
        "import sys\n"
        "for name in ('timm', 'dill', 'dnnlib', 'pg_modules', 'feature_networks', 'numpy.core', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "before = set(sys.modules)\n"
        "import torch\n"
        "from training.network_io import read_network\n"
        f"stored = read_network({str(DATA / 'g_snapshot_xl_stem.pkl')!r})\n"
        "new = set(sys.modules) - before\n"
        "assert not [n for n in new if 'persistence' in n or n == 'pickle_source']\n"
        "print(len(stored.G_ema))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "61", result.stderr


# Files written here.


def tiny_config(c_dim: int = 3, superres: tuple[SuperresConfig, ...] = (), **synthesis) -> GeneratorConfig:
    mapping = MappingConfig(z_dim=6, w_dim=8, c_dim=c_dim, num_embeddings=5, embedding_dim=4)
    values = {"img_resolution": 16, "channel_base": 128, "channel_max": 6, "num_layers": 6, "margin_size": 4}
    return GeneratorConfig(
        mapping=mapping, synthesis=SynthesisConfig(**(values | synthesis)), superres=superres
    )


def tiny_generator(config: GeneratorConfig) -> Generator:
    G = Generator(config).eval()
    G.mapping.w_avg.normal_()
    return G


def assert_same_images(G: Generator, loaded: Generator) -> None:
    z, labels = torch.randn(2, G.z_dim), torch.tensor([0, 1]) if G.c_dim else None
    with torch.no_grad():
        assert torch.equal(G(z, labels, truncation_psi=0.7), loaded(z, labels, truncation_psi=0.7))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_snapshots_of_every_protocol(tmp_path, official, protocol):
    G = tiny_generator(tiny_config())
    content = {"G_ema": official.generator(G, official.EasyDict)}
    path = official.write(tmp_path / "net.pkl", content, protocol)
    stored = read_network(path)
    assert stored.generator_config == G.cfg
    assert stored.G is None and stored.D is None
    assert_same_images(G, load_network(path))


def test_a_true_size_class_table(tmp_path, official, rule_filled):
    """Official weights by rule and official images, in a file written here: 2.6 MB for a table need not be stored."""
    arrays, meta = golden("xl_stem_full")
    config = tiny_config(c_dim=10, margin_size=10, channel_base=96, channel_max=16)
    config = replace(config, mapping=MappingConfig(z_dim=64, w_dim=32, c_dim=10))
    G = Generator(config).eval()
    state = G.state_dict()
    assert {k: list(x.shape) for k, x in state.items()} == meta["parameters"] | meta["buffers"]
    filled = {k: rule_filled(k, x.shape, f"{meta['salt']}Gema/") for k, x in state.items()}
    G.load_state_dict({k: state[k] if x is None else x for k, x in filled.items()})
    path = official.write(tmp_path / "net.pkl", {"G_ema": official.generator(G)})
    assert load_network(path).cfg == config
    assert_images_match(load_network(path), arrays, "G_ema")


STAGE = SuperresConfig(up_factor=2, head_layers=4)
CHAINS = {
    "one": (STAGE,),
    "two": (STAGE, STAGE),
    "other depths": (replace(STAGE, head_layers=7), replace(STAGE, up_factor=4, head_layers=5)),
    "shortest": (replace(STAGE, head_layers=3), replace(STAGE, head_layers=3), STAGE),
    "factor 4 is not 2 and 2": (replace(STAGE, up_factor=4), STAGE),
    "kernels of both kinds": (
        replace(STAGE, conv_kernel=1, use_radial_filters=True, conv_clamp=128.0),
        STAGE,
    ),
    "six": (replace(STAGE, head_layers=7),) * 6,
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_stages_are_found(tmp_path, official, name):
    G = tiny_generator(tiny_config(superres=CHAINS[name], channel_base=2048))
    path = official.write(tmp_path / "net.pkl", {"G": official.generator(G), "G_ema": official.generator(G)})
    loaded = load_network(path)
    assert loaded.cfg == G.cfg
    for key, value in G.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_num_fp16_res_zero_and_no_clamp(tmp_path, official):
    G = tiny_generator(tiny_config(num_fp16_res=0, conv_clamp=None))
    assert load_network(official.write(tmp_path / "net.pkl", {"G_ema": official.generator(G)})).cfg == G.cfg


@pytest.mark.parametrize("radial", [False, True])
def test_unconditional_stylegan3(tmp_path, official, radial):
    kernel = 1 if radial else 3
    config = tiny_config(c_dim=0, conv_kernel=kernel, use_radial_filters=radial)
    mapping = MappingConfig(z_dim=8, w_dim=8, num_embeddings=0, embedding_dim=1)
    G = tiny_generator(replace(config, mapping=mapping))
    path = official.write(tmp_path / "net.pkl", {"G_ema": official.generator(G, is_stylegan3=True)})
    assert read_network(path).generator_config == G.cfg
    assert read_network(path).info["source"] == "official StyleGAN3 pickle"
    assert_same_images(G, load_network(path))


def test_half_precision_files_become_float32(tmp_path, official):
    G = tiny_generator(tiny_config()).half()
    state = read_network(official.write(tmp_path / "net.pkl", {"G_ema": official.generator(G)})).G_ema
    assert all(
        torch.equal(state[k], x.float()) and state[k].dtype == torch.float32
        for k, x in G.state_dict().items()
    )


# What is refused.


def stylegan2(official) -> object:
    block = official.node("SynthesisBlock", nn.Module())
    synthesis = official.node("SynthesisNetwork", nn.Module(), {"b4": block, "b8": block})
    return {"G_ema": official.node("Generator", nn.Module(), {"synthesis": synthesis})}


def fastgan(official) -> object:
    synthesis = official.node("FastganSynthesis", nn.Module(), {"init": nn.Module(), "feat_8": nn.Module()})
    return {
        "G_ema": official.node("Generator", nn.Module(), {"mapping": nn.Module(), "synthesis": synthesis})
    }


def conditional_stylegan3(official) -> object:
    G = official.generator(tiny_generator(tiny_config()))
    mapping = G.state["_modules"]["mapping"].state["_modules"]
    mapping["embed"] = mapping.pop("embed_proj")
    return {"G_ema": G}


def tensorflow(official) -> object:
    return official.Network(), official.Network(), official.Network()


def other_network(official) -> object:
    return {"G_ema": nn.Sequential(nn.Linear(2, 2))}


def weights_only(official) -> object:
    return {"G_ema": {"weight": torch.ones(2)}}


def list_of_numbers(official) -> object:
    return [1, 2, 3]


def changed(module: str, **attributes):
    """A snapshot whose `module` (a dotted path) says something else about itself."""

    def content(official) -> object:
        G = official.generator(tiny_generator(tiny_config(superres=(STAGE,))))
        target = G
        for name in module.split(".") if module else []:
            target = target.state["_modules"][name]
        for key, value in attributes.items():
            target.state[key] = value
        return {"G_ema": G}

    return content


def different_networks(official) -> object:
    G, G_ema = (tiny_generator(tiny_config(channel_max=n)) for n in (5, 6))
    return {"G": official.generator(G), "G_ema": official.generator(G_ema)}


def misshapen(official) -> object:
    G = official.generator(tiny_generator(tiny_config()))
    G.state["_modules"]["mapping"].state["_buffers"]["w_avg"] = torch.zeros(7)
    return {"G_ema": G}


FIRST = "synthesis.L0_24_6"
REFUSED = {
    "stylegan2": (stylegan2, "G_ema is a StyleGAN2 generator; only StyleGAN-XL"),
    "fastgan": (fastgan, "FastGAN generator"),
    "conditional stylegan3": (conditional_stylegan3, "conditional StyleGAN3 generator"),
    "tensorflow": (tensorflow, "TensorFlow StyleGAN network"),
    "another network": (other_network, "unknown Sequential"),
    "weights only": (weights_only, "no network G_ema"),
    "numbers": (list_of_numbers, "no network G_ema"),
    "different networks": (different_networks, "G and G_ema are different networks"),
    "misshapen": (misshapen, r"'mapping.w_avg' has shape \(7,\)"),
    "padding": (changed(FIRST, padding=[1, 2, 3, 4]), r"L0_24_6.padding is not the \["),
    "cutoff": (changed(FIRST, in_cutoff=1.9), "in_cutoff is not the 2.0"),
    "clamp": (changed("synthesis.L9_32_3", conv_clamp=None), "L9_32_3.conv_clamp is not"),
    "no number": (changed("mapping", z_dim="six"), "G_ema.mapping.z_dim is not a finite number"),
    "fraction": (changed("mapping", z_dim=6.5), "G_ema.mapping.z_dim is 6.5, not a whole number"),
    "not a number": (changed("mapping", w_avg_beta=float("nan")), "w_avg_beta is not a finite number"),
    "huge": (changed("mapping", w_dim=1 << 40), "w_dim is 1099511627776"),
    "many layers": (changed("mapping", num_layers=100000), "has 100000 layers"),
    "endless filters": (changed(FIRST, filter_size=100000), "layers or filters of no network"),
    "no layers": (changed("synthesis", layer_names=[]), "layer_names are not its layers"),
    "no chain": (changed("", up_factor=4), "no chain of super-resolution stages"),
    "zero channels": (changed("synthesis", channel_base=0), "cannot be rebuilt"),
    "negative cutoff": (changed("synthesis", first_stopband=-1.0), "cannot be rebuilt"),
    "no table": (changed("mapping", _modules=None), "no usable _modules"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused_in_one_line(tmp_path, official, name):
    make, message = REFUSED[name]
    path = official.write(tmp_path / "net.pkl", make(official))
    with pytest.raises(UserError, match=message) as error:
        stored = read_network(path)
        build_generator(stored.generator_config, stored.G_ema, stored.path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_module_that_contains_itself_is_refused(tmp_path, official):
    G = nn.Sequential(nn.Linear(2, 2))
    G.__dict__["_modules"]["again"] = G
    snapshot = {"G_ema": official.generator(tiny_generator(tiny_config()))}
    snapshot["G_ema"].state["_modules"]["other"] = G
    with pytest.raises(UserError, match="more modules than a network"):
        read_network(official.write(tmp_path / "net.pkl", snapshot))


def test_views_of_one_storage_cannot_multiply(tmp_path, official, monkeypatch):
    monkeypatch.setattr("training.official_network._REPEATED_BYTES", 1 << 16)
    whole = torch.zeros(1 << 16)
    snapshot = {"G_ema": official.generator(tiny_generator(tiny_config()))}
    buffers = {f"repeated{i}": whole for i in range(20)}
    snapshot["G_ema"].state["_modules"]["mapping"].state["_buffers"].update(buffers)
    with pytest.raises(UserError, match="G_ema claims more numbers than the file has"):
        read_network(official.write(tmp_path / "net.pkl", snapshot))
