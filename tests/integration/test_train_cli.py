# SPDX-License-Identifier: MIT
"""train.py's command line: help, dry runs, flags over presets, and every refusal in one line, before any file."""

import json
import re
import shlex
import sys
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner
from PIL import Image

import train
from training.config import TrainConfig, from_json
from training.generator.generator import Generator
from training.network_io import save_network

STYLEGAN_XL_FLAGS = shlex.split(
    """--outdir --cfg --data --gpus --batch --cond --mirror --resume --freezed --batch-gpu --cbase --cmax --glr
    --dlr --map-depth --desc --metrics --kimg --tick --snap --seed --fp32 --nobench --workers -n --dry-run
    --restart_every --stem --syn_layers --superres --path_stem --head_layers --cls_weight --up_factor"""
)
OWN_FLAGS = [
    "--loss",
    "--preset",
    "--device",
    "--embedding",
    "--official-bn",
    "--backbones",
    "--train-stem-input",
    "--objective",
]
OWN_FLAGS += ["--classes-from", "--blur-kimg", "--precision", "--feature-precision"]
QUICKSTART = ("--preset", "quickstart", "--embedding", "random", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """So that `runs` and relative paths mean this test's own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def invoke(*arguments: object):
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def dry_run(*arguments: object) -> TrainConfig:
    """Configuration that a dry run prints, read back."""
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end])


def refusal(tmp_path, *arguments: object) -> str:
    """The one error line of a command that must write nothing."""
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception  # no other exception came through
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and result.output.splitlines()[-1] == errors[0], result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
    return errors[0]


# Help and dry runs.


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_flag(flag):
    result = invoke(flag)
    assert result.exit_code == 0
    listed = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.output))
    assert {*STYLEGAN_XL_FLAGS, *OWN_FLAGS} <= listed
    assert "python train.py --loss san --preset quickstart" in result.output


def test_every_option_explains_itself():
    assert all(option.help for option in train.main.params)


def test_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    config = dry_run(*QUICKSTART)
    assert config.data.path == "digits" and config.discriminator.c_dim == 10
    assert not list((tmp_path / "work").iterdir())
    assert "Dry run: nothing was trained or written." in invoke(*QUICKSTART, "-n").output


def test_dry_run_needs_no_training_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "training.training_loop", None)  # importing it would fail
    dry_run(*QUICKSTART)


# Flags over presets.


@pytest.mark.parametrize(
    ("arguments", "path", "expected"),
    [
        (["--loss", "gan"], "loss", "gan"),
        (["--kimg", "0.5"], "total_kimg", 0.5),
        (["--tick", "0.25"], "tick_kimg", 0.25),
        (["--snap", "0"], "snapshot_ticks", 0),
        (["--seed", "7"], "seed", 7),
        (["--seed", "7"], "data.seed", 7),
        (["--seed", "0"], "seed", 0),
        (["--glr", "0.01"], "generator_optimizer.lr", 0.01),
        (["--dlr", "0.03"], "discriminator_optimizer.lr", 0.03),
        (["--cbase", "100"], "generator.synthesis.channel_base", 200),
        (["--cmax", "10"], "generator.synthesis.channel_max", 20),
        (["--syn_layers", "6"], "generator.synthesis.num_layers", 6),
        (["--map-depth", "3"], "generator.mapping.num_layers", 3),
        (["--blur-kimg", "0"], "loss_terms.blur_fade_kimg", 0.0),
        (["--fp32", "1"], "generator.synthesis.num_fp16_res", 0),
        (["--fp32", "1"], "generator.synthesis.conv_clamp", None),
        (["--official-bn", "1"], "discriminator.official_batchnorm_statistics", True),
        (["--mirror", "1"], "data.mirror", True),
        (["--mirror", "True"], "data.mirror", True),
        (["--workers", "2"], "data.num_workers", 2),
        (["--metrics", "none"], "metrics", ()),
        (["--metrics", "fd_lite0"], "metrics", ("fd_lite0",)),
        (["--nobench", "1"], "benchmark", False),
        (["--checkpoint-activations", "1"], "checkpoint_activations", True),
        (["--batch", "16"], "batch_size", 16),
        (["--batch", "16"], "microbatch_size", 16),
        (["--batch", "16", "--batch-gpu", "4"], "microbatch_size", 4),
        (["--batch-gpu", "8"], "microbatch_size", 8),
        (["--cond", "0"], "data.use_labels", False),
        (["--cond", "0"], "generator.mapping.c_dim", 0),
        (["--cond", "0"], "discriminator.c_dim", 0),
        (["--stem"], "seed", 0),
        (["--gpus", "1"], "seed", 0),
        (["--freezed", "0"], "seed", 0),
        (["--restart_every", "0"], "seed", 0),
    ],
)
def test_flag_overrides_the_preset(arguments, path, expected):
    value = dry_run(*QUICKSTART, *arguments)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_flags_leave_the_rest_of_the_preset():
    plain, changed = asdict(dry_run(*QUICKSTART)), asdict(dry_run(*QUICKSTART, "--kimg", 3, "--glr", 0.001))
    plain["total_kimg"], plain["generator_optimizer"]["lr"] = 3.0, 0.001
    assert changed == plain


def test_san_and_gan_differ_in_one_field():
    san, gan = (asdict(dry_run(*QUICKSTART, "--loss", loss)) for loss in ("san", "gan"))
    assert [name for name in san if san[name] != gan[name]] == ["loss"]


def test_batch_sets_what_stylegan_derives_from_it():
    before, after = dry_run(*QUICKSTART), dry_run(*QUICKSTART, "--batch", 8)
    assert after.ema_halflife_kimg == pytest.approx(before.ema_halflife_kimg * 8 / before.batch_size)
    assert after.generator.synthesis.magnitude_ema_beta == 0.5 ** (8 / 20000)


def test_resume_turns_off_the_rampup(tmp_path):
    config = dry_run(*QUICKSTART)
    assert config.ema_rampup is not None
    path = tmp_path / "net.safetensors"
    save_network(path, Generator(config.generator))
    resumed = dry_run("--preset", "quickstart", "--device", "cpu", "--resume", path)
    assert resumed.ema_rampup is None and resumed.resume == str(path)


def write_official_set(write_dataset, name: str, resolution: int, has_labels: bool):
    """Four images as in the official configuration's test: labels 0, 1, 2, 0 or none."""
    files = {f"{i}.png": Image.new("RGB", (resolution, resolution), (i, i, i)) for i in range(4)}
    labels = dict(zip(files, (0, 1, 2, 0), strict=True)) if has_labels else None
    return write_dataset(name, files, labels)


def test_cifar_command_gives_the_official_configuration(write_dataset):
    data = write_official_set(write_dataset, "cifar10_16.zip", 16, has_labels=True)
    config = dry_run(
        *("--cfg", "stylegan3-r", "--data", data, "--gpus", 1, "--batch", 2048, "--mirror", 1, "--snap", 10),
        *("--batch-gpu", 8, "--kimg", 300000, "--syn_layers", 6, "--cond", "True"),
    )
    synthesis = config.generator.synthesis
    assert (synthesis.channel_base, synthesis.channel_max) == (131072, 2048)
    assert synthesis.magnitude_ema_beta == pytest.approx(0.9314821318134288, rel=1e-12)
    assert (synthesis.conv_kernel, synthesis.use_radial_filters, synthesis.num_layers) == (1, True, 6)
    assert (config.batch_size, config.microbatch_size, config.ema_halflife_kimg) == (2048, 8, 640.0)
    assert (config.total_kimg, config.tick_kimg, config.snapshot_ticks) == (300000, 4, 10)
    assert (config.generator_optimizer.lr, config.discriminator_optimizer.lr) == (0.0025, 0.002)
    assert config.data.mirror and config.data.use_labels and config.data.num_workers == 3
    assert config.data.seed == config.seed == 0
    assert config.discriminator.feature_resolution == 224 and config.discriminator.c_dim == 3
    assert config.generator.mapping.c_dim == 3 and config.generator.mapping.num_embeddings == 1000


def test_minimal_command_gives_the_official_configuration(write_dataset):
    data = write_official_set(write_dataset, "ffhq256.zip", 256, has_labels=False)
    config = dry_run("--cfg", "stylegan3-t", "--data", data, "--gpus", 1, "--batch", 32)
    synthesis = config.generator.synthesis
    assert (synthesis.channel_base, synthesis.channel_max) == (65536, 1024)
    assert synthesis.magnitude_ema_beta == pytest.approx(0.9988915792636801, rel=1e-12)
    assert (synthesis.conv_kernel, synthesis.use_radial_filters, synthesis.num_layers) == (3, False, 14)
    assert synthesis.img_resolution == config.discriminator.img_resolution == 256
    assert (config.batch_size, config.microbatch_size, config.ema_halflife_kimg) == (32, 32, 10.0)
    assert (config.total_kimg, config.tick_kimg, config.snapshot_ticks) == (25000, 4, 50)
    assert config.discriminator.feature_resolution is None and config.discriminator.c_dim == 0
    assert not config.data.mirror and not config.data.use_labels and config.embedding_source == "random"


@pytest.mark.parametrize(("cfg", "factor"), [("stylegan3-t", 2), ("stylegan3-r", 4)])
def test_channels_count_as_in_stylegan_xl(cfg, factor, tiny_folder):
    common = ("--cfg", cfg, "--data", tiny_folder, "--batch", 4)
    synthesis = dry_run(*common).generator.synthesis
    assert (synthesis.channel_base, synthesis.channel_max) == (32768 * factor, 512 * factor)
    synthesis = dry_run(*common, "--cbase", 1000, "--cmax", 100).generator.synthesis
    assert (synthesis.channel_base, synthesis.channel_max) == (1000 * factor, 100 * factor)


def test_cond_without_preset_takes_embeddings_from_the_data(tiny_folder):
    config = dry_run("--cfg", "stylegan3-t", "--data", tiny_folder, "--batch", 4, "--cond", 1)
    assert config.discriminator.c_dim == 3
    assert config.embedding_source == "data"  # as the help says


def test_preset_on_other_data(tiny_folder):
    config = dry_run(*QUICKSTART, "--data", tiny_folder)
    assert config.data.path == str(tiny_folder) and config.discriminator.c_dim == 3
    assert config.generator.mapping.num_embeddings == 10 == config.discriminator.num_class_embeddings


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superres"], "--path_stem missing"),
        (["--path_stem", "a.pkl"], "--path_stem a.pkl belongs to a super-resolution stage"),
        (["--head_layers", "7"], "--head_layers 7 belongs to a super-resolution stage"),
        (["--up_factor", "2"], "--up_factor 2 belongs to a super-resolution stage"),
        (["--freezed", "2"], "--freezed 2 without --resume would freeze random weights; add --resume FILE"),
        (["--classes-from", "mean"], "--classes-from mean belongs to --resume; add --resume FILE"),
        (["--time-limit", "3x"], "duration '3x' is not understood"),
        (["--batch-gpu", "all"], "'all' is neither a positive number of images nor auto"),
        (["--cfg", "stylegan3-t"], "--cfg stylegan3-t and --preset quickstart both choose the layers"),
        (
            ["--batch", "30", "--batch-gpu", "7"],
            "--batch 30 is not a multiple of --batch-gpu x processes = 7 x 1 = 7",
        ),
        (["--metrics", "fd_lite1"], "metric 'fd_lite1' is not available; valid metrics: fid50k_full"),
        (["--metrics", "fd_lite0:0"], "--metrics fd_lite0:0: after the colon comes a number of snapshots"),
        (["--metrics", "fd_lite0", "--best-by", "fid50k_full"], "--best-by fid50k_full is no result"),
        (["--data", "absent.zip"], "absent.zip: no such file or folder"),
        (["--cls_weight", "8"], "--cls_weight needs the 1,000 ImageNet classes; digits has 10"),
        (["--resume", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--resume", "net.pkl"], "net.pkl"),
        (["--embedding", "absent.npy"], "absent.npy"),
        (["--bacth", "3"], "No such option"),
        (["--loss", "sann"], "'sann' is not one of 'san', 'gan'"),
        (["--preset", "quickstrat"], "'quickstrat' is not one of"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--ops", "cuda"], "'cuda' is not one of 'auto', 'reference', 'cpp', 'triton'"),
        (["--kimg", "-1"], "-1"),
        (["--kimg", "much"], "'much' is not a valid float"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--seed", "1.5"], "'1.5' is not a valid integer"),
        (["--cond", "maybe"], "'maybe' is not a valid boolean"),
        (["stray"], "stray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_beside_a_preset(tmp_path, arguments, message):
    assert message in refusal(tmp_path, *QUICKSTART, "--data", "digits", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--cfg, --data, --batch missing; give a value, or start from --preset quickstart"),
        (["--cfg", "stylegan3-t", "--batch", "4"], "--data missing"),
        (["--cfg", "stylegan3-t", "--data", "digits"], "--batch missing"),
        (["--cfg", "stylegan2", "--data", "digits", "--batch", "4"], "use stylegan3-t or stylegan3-r"),
        (["--cfg", "fastgan", "--data", "digits", "--batch", "4"], "use stylegan3-t or stylegan3-r"),
        (["--cfg", "stylegan3", "--data", "digits", "--batch", "4"], "'stylegan3' is not one of"),
        (["--preset", "cifar10-16"], "--data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_without_a_preset(tmp_path, arguments, message):
    assert message in refusal(tmp_path, *arguments)


def test_labels_that_are_not_there_are_refused(tmp_path, write_dataset, tiny_images):
    path = write_dataset("unlabelled", tiny_images)
    message = refusal(tmp_path, "--cfg", "stylegan3-t", "--data", path, "--batch", 4, "--cond", 1)
    assert str(path) in message and "dataset.json" in message


def test_damaged_data_is_refused(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
    assert "broken.zip" in refusal(tmp_path, *QUICKSTART, "--data", tmp_path / "broken.zip")
    (tmp_path / "empty").mkdir()
    assert "no image files found" in refusal(tmp_path, *QUICKSTART, "--data", tmp_path / "empty")


def test_outdir_that_cannot_be_made_is_refused(tmp_path, tiny_folder):
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path, *QUICKSTART, "--data", tiny_folder, "--outdir", tmp_path / "file" / "runs")
    assert "cannot create a run folder" in message


def test_a_preset_takes_its_networks_from_the_file(tmp_path, tiny_folder):
    preset = ("--preset", "quickstart", "--data", tiny_folder)
    path = tmp_path / "net.safetensors"
    before = dry_run(*preset, "--cmax", 4)
    save_network(path, Generator(before.generator))
    after = dry_run(*preset, "--resume", path)
    assert after.generator == before.generator and after.generator.synthesis.channel_max == 8
    assert replace(after, generator=before.generator, resume=None, ema_rampup=before.ema_rampup) == replace(
        before, embedding_source="checkpoint"
    )
    message = refusal(tmp_path, *preset, "--resume", path, "--cmax", 5)
    assert "--cmax 5 contradicts" in message and "built with --cmax 4" in message
