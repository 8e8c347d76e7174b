# SPDX-License-Identifier: MIT
"""Fine-tuning an official checkpoint from the command line: the first images are its own, and what should move does."""

import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import train
from training.config import DiscriminatorConfig, TrainConfig, from_dict, from_json
from training.dataset import open_dataset
from training.discriminator.projected import ProjectedDiscriminator
from training.initialization import build_networks
from training.network_io import load_network, read_network
from training.official_globals import InertModule
from training.official_pickle import load_official_pickle
from training.snapshot import SampleGrid

pytestmark = pytest.mark.usefixtures("process_settings")
GOLDEN = Path(__file__).parents[1] / "data" / "g_snapshot_xl_stem.pkl"  # 16x16, 10 classes, table of 16 x 24
LITE0 = "tf_efficientnet_lite0"
DISCRIMINATOR = DiscriminatorConfig(
    img_resolution=16,
    c_dim=10,
    backbones=(LITE0,),
    projected_channels=8,
    max_head_channels=16,
    class_dim=12,
    num_class_embeddings=16,
    embedding_dim=24,
    official_batchnorm_statistics=True,
)
SHORT = (
    "--batch",
    4,
    "--kimg",
    0.008,
    "--tick",
    0.004,
    "--metrics",
    "none",
    "--workers",
    0,
    "--device",
    "cpu",
)


# An official file with a whole plain discriminator: the golden one with another D.


class OfficialPickler(pickle.Pickler):
    """Writes what `load_official_pickle` gave as it was, networks in the form of `torch_utils.persistence`."""

    def reducer_override(self, value):
        if not isinstance(value, InertModule):
            return NotImplemented
        state = {k: v for k, v in value.state.items() if not (isinstance(v, InertModule) and "." in v.name)}
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        source = "raise RuntimeError('this source must never be executed')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": value.name, "state": state}
        return rebuild, (meta,)


def official_name(name: str) -> str:
    """Official name of a tensor of our discriminator."""
    root, backbone, *rest = name.split(".")
    if root == "projectors":
        kind, level, tensor = rest
        return f"feature_networks.{backbone}.scratch.layer{level}_{kind}.{'out_conv.' if kind == 'csm' else ''}{tensor}"
    level, part, *rest = rest
    if part == "trunk":
        block, layer, tensor = rest
        return f"discriminators.{backbone}.mini_discs.{level}.main.{block}.main.{layer}.{tensor}"
    member = {"conv": "cls"}.get(rest[0], rest[0])
    return f"discriminators.{backbone}.mini_discs.{level}.{member}.{rest[-1]}"


def as_modules(root: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Nested modules that hold `tensors` under their dotted names."""
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(last, tensor)
    return root


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A StyleGAN-XL snapshot: golden G and G_ema, conditional plain heads on EfficientNet-Lite0."""
    path = tmp_path_factory.mktemp("official") / "official.pkl"
    ours = ProjectedDiscriminator(DISCRIMINATOR, "gan", pretrained=False)
    with torch.no_grad():
        ours(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 9]))  # BatchNorm statistics of some images
    snapshot = load_official_pickle(GOLDEN)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch_utils.persistence", "pg_modules", "pg_modules.discriminator"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        D_class = type("ProjectedDiscriminator", (nn.Module,), {"__module__": "pg_modules.discriminator"})
        sys.modules["pg_modules.discriminator"].ProjectedDiscriminator = D_class
        rebuild = type("_reconstruct_persistent_obj", (), {"__module__": "torch_utils.persistence"})
        sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
        D = as_modules(D_class(), {official_name(k): x for k, x in ours.trained_state_dict().items()})
        D.backbones, D.interp224, D.diffaug = [LITE0], True, True
        with open(path, "wb") as file:
            OfficialPickler(file, protocol=4).dump({"G": snapshot["G"], "D": D, "G_ema": snapshot["G_ema"]})
    stored = read_network(path)
    assert stored.discriminator_config == DISCRIMINATOR and stored.head_kind == "gan", stored.info
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def run(tmp_path: Path, *arguments: object) -> Path:
    """Run folder of a training command."""
    result = CliRunner().invoke(
        train.main, [str(a) for a in (*arguments, "--outdir", tmp_path / "runs")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def save_expected(path: Path, network: Path, data: Path, sources: list[int] | None) -> bytes:
    """The picture that a run on `data` starts with, made by the checkpoint itself; sources: its class of each class."""
    G_ema = load_network(network)
    grid = SampleGrid(open_dataset(data, use_labels=True), G_ema.z_dim, torch.device("cpu"))
    if sources is not None:
        grid.labels = torch.tensor(sources)[grid.labels]
    grid.save_fakes(path, G_ema)
    return path.read_bytes()


def tensors_of(path: Path) -> dict[str, Tensor]:
    stored = read_network(path)
    parts = {"G": stored.G, "G_ema": stored.G_ema, "D": stored.D}
    return {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}


# Runs.


def test_an_official_gan_becomes_a_san(official, tiny_zip, tmp_path):
    """No flag says what the layers are. Classes 0, 1, 2 of the data start as classes 4, 0, 9 of the file."""
    run_dir = run(
        tmp_path,
        *(
            "--resume",
            official,
            "--data",
            tiny_zip,
            "--loss",
            "san",
            "--classes-from",
            "4,0,9",
            "--freezed",
            1,
        ),
        *SHORT,
    )
    assert run_dir.name == "00000-san-finetune-tiny-gpus1-batch4"
    expected = save_expected(tmp_path / "expected.png", official, tiny_zip, [4, 0, 9])
    assert (run_dir / "fakes_init.png").read_bytes() == expected
    log = (run_dir / "log.txt").read_text()
    assert f"Starting from {official}: 16x16, 10 classes, plain GAN discriminator.\n" in log
    for line in (
        "class embedding          1       384  converted  as listed: from class 4, 0, 9",
        "last layers             20     14,192  converted  plain to SAN, same function; as listed: from class 4, 0, 9",
        "The first 1 blocks of every head of D stay as they are.",
    ):
        assert " ".join(line.split()) in " ".join(log.split()), line
    before, after = read_network(official), tensors_of(run_dir / "network-snapshot.safetensors")
    stored = {f"D.{k}": x for k, x in before.D.items()} | {f"G.{k}": x for k, x in before.G.items()}
    for name in (n for n in after if n in stored and after[n].is_floating_point() and "embed" not in n):
        is_fixed = ".projectors." in name or ".trunk.0." in name or name.endswith(
            ("_filter", "freqs", "phases", "transform", "magnitude_ema")
        )  # fmt: skip
        if "w_avg" not in name:
            assert torch.equal(after[name], stored[name]) == is_fixed, name
    rows = after["G.mapping.embed.weight"][:3] - before.G["mapping.embed.weight"][[4, 0, 9]]
    assert 0 < rows.abs().max() < 0.1  # two steps away
    config = from_json(TrainConfig, (run_dir / "training_options.json").read_text())
    assert (config.embedding_source, config.classes_from, config.frozen_head_blocks) == (
        "checkpoint",
        "4,0,9",
        1,
    )
    assert config.ema_rampup is None and config.generator.mapping.c_dim == 3


def test_our_own_file_needs_nothing_but_its_name(official, tiny_zip, tmp_path):
    first = run(
        tmp_path / "a",
        "--resume",
        official,
        "--data",
        tiny_zip,
        "--classes-from",
        "4,0,9",
        *SHORT,
        "--seed",
        3,
    )
    snapshot = first / "network-snapshot.safetensors"
    second = run(tmp_path / "b", "--resume", snapshot, "--kimg", 0.004)
    one, two = (from_json(TrainConfig, (d / "training_options.json").read_text()) for d in (first, second))
    assert (two.batch_size, two.data, two.generator, two.discriminator, two.loss) == (
        *(one.batch_size, one.data, one.generator, one.discriminator, one.loss),
    )
    log = (second / "log.txt").read_text()
    assert "converted" not in log and "re-initialised" not in log
    assert "classes 0 to 2 as they are" in log
    expected = save_expected(tmp_path / "expected.png", snapshot, tiny_zip, None)
    assert (second / "fakes_init.png").read_bytes() == expected


def test_generator_only_official_file_without_classes(write_dataset, tiny_images):
    """The golden file's D is not a whole one; the data has no labels: one class of ten goes on without a name."""
    data = write_dataset("plain.zip", tiny_images)
    result = invoke(
        "--resume", GOLDEN, "--data", data, "--classes-from", 7, "--backbones", LITE0, *SHORT, "-n"
    )
    assert result.exit_code == 0, result.output
    table = " ".join(result.output.split())
    assert "projection and heads" in table and "re-initialised left out: D is not a whole projected" in table
    assert "skipped this run has no classes" in table
    text, _ = json.JSONDecoder().raw_decode(result.output)
    config = from_dict(TrainConfig, text)
    assert config.generator.mapping.c_dim == 0 and config.discriminator.projected_channels == 64
    networks, _ = build_networks(config, open_dataset(data), torch.device("cpu"))
    z, w = torch.randn(4, 64), torch.full((4,), 7)
    for psi in (1.0, 0.7):
        expected = load_network(GOLDEN)(z, w, truncation_psi=psi)
        torch.testing.assert_close(
            networks.G_ema(z, None, truncation_psi=psi), expected, rtol=1e-4, atol=1e-4
        )


def test_super_resolution_chains_are_trained_as_a_whole(write_dataset):
    """Without --superres nothing is a stem: all layers of the file's chain go on, on images of its final size."""
    network = GOLDEN.with_name("g_snapshot_san_superres.pkl")
    files = {f"{i}.png": Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(10)}
    data = write_dataset("large.zip", files, {name: i for i, name in enumerate(files)})
    result = invoke("--resume", network, "--data", data, "--backbones", LITE0, *SHORT, "-n")
    assert result.exit_code == 0, result.output
    assert "classes 0 to 9 as they are" in result.output and "stem" not in result.output.split("}\n")[-1]
    config = from_dict(TrainConfig, json.JSONDecoder().raw_decode(result.output)[0])
    assert config.path_stem is None and config.generator.img_resolution == 32
    networks, _ = build_networks(config, open_dataset(data, use_labels=True), torch.device("cpu"))
    assert all(p.requires_grad for p in networks.G.parameters())
    z, labels = torch.randn(3, 64), torch.tensor([0, 9, 4])
    assert torch.equal(networks.G_ema(z, labels), load_network(network)(z, labels))
    assert (
        "has 1 super-resolution stages"
        in invoke(
            *("--superres", "--path_stem", network, "--resume", network, "--cfg", "stylegan3-t", "--data"),
            *(
                write_dataset("larger.zip", {"a.png": Image.new("RGB", (64, 64))}, {"a.png": 9}),
                "--cond",
                1,
                *SHORT,
            ),
        ).output
    )  # the file under a stage is not a file of the stage


def test_dry_run_shows_the_table_and_writes_nothing(official, tiny_zip, tmp_path):
    result = invoke(
        "--resume", official, "--data", tiny_zip, "--batch", 4, "--outdir", tmp_path / "runs", "-n"
    )
    assert result.exit_code == 0, result.output
    assert "mean of 10 classes" in result.output and "plain to SAN, same function" in result.output
    assert not (tmp_path / "runs").exists()
    config, _ = json.JSONDecoder().raw_decode(result.output)
    assert config["generator"]["synthesis"]["num_layers"] == 6 and config["discriminator"]["backbones"] == [
        LITE0
    ]
    assert config["data"]["use_labels"] is True and config["batch_size"] == 4


# Refusals, each before anything is written.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "4", "--syn_layers", "14"], "--syn_layers 14 contradicts --resume"),
        (
            ["--batch", "4", "--syn_layers", "14"],
            "which was built with --syn_layers 6; leave --syn_layers out",
        ),
        (["--batch", "4", "--cfg", "stylegan3-r"], "which was built with --cfg stylegan3-t"),
        (["--batch", "4", "--cbase", "1"], "which was built with --cbase 64"),
        (["--batch", "4", "--cmax", "512"], "which was built with --cmax 12"),
        (["--batch", "4", "--map-depth", "8"], "which was built with --map-depth 2"),
        (
            ["--batch", "4", "--official-bn", "0"],
            "whose discriminator was trained with 1; leave --official-bn out",
        ),
        (["--batch", "4", "--embedding", "data"], "leave --embedding out, and see --classes-from"),
        (["--batch", "4", "--classes-from", "names"], "has no class names"),
        (["--batch", "4", "--classes-from", "1,2"], "2 source classes for 3 classes"),
        (["--batch", "4", "--freezed", "9"], "--freezed 9: the heads of D have at most 4 blocks"),
        (
            ["--batch", "4", "--freezed", "1", "--backbones", "mobilenetv3_small_050"],
            "has no heads for mobilenetv3",
        ),
        ([], "--batch missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(official, tiny_zip, tmp_path, arguments, message):
    result = invoke("--resume", official, "--data", tiny_zip, "--outdir", tmp_path / "runs", *arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_flags_that_agree_are_fine(official, tiny_zip):
    agreeing = ("--cfg", "stylegan3-t", "--syn_layers", 6, "--cbase", 64, "--cmax", 12, "--map-depth", 2)
    result = invoke("--resume", official, "--data", tiny_zip, "--batch", 4, *agreeing, "--cond", 1, "-n")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (64, "--up_factor 4 --cfg stylegan3-t"),
        (64, "dataset_tool.py --source"),
        (32, "--up_factor 2 --cfg stylegan3-t"),
        (8, "--resolution 16x16"),
    ],
)
def test_another_resolution_names_the_command_that_helps(
    official, write_dataset, tmp_path, resolution, message
):
    data = write_dataset("other.zip", {"a.png": Image.new("RGB", (resolution, resolution))})
    result = invoke("--resume", official, "--data", data, "--batch", 4, "--outdir", tmp_path / "runs")
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert f"makes 16x16 images, and {data} has {resolution}x{resolution}" in error and message in error
    assert ("--superres" in error) == (resolution > 16)


def test_classes_and_freezing_belong_to_resume(tiny_zip):
    common = ("--cfg", "stylegan3-t", "--data", tiny_zip, "--batch", 4)
    assert "--classes-from mean belongs to --resume" in invoke(*common, "--classes-from", "mean").output
    assert (
        "--freezed 2 without --resume would freeze random weights" in invoke(*common, "--freezed", 2).output
    )
