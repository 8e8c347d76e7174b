# SPDX-License-Identifier: MIT
"""Network files: what is written comes back, without timm, and every unusable file is refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from torch_utils.errors import UserError
from training import network_io
from training.config import (
    DataConfig,
    DiscriminatorConfig,
    OptimizerConfig,
    TrainConfig,
)
from training.generator.generator import Generator
from training.network_io import NetworkFileError, load_network, read_info, read_network, save_network

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
INFO = {"cur_nimg": 1200, "class_names": ["cat", "dog"], "metrics": {"fd_lite0": 12.5}}


@pytest.fixture
def generator_config(tiny_generator_config):
    """Of two classes."""
    return tiny_generator_config(c_dim=2)


@pytest.fixture
def train_config(generator_config):
    return TrainConfig(
        data=DataConfig(path="digits"),
        generator=generator_config,
        discriminator=DiscriminatorConfig(img_resolution=16),
        generator_optimizer=OptimizerConfig(lr=0.1),
        discriminator_optimizer=OptimizerConfig(lr=0.2),
        batch_size=4,
        microbatch_size=2,
        ema_halflife_kimg=1.0,
    )


@pytest.fixture(name="G")
def generator(generator_config):
    G = Generator(generator_config)
    G.mapping.w_avg.normal_()
    return G


@pytest.fixture
def file(tmp_path, G):
    path = tmp_path / "net.safetensors"
    save_network(path, G, info=INFO)
    return path


def rewrite(path, tensors=None, **metadata):
    """Write the file again with other tensors or changed metadata (None removes an entry)."""
    with safe_open(path, "pt") as f:
        old = f.metadata()
    tensors = load_file(path) if tensors is None else tensors
    metadata = {k: v for k, v in (old | metadata).items() if v is not None}
    save_file(tensors, path, metadata=metadata)


def assert_same_state(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("c_dim", [0, 2])
@pytest.mark.parametrize("use_radial_filters", [False, True])
def test_loaded_generator_makes_the_same_images(tmp_path, c_dim, use_radial_filters, tiny_generator_config):
    G = Generator(tiny_generator_config(c_dim, use_radial_filters=use_radial_filters)).eval()
    G.mapping.w_avg.normal_()
    save_network(tmp_path / "net.safetensors", G)
    loaded = load_network(tmp_path / "net.safetensors")
    assert_same_state(dict(sorted(G.state_dict().items())), dict(sorted(loaded.state_dict().items())))
    z, labels = torch.randn(3, 4), torch.tensor([0, 1, 1]) if c_dim else None
    with torch.no_grad():
        assert torch.equal(G(z, labels, truncation_psi=0.5), loaded(z, labels, truncation_psi=0.5))


def test_loaded_generator_is_ready_to_sample(file, generator_config):
    loaded = load_network(file)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.cfg == generator_config


def test_everything_comes_back(tmp_path, G, generator_config, train_config):
    path = tmp_path / "net.safetensors"
    trained = Generator(generator_config)
    D_state = {
        "head.weight": torch.randn(3, 4).T,  # not contiguous
        "half": torch.ones(2, dtype=torch.bfloat16),
        "num_batches_tracked": torch.tensor(7),
        "absent": None,
    }
    save_network(path, G, G=trained, D_state=D_state, config=train_config, info=INFO)
    stored = read_network(path)
    assert stored.generator_config == generator_config
    assert stored.train_config == train_config
    assert stored.info == INFO
    assert stored.path == path
    for state, module in ((stored.G_ema, G), (stored.G, trained)):
        assert all(torch.equal(state[name], x) for name, x in module.state_dict().items())
    assert set(stored.D) == {"head.weight", "half", "num_batches_tracked"}
    assert torch.equal(stored.D["head.weight"], D_state["head.weight"])
    assert stored.D["half"].dtype == torch.float32 and stored.D["num_batches_tracked"].dtype == torch.int64


def test_absent_parts_are_none(file):
    stored = read_network(file)
    assert stored.G is None and stored.D is None and stored.train_config is None


def test_tensors_that_share_memory_are_stored_apart(tmp_path, G):
    whole = torch.arange(6.0)
    save_network(tmp_path / "net.safetensors", G, D_state={"a": whole, "b": whole[2:], "c": whole})
    D = read_network(tmp_path / "net.safetensors").D
    assert D["a"].tolist() == D["c"].tolist() == whole.tolist() and D["b"].tolist() == [2, 3, 4, 5]


def test_saving_does_not_change_the_network(file, G):
    before = {name: x.clone() for name, x in G.state_dict().items()}
    save_network(file, G, dtype=torch.float16)
    assert_same_state(before, G.state_dict())
    assert G.training and all(p.requires_grad for p in G.parameters())


def test_float16_files_are_smaller_and_load_as_float32(tmp_path, file, G):
    compact = tmp_path / "compact.safetensors"
    save_network(compact, G, dtype=torch.float16)
    loaded = load_network(compact)
    assert compact.stat().st_size < 0.8 * file.stat().st_size
    for name, x in G.state_dict().items():
        y = loaded.state_dict()[name]
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, x, rtol=2**-10, atol=1e-6)
    assert torch.equal(loaded.synthesis.input.freqs, G.synthesis.input.freqs)  # buffers stay exact


def test_values_too_large_for_float16_are_refused(tmp_path, G):
    with torch.no_grad():
        G.mapping.fc0.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"'mapping.fc0.weight' do not fit into torch.float16"):
        save_network(tmp_path / "net.safetensors", G, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(file, G):
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save_network(file, G, info={"bad": object()})
    assert file.read_bytes() == before


def test_loading_leaves_the_random_state_alone(file):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    load_network(file)
    assert torch.equal(torch.randn(3), expected)


def test_loads_and_samples_without_timm(file):
    code = (
        "import sys; sys.modules['timm'] = None; import torch; "
        f"from training.network_io import load_network; G = load_network({str(file)!r}); "
        " print(tuple(G(torch.randn(2, G.z_dim), torch.tensor([0, 1])).shape))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "(2, 3, 16, 16)", result.stderr


def test_built_in_network(monkeypatch, file, tmp_path, generator_config):
    monkeypatch.setitem(network_io.BUILTIN_NETWORKS, "digits", file)
    assert load_network("digits").cfg == generator_config
    monkeypatch.setitem(network_io.BUILTIN_NETWORKS, "digits", tmp_path / "absent.safetensors")
    with pytest.raises(NetworkFileError, match="built-in network 'digits' is missing"):
        load_network("digits")


def missing(path):
    path.unlink()


def text_file(path):
    path.write_text("this is a text file and no network at all")


def empty(path):
    path.write_bytes(b"")


def header_cut(path):
    path.write_bytes(path.read_bytes()[:100])


def data_cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def damaged_header(path):
    data = path.read_bytes()
    path.write_bytes(data[:9] + b"]" + data[10:])


def foreign(path):
    save_file({"weight": torch.ones(2)}, path)


def future_version(path):
    rewrite(path, format_version="99")


def without_generator(path):
    rewrite(path, generator=None)


def unknown_field(path):
    with safe_open(path, "pt") as f:
        config = json.loads(f.metadata()["generator"])
    config["synthesis"]["sharpness"] = 1
    rewrite(path, generator=json.dumps(config))


def lacking_tensor(path):
    tensors = load_file(path)
    del tensors["G_ema.mapping.fc0.weight"]
    rewrite(path, tensors)


def additional_tensor(path):
    rewrite(path, load_file(path) | {"G_ema.mapping.fc9.weight": torch.ones(1)})


def misshapen_tensor(path):
    rewrite(path, load_file(path) | {"G_ema.mapping.fc0.bias": torch.ones(9)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "does not exist; give a .safetensors or official .pkl file"),
        (text_file, "is not a .safetensors file"),
        (empty, "is not a .safetensors file"),
        (header_cut, "is truncated"),
        (data_cut, "is truncated"),
        (damaged_header, "header is damaged"),
        (foreign, "is not a network of this project"),
        (future_version, "has format version 99, this code reads 1"),
        (without_generator, "generator configuration cannot be used"),
        (unknown_field, "no field 'sharpness'"),
        (lacking_tensor, r"lacks tensor 'mapping.fc0.weight' \(1 in all\)"),
        (additional_tensor, "unknown tensor 'mapping.fc9.weight'"),
        (misshapen_tensor, r"'mapping.fc0.bias' has shape \(9,\), expected \(8,\)"),
    ],
)
def test_unusable_files_are_refused_in_one_line(file, damage, message):
    damage(file)
    with pytest.raises(NetworkFileError, match=message) as error:
        load_network(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_addresses_must_be_safe_and_allowed(monkeypatch):
    monkeypatch.delenv("STYLESAN_OFFLINE", raising=False)
    for read in (load_network, read_network, read_info):
        with pytest.raises(UserError, match="only https addresses are fetched"):
            read("http://example.org/net.pkl")
        with pytest.raises(UserError, match="has not been downloaded yet, and downloads are off"):
            read("https://example.org/net.safetensors", offline=True)


def test_the_kind_of_file_is_told_by_its_content(tmp_path, file, generator_config):
    renamed = file.rename(tmp_path / "net.pkl")
    assert load_network(renamed).cfg == generator_config
    official = tmp_path / "official.safetensors"
    shutil.copy(DATA / "g_snapshot_san_stem.pkl", official)
    assert (
        load_network(official).synthesis.layer_names
        == load_network(DATA / "g_snapshot_san_stem.pkl").synthesis.layer_names
    )
    assert read_info(official)["cur_nimg"] == 800000 and read_info(renamed) == INFO


def discriminator_without_a_run(path, G):
    config = DiscriminatorConfig(img_resolution=16, c_dim=2)
    save_network(path, G, D_state={"w": torch.ones(1)}, discriminator=(config, "gan"))
    return config


def test_a_discriminator_can_be_stored_without_a_run(tmp_path, G):
    config = discriminator_without_a_run(tmp_path / "net.safetensors", G)
    stored = read_network(tmp_path / "net.safetensors")
    assert (stored.discriminator_config, stored.head_kind) == (config, "gan")
    assert stored.train_config is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"train": "not JSON"},
        {"train": "[]"},
        {"train": json.dumps({"loss": "san"})},
        {"train": json.dumps({"loss": "wgan", "discriminator": {"img_resolution": 16}})},
        {"train": json.dumps({"loss": "san", "discriminator": {"sharpness": 1}})},
        {"train": json.dumps({"loss": "san", "discriminator": 3})},
        {"discriminator": json.dumps({"config": {"img_resolution": 16}})},
        {"info": "not JSON"},
        {"info": "[1]"},
    ],
)
def test_malformed_metadata_is_refused_in_one_line(tmp_path, metadata, generator_config):
    path = tmp_path / "net.safetensors"
    save_network(path, Generator(generator_config), D_state={"w": torch.ones(1)})
    rewrite(path, **metadata)
    with pytest.raises(NetworkFileError, match=re.escape(str(path))) as error:
        read_network(path)
    assert "\n" not in str(error.value)


def test_a_configuration_of_a_huge_network_allocates_nothing(file):
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["generator"])
    config["mapping"] |= {"w_dim": 1 << 20, "z_dim": 1 << 20}
    rewrite(file, generator=json.dumps(config))
    with pytest.raises(NetworkFileError, match="has shape"):
        load_network(file)  # a petabyte if it were built first


def test_a_folder_is_answered_with_a_file_in_it(tmp_path):
    with pytest.raises(NetworkFileError, match=r"is a folder; .*best_model\.safetensors"):
        load_network(tmp_path)
