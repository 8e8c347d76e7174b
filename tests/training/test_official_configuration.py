# SPDX-License-Identifier: MIT
"""The official command line, recorded: our flags give the same values, field by field, or a table says why not.

d_train_config.npz holds, per command line, the configuration that the official train.py makes of it. Its data sets are
four images with the labels 0, 1, 2, 0, or none.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import train
from training.config import TrainConfig, from_json
from training.loss import GuidanceClassifier

CASES = {
    name: json.loads(str(text))
    for name, text in np.load(Path(__file__).parents[1] / "data" / "d_train_config.npz").items()
}
FLAGS = {flag["name"]: flag for flag in CASES.pop("__flags__")}

# Official field -> the same value, read from our configuration. Units and names differ where the table says so.
SAME = {
    "G_kwargs.z_dim": lambda c: c.generator.mapping.z_dim,
    "G_kwargs.w_dim": lambda c: c.generator.mapping.w_dim,
    "G_kwargs.mapping_kwargs.num_layers": lambda c: c.generator.mapping.num_layers,
    "G_kwargs.channel_base": lambda c: c.generator.synthesis.channel_base,
    "G_kwargs.channel_max": lambda c: c.generator.synthesis.channel_max,
    "G_kwargs.magnitude_ema_beta": lambda c: c.generator.synthesis.magnitude_ema_beta,
    "G_kwargs.conv_kernel": lambda c: (last_stage(c) or c.generator.synthesis).conv_kernel,
    "G_kwargs.use_radial_filters": lambda c: (last_stage(c) or c.generator.synthesis).use_radial_filters,
    "G_kwargs.num_layers": lambda c: c.generator.synthesis.num_layers,
    "G_kwargs.num_fp16_res": lambda c: c.generator.synthesis.num_fp16_res,
    "G_kwargs.conv_clamp": lambda c: c.generator.synthesis.conv_clamp,
    "G_kwargs.path_stem": lambda c: c.path_stem,
    "G_kwargs.head_layers": lambda c: last_stage(c).head_layers,
    "G_kwargs.up_factor": lambda c: last_stage(c).up_factor,
    "G_opt_kwargs.betas": lambda c: list(c.generator_optimizer.betas),
    "G_opt_kwargs.eps": lambda c: c.generator_optimizer.eps,
    "G_opt_kwargs.lr": lambda c: (
        c.generator_optimizer.lr
    ),  # both before the correction for lazy regularisation
    "D_opt_kwargs.betas": lambda c: list(c.discriminator_optimizer.betas),
    "D_opt_kwargs.eps": lambda c: c.discriminator_optimizer.eps,
    "D_opt_kwargs.lr": lambda c: c.discriminator_optimizer.lr,
    "data_loader_kwargs.num_workers": lambda c: c.data.num_workers,
    "training_set_kwargs.path": lambda c: c.data.path,
    "training_set_kwargs.use_labels": lambda c: c.data.use_labels,
    "training_set_kwargs.max_size": lambda c: (
        c.data.max_size or 4
    ),  # None = all; the official code counts them
    "training_set_kwargs.xflip": lambda c: c.data.mirror,
    "training_set_kwargs.resolution": lambda c: c.generator.img_resolution,
    "training_set_kwargs.random_seed": lambda c: c.data.seed,
    "batch_size": lambda c: c.batch_size,
    "batch_gpu": lambda c: c.microbatch_size,
    "total_kimg": lambda c: c.total_kimg,
    "kimg_per_tick": lambda c: c.tick_kimg,
    "image_snapshot_ticks": lambda c: c.snapshot_ticks,  # pictures and networks are written together
    "network_snapshot_ticks": lambda c: c.snapshot_ticks,
    "random_seed": lambda c: c.seed,
    "metrics": lambda c: list(c.metrics),
    "ema_kimg": lambda c: c.ema_halflife_kimg,
    "cudnn_benchmark": lambda c: c.benchmark,
    "G_reg_interval": lambda c: c.generator_optimizer.reg_interval,
    "D_kwargs.backbones": lambda c: list(c.discriminator.backbones),
    "D_kwargs.diffaug": lambda c: c.discriminator.augment_policy == "color,translation,cutout",
    "D_kwargs.interp224": lambda c: (
        c.discriminator.feature_resolution == 224
    ),  # else None: images as they are
    "D_kwargs.backbone_kwargs.cout": lambda c: c.discriminator.projected_channels,
    "D_kwargs.backbone_kwargs.num_discs": lambda c: c.discriminator.num_levels,
    "D_kwargs.backbone_kwargs.cond": lambda c: c.discriminator.c_dim > 0,
    "loss_kwargs.blur_init_sigma": lambda c: c.loss_terms.blur_init_sigma_px,
    "loss_kwargs.blur_fade_kimg": lambda c: c.loss_terms.blur_fade_kimg,
    "loss_kwargs.pl_weight": lambda c: c.loss_terms.pl_weight,
    "loss_kwargs.style_mixing_prob": lambda c: c.loss_terms.style_mixing_prob,
    "loss_kwargs.cls_weight": lambda c: (
        c.loss_terms.cls_weight
    ),  # the loss divides it by the paper's 8 images
    "loss_kwargs.cls_model": lambda c: GuidanceClassifier.NAME,
    "loss_kwargs.train_head_only": lambda c: c.trains_head_only,
}
# Official fields without one of ours. "fixed": the only value that the official command line gives is built in.
ELSEWHERE = {
    "G_kwargs.class_name": "one generator class; the fields of its configuration tell a stage from a stem",
    "G_kwargs.mapping_kwargs.rand_embedding": "embedding_source: class means of the data, the stem's, or a file",
    "G_opt_kwargs.class_name": "fixed: Adam",
    "D_opt_kwargs.class_name": "fixed: Adam",
    "data_loader_kwargs.pin_memory": "fixed: on CUDA",
    "data_loader_kwargs.prefetch_factor": "fixed: 2, which is PyTorch's default",
    "training_set_kwargs.class_name": "fixed: one reader",
    "num_gpus": "belongs to a start of the run, not to its configuration; it is in the folder's name",
    "restart_every": "belongs to a start of the run, not to its configuration: --time-limit",
    "D_kwargs.class_name": "fixed: one discriminator class",
    "D_kwargs.backbone_kwargs.expand": "fixed: 1, 2, 4 and 8 times the channels",
    "D_kwargs.backbone_kwargs.proj_type": "fixed: 2, mixing across channels and scales",
    "loss_kwargs.class_name": "fixed: one loss class",
    "loss_kwargs.pl_no_weight_grad": "no such shortcut: the gradient of path length is complete",
    "run_dir": "the name also says san or gan, and no folder is used twice",
}


def last_stage(config: TrainConfig):
    return config.generator.superres[-1] if config.generator.superres else None


def flatten(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (flatten(part, f"{prefix}.{name}" if prefix else name) for name, part in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


@pytest.fixture
def data_folder(write_dataset, tmp_path, monkeypatch):
    """The folder that <TMP> stands for."""
    for name, side, labels in (
        ("cifar10_16.zip", 16, (0, 1, 2, 0)),
        ("cifar10_32.zip", 32, (0, 1, 2, 0)),
        ("imagenet256.zip", 256, (0, 1, 2, 999)),  # guidance is refused for other than 1,000 classes
        ("ffhq256.zip", 256, None),
    ):
        files = {f"{i}.png": Image.new("RGB", (side, side), (i, i, i)) for i in range(4)}
        write_dataset(name, files, None if labels is None else dict(zip(files, labels, strict=True)))
    monkeypatch.chdir(tmp_path)  # so that stem.pkl means a file that is not there
    return tmp_path


def run_recorded(case: str, data_folder: Path, **replaced: str):
    """Run our train.py with a recorded command line; `replaced` are values of flags."""
    arguments = [text.replace("<TMP>", str(data_folder)) for text in CASES[case]["args"]]
    for flag, value in replaced.items():
        arguments[arguments.index(f"--{flag}") + 1] = value
    return CliRunner().invoke(train.main, ["--loss", "san", *arguments])


def configuration(result) -> TrainConfig:
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end])


def official(case: str, data_folder: Path) -> dict:
    text = json.dumps(CASES[case]["config"]).replace("<TMP>", str(data_folder))
    return flatten(json.loads(text))


@pytest.mark.parametrize("case", ["cifar_stem", "cifar_super", "imagenet_super", "minimal_t"])
def test_configuration_is_the_official_one(case, data_folder):
    config = configuration(run_recorded(case, data_folder))
    fields = official(case, data_folder)
    assert not [name for name in fields if name not in SAME and name not in ELSEWHERE]
    differences = {
        name: (SAME[name](config), value)
        for name, value in fields.items()
        if name in SAME and SAME[name](config) != value
    }
    assert not differences
    assert (fields["G_kwargs.class_name"].endswith("SuperresGenerator")) == bool(config.generator.superres)


def test_every_entry_of_the_tables_is_about_a_recorded_field(data_folder):
    recorded = {name for case in CASES.values() if case["config"] for name in flatten(case["config"])}
    assert set(SAME) <= recorded and set(ELSEWHERE) <= recorded
    assert not set(SAME) & set(ELSEWHERE)


def test_general_flags_of_the_stylegan2_command(data_folder):
    """Recorded with the other generator, which is refused here; all but G means the same for ours."""
    refused = run_recorded("minimal_sg2", data_folder)
    assert refused.exit_code == 1 and "--cfg stylegan2: only the StyleGAN3 layers are here" in refused.output
    config = configuration(run_recorded("minimal_sg2", data_folder, cfg="stylegan3-t"))
    fields = official("minimal_sg2", data_folder)
    own = ("G_kwargs.channel_base", "G_kwargs.channel_max", "G_kwargs.fused_modconv_default")  # of StyleGAN2
    differences = {
        name: (SAME[name](config), value)
        for name, value in fields.items()
        if name in SAME and name not in own and SAME[name](config) != value
    }
    assert not differences
    assert config.metrics == tuple(fields["metrics"]) == ()


def test_stylegan2_and_fastgan_are_refused(data_folder):
    result = run_recorded("fastgan", data_folder)
    assert result.exit_code == 1
    assert "--cfg fastgan: only the StyleGAN3 layers are here" in last_line(result)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bad_batch", "--batch 64 is not a multiple of --gpus 3"),
        ("bad_metric", "metric 'clipfid50k_full' is not available"),
        ("bad_cond", "ffhq256.zip"),
    ],
)
def test_what_is_refused_there_is_refused_here(case, message, data_folder):
    """Exit code 1 and one line, before anything is written."""
    before = sorted(data_folder.rglob("*"))
    result = run_recorded(case, data_folder)
    assert result.exit_code == CASES[case]["exit"] == 1
    assert isinstance(result.exception, SystemExit)
    assert last_line(result).startswith("Error: ") and message in last_line(result)
    assert sorted(data_folder.rglob("*")) == before


def last_line(result) -> str:
    return result.output.splitlines()[-1]


# Flags.

MINIMAL = ("--cfg", "stylegan3-t", "--data", "ffhq256.zip", "--batch", "32", "--gpus", "1")
# Official flag -> what a command without it gives here, read from the configuration.
DEFAULTS = {
    "cond": lambda c: c.data.use_labels,
    "mirror": lambda c: c.data.mirror,
    "resume": lambda c: c.resume,
    "freezed": lambda c: c.frozen_head_blocks,
    "cbase": lambda c: c.generator.synthesis.channel_base / 2,  # doubled for StyleGAN3 layers, here and there
    "cmax": lambda c: c.generator.synthesis.channel_max / 2,
    "dlr": lambda c: c.discriminator_optimizer.lr,
    "kimg": lambda c: c.total_kimg,
    "tick": lambda c: c.tick_kimg,
    "snap": lambda c: c.snapshot_ticks,
    "seed": lambda c: c.seed,
    "fp32": lambda c: c.generator.synthesis.num_fp16_res == 0,
    "nobench": lambda c: not c.benchmark,
    "workers": lambda c: c.data.num_workers,
    "syn_layers": lambda c: c.generator.synthesis.num_layers,
    "path_stem": lambda c: c.path_stem,
    "cls_weight": lambda c: c.loss_terms.cls_weight,
}
STAGE_DEFAULTS = {
    "head_layers": lambda c: c.generator.superres[-1].head_layers,
    "up_factor": lambda c: c.generator.superres[-1].up_factor,
}
OTHER_DEFAULTS = {
    "outdir": "required there, runs here",
    "gpus": "required there, 1 here",
    "cfg": "required; here --preset, --ladder and --resume do without",
    "data": "required; here presets and checkpoints may bring it",
    "batch": "required; here presets and checkpoints may bring it",
    "batch_gpu": "None is the batch of one process, compared with the recorded commands",
    "glr": "None is 0.0025, compared with the recorded commands",
    "map_depth": "None is 2, compared with the recorded commands; ignored there, works here",
    "metrics": "None is fid50k_full, compared with the recorded commands",
    "desc": "None; only names the folder",
    "dry_run": "a switch",
    "superres": "a switch",
    "stem": "a switch without effect there, refused with --superres here",
    "restart_every": "999999999 seconds there; no limit here",
}


def test_every_official_flag_is_here_and_every_default_is_accounted_for():
    options = {spelling: option for option in train.main.params for spelling in option.opts}
    for name, flag in FLAGS.items():
        option = options[flag["decl"][0]]
        assert set(flag["decl"]) <= set(option.opts), name
        assert flag["flag"] == option.is_flag, name
    accounted = [*DEFAULTS, *STAGE_DEFAULTS, *OTHER_DEFAULTS]
    assert sorted(accounted) == sorted(FLAGS)


def test_defaults_are_the_official_ones(data_folder):
    config = configuration(CliRunner().invoke(train.main, [*MINIMAL, "-n"]))
    assert {name: read(config) for name, read in DEFAULTS.items()} == {
        name: FLAGS[name]["default"] for name in DEFAULTS
    }
    stage = configuration(
        CliRunner().invoke(train.main, [*MINIMAL, "-n", "--superres", "--path_stem", "stem.pkl"])
    )
    assert {name: read(stage) for name, read in STAGE_DEFAULTS.items()} == {
        name: FLAGS[name]["default"] for name in STAGE_DEFAULTS
    }
