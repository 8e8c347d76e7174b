# SPDX-License-Identifier: MIT
"""Super-resolution stages: what comes from the stem, what is trained, and how a better stem gets under a stage.

pytest tests/training/test_superres.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training.config import (
    ConfigError,
    GeneratorConfig,
    LossConfig,
    MappingConfig,
    SuperresConfig,
    SynthesisConfig,
    TrainConfig,
)
from training.dataset import open_dataset
from training.generator.generator import Generator
from training.initialization import build_networks
from training.network_io import read_network, save_network
from training.presets import quickstart
from training.run_options import RunOptions
from training.superres import copy_stem_, freeze_stem_, load_stem
from training.training_loop import Trainer

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
STEM = GeneratorConfig(
    mapping=MappingConfig(z_dim=4, w_dim=8, c_dim=3, num_embeddings=4),
    synthesis=SynthesisConfig(
        img_resolution=8,
        channel_base=128,
        channel_max=8,
        num_layers=5,
        margin_size=2,
        first_cutoff=1.0,
        first_stopband=1.9,
        num_fp16_res=0,
    ),
)
STAGE = replace(STEM, superres=(SuperresConfig(up_factor=2, head_layers=4),))
BELOW = ("mapping.", "synthesis.input.", "synthesis.L0_", "synthesis.L1_", "synthesis.L2_")


def build(cfg: GeneratorConfig, seed: int) -> Generator:
    """A generator with no tensor at a trivial initial value."""
    torch.manual_seed(seed)
    G = Generator(cfg)
    with torch.no_grad():
        G.mapping.w_avg.normal_()
        G.synthesis.input.affine.weight.normal_(std=0.3)
        for layer in G.synthesis.layers:
            layer.bias.normal_(std=0.1)
            layer.magnitude_ema.uniform_(0.5, 2)
    return G


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def stem_file(tmp_path):
    """A stem's network file whose G and G_ema differ."""
    path = tmp_path / "stem.safetensors"
    save_network(path, build(STEM, seed=1), G=build(STEM, seed=2))
    return path


@pytest.fixture
def make_config(tiny_discriminator_config):
    """make_config(stem_file, **changes) -> TrainConfig of a stage on it."""

    def make(stem_file: Path, **changes) -> TrainConfig:
        return replace(
            quickstart(),
            generator=STAGE,
            discriminator=tiny_discriminator_config(3),
            loss_terms=LossConfig(pl_weight=0.0, blur_init_sigma_px=0.0),
            path_stem=str(stem_file),
            embedding_source="stem",
            batch_size=6,
            microbatch_size=3,
            metrics=(),
            evaluate_at_start=False,
            **changes,
        )

    return make


@pytest.fixture
def dataset(tiny_folder):
    return open_dataset(tiny_folder, use_labels=True)


def make_trainer(config, dataset, tmp_path) -> Trainer:
    config = replace(config, data=replace(config.data, num_workers=0))
    return Trainer(config, dataset, CPU, RunOptions(outdir=str(tmp_path / "runs"), description="stage"))


# What is trained.


def test_parameters_that_train_are_the_official_ones():
    with np.load(DATA / "d_superres_trainable.npz") as file:
        golden = {key: json.loads(str(file[key])) for key in file.files}
    synthesis = SynthesisConfig(img_resolution=16, channel_max=8, num_layers=6)
    stem = GeneratorConfig(mapping=MappingConfig(c_dim=3), synthesis=synthesis)
    assert Generator(stem).synthesis.layer_names == golden["stem_layer_names"]
    G = Generator(replace(stem, superres=(SuperresConfig(up_factor=2, head_layers=4),)))
    assert G.synthesis.layer_names == golden["superres_layer_names"]
    assert [layer.name for layer in G.synthesis.plan.head] == golden["head_layer_names"]
    assert [name for name, _ in G.named_parameters()] == golden["all_params"]
    freeze_stem_(G, trains_stem_input=True)
    G(torch.randn(2, 64), torch.tensor([0, 2])).square().sum().backward()
    assert [name for name, p in G.named_parameters() if p.grad is not None] == golden["params_with_grad"]


@pytest.mark.parametrize("trains_stem_input", [False, True])
def test_steps_move_the_head_and_leave_the_stem_bit_for_bit(
    stem_file, dataset, tmp_path, trains_stem_input, make_config
):
    trainer = make_trainer(make_config(stem_file, trains_stem_input=trains_stem_input), dataset, tmp_path)
    trained = {name for name, p in trainer.G.named_parameters() if p.requires_grad}
    below = {name for name, _ in trainer.G.named_parameters() if name.startswith(BELOW)}
    inputs = {name for name in below if name.startswith("synthesis.input.")}
    assert trained == ({n for n, _ in trainer.G.named_parameters()} - below) | (
        inputs if trains_stem_input else set()
    )
    before, before_ema = snapshot(trainer.G), snapshot(trainer.G_ema)
    for _ in range(3):
        trainer.iterate()
    # Running means of w go on, as the official discriminator step has it.
    assert differing(before, snapshot(trainer.G)) == trained | {"mapping.w_avg"}
    assert differing(before_ema, snapshot(trainer.G_ema)) == trained | {"mapping.w_avg"}
    optimized = [p for group in trainer.G_optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(trained) == len(trainer.G_optimizer.state)
    assert all(p.grad is None for p in trainer.G.parameters() if not p.requires_grad)


def test_steps_on_a_stem_train_everything(dataset, tmp_path, stem_file, make_config):
    stem = replace(STEM, synthesis=replace(STEM.synthesis, img_resolution=16))
    config = replace(make_config(stem_file), generator=stem, path_stem=None, embedding_source="random")
    trainer = make_trainer(config, dataset, tmp_path)
    assert not config.trains_head_only and all(p.requires_grad for p in trainer.G.parameters())


# What comes from the stem.


@pytest.mark.parametrize("psi", [1.0, 0.6])
@torch.no_grad()
def test_a_fresh_stage_equals_its_stem_up_to_the_cut(stem_file, dataset, psi, make_config):
    networks, origin = build_networks(make_config(stem_file), dataset, CPU)
    assert f"{stem_file}: 3 layers kept" in origin and "5 layers in the head" in origin
    z, c = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    maps = []
    for network in (build(STEM, seed=1), networks.G, networks.G_ema):  # the stem's moving average, not its G
        network.synthesis.layers[2].register_forward_hook(lambda _module, _args, out: maps.append(out))
        images = network(z, c, truncation_psi=psi)
    assert maps[0].any() and torch.equal(maps[1], maps[0]) and torch.equal(maps[2], maps[0])
    assert images.shape == (4, 3, 16, 16) and images.isfinite().all()
    assert not differing(snapshot(networks.G), snapshot(networks.G_ema))


def test_stages_on_stages(tmp_path):
    """A stage's file is a stem for the next one; heads may be of another kind than their stem."""
    kinds = ((1, True), (3, False), (1, True))
    config, G = STEM, build(STEM, seed=1)
    for seed, (kernel, is_radial) in enumerate(kinds):
        head = SuperresConfig(up_factor=2, head_layers=3, conv_kernel=kernel, use_radial_filters=is_radial)
        config = replace(config, superres=(*config.superres, head))
        above = build(config, seed=10 + seed)
        copy_stem_(above, G)
        kept = tuple(f"synthesis.{layer.name}." for layer in above.synthesis.plan.kept)
        same = {name for name, x in G.state_dict().items() if name.startswith((*kept, *BELOW[:2]))}
        assert same and all(torch.equal(above.state_dict()[n], G.state_dict()[n]) for n in same)
        G = above
        path = tmp_path / f"{seed}.safetensors"
        save_network(path, G)
        stored = read_network(path)
        assert (
            stored.generator_config == config and stored.generator_config.img_resolution == G.img_resolution
        )
    assert G.img_resolution == 64
    assert G(torch.randn(1, 4), torch.tensor([1])).shape == (1, 3, 64, 64)


def test_class_embeddings_come_from_the_stem(stem_file, dataset, make_config):
    config = make_config(stem_file, loss="gan")
    networks, _ = build_networks(config, dataset, CPU)
    expected = build(STEM, seed=1).mapping.embed.weight
    tables = [m.weight for m in networks.D.heads.modules() if isinstance(m, torch.nn.Embedding)]
    assert len(tables) == 2
    for table in (networks.G.mapping.embed.weight, *tables):
        assert torch.equal(table, expected)


def test_other_embeddings_are_for_the_discriminator_only(stem_file, dataset, tmp_path, make_config):
    rows = torch.randn(3, 320)
    np.save(tmp_path / "rows.npy", rows.numpy())
    config = replace(make_config(stem_file, loss="gan"), embedding_source=str(tmp_path / "rows.npy"))
    networks, _ = build_networks(config, dataset, CPU)
    assert torch.equal(networks.G.mapping.embed.weight, build(STEM, seed=1).mapping.embed.weight)
    for table in (m for m in networks.D.heads.modules() if isinstance(m, torch.nn.Embedding)):
        assert torch.equal(table.weight[:3], rows)


# A better stem under a stage.


@pytest.mark.parametrize("trains_stem_input", [False, True])
def test_a_better_stem_replaces_what_is_frozen(stem_file, dataset, tmp_path, trains_stem_input, make_config):
    trained = tmp_path / "stage.safetensors"
    save_network(trained, build(STAGE, seed=3), G=build(STAGE, seed=4))
    config = make_config(stem_file, trains_stem_input=trains_stem_input)
    networks, origin = build_networks(replace(config, resume=str(trained)), dataset, CPU)
    assert str(trained) in origin and str(stem_file) in origin
    replaced = BELOW if not trains_stem_input else tuple(p for p in BELOW if p != "synthesis.input.")
    stem = snapshot(build(STEM, seed=1))
    for G, seed in ((networks.G_ema, 3), (networks.G, 4)):
        stage = snapshot(build(STAGE, seed=seed))
        for name, tensor in G.state_dict().items():
            source = stem if name.startswith(replaced) else stage
            assert torch.equal(tensor, source[name]), name
    names = {name for name, p in networks.G.named_parameters() if p.requires_grad}
    assert any(n.startswith("synthesis.input.") for n in names) == trains_stem_input


def test_a_stage_of_another_shape_does_not_resume(stem_file, dataset, tmp_path, make_config):
    other = replace(STEM, superres=(SuperresConfig(up_factor=2, head_layers=5),))
    save_network(tmp_path / "other.safetensors", Generator(other))
    config = make_config(stem_file, resume=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="head_layers=5, this run asks for 4") as caught:
        build_networks(config, dataset, CPU)
    assert "\n" not in str(caught.value)


# Refusals.


def test_a_stem_that_the_stage_was_not_set_up_for_is_refused(stem_file, tmp_path, make_config):
    config = make_config(stem_file)
    below = load_stem(config)
    assert not differing(snapshot(below), snapshot(build(STEM, seed=1)))
    narrower = replace(STEM, synthesis=replace(STEM.synthesis, channel_max=4))
    save_network(tmp_path / "other.safetensors", Generator(narrower))
    with pytest.raises(UserError, match=r"other\.safetensors is not the network that this stage"):
        load_stem(replace(config, path_stem=str(tmp_path / "other.safetensors")))
    faster = replace(STAGE, synthesis=replace(STAGE.synthesis, num_fp16_res=4))
    load_stem(replace(config, generator=faster))  # precision is no property of the weights


def test_contradictions_are_refused(stem_file, make_config):
    config = make_config(stem_file)
    config.validate()
    with pytest.raises(ConfigError, match="belongs to a super-resolution stage"):
        replace(config, generator=STEM).validate()
    with pytest.raises(ConfigError, match=r"pl_weight=2\.0.*set it to 0"):
        replace(config, loss_terms=LossConfig(pl_weight=2.0)).validate()
