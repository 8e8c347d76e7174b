# SPDX-License-Identifier: MIT
"""`train.py --cfg dcgan --objective NAME` from flags to images, and every refusal in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gen_images
import train
from training.config import TrainConfig, from_json
from training.network_io import load_network, read_network
from training.presets import RECIPES

SAN_FORMS = [name for name in RECIPES if name not in ("began", "least_squares")]
TINY = ("--cbase", 4, "--cmax", 8, "--batch", 4, "--metrics", "none", "--device", "cpu", "--workers", 0)


def invoke(*arguments: object):
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def configure(*arguments: object) -> TrainConfig:
    """Configuration that a dry run prints, read back."""
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    _, end = json.JSONDecoder().raw_decode(result.output)
    return from_json(TrainConfig, result.output[:end])


def run(tmp_path: Path, *arguments: object) -> Path:
    """Train on few images; the run folder."""
    result = invoke("--cfg", "dcgan", "--outdir", tmp_path / "runs", *TINY, *arguments)
    assert result.exit_code == 0, result.output
    return max((tmp_path / "runs").iterdir())


def refusal(*arguments: object) -> str:
    """The one error line of a command."""
    result = invoke(*arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    return result.output.splitlines()[-1]


def last_stats(run_dir: Path) -> dict:
    return json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("objective", RECIPES)
def test_every_objective_runs(objective, tiny_folder, tmp_path):
    """Without --loss: SAN where there is such a form."""
    run_dir = run(tmp_path, "--objective", objective, "--data", tiny_folder, "--kimg", 0.04)
    loss = "san" if objective in SAN_FORMS else "gan"
    assert run_dir.name == f"00000-{loss}-dcgan-{objective}-tiny-gpus1-batch4"
    expected = {"reals.png", "fakes_init.png", "best_model.safetensors", "stats.jsonl", "log.txt"}
    assert expected <= {file.name for file in run_dir.iterdir()}
    stored = read_network(run_dir / "network-snapshot.safetensors")
    assert stored.head_kind == loss and stored.info["cur_nimg"] == 40
    G = load_network(run_dir / "best_model.safetensors")
    assert G.img_resolution == 16 and G(torch.randn(2, G.z_dim)).shape == (2, 3, 16, 16)
    names = set(last_stats(run_dir))
    assert {"Loss/G/loss", "Loss/D/loss", "Loss/scores/real"} <= names
    own = {"infogan": "InfoGAN/categorical", "began": "BEGAN/measure", "curriculum": "Curriculum/critic2"}
    assert own.get(objective, "Loss/G/loss") in names
    assert ("Loss/D/penalty" in names) == (objective in ("wgan_gp", "curriculum", "dragan", "relativistic"))


def test_conditional_run_and_its_images(tiny_folder, tmp_path):
    run_dir = run(tmp_path, "--data", tiny_folder, "--cond", 1, "--kimg", 0.02, "--batch-gpu", 2)
    arguments = ["--network", str(run_dir / "best_model.safetensors"), "--outdir", str(tmp_path / "out")]
    result = CliRunner().invoke(gen_images.main, [*arguments, "--seeds", "0-1"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("seed*.png"))) == 6  # three classes
    for flag, message in (
        ("--trunc=0.7", "--trunc 0.7"),
        ("--rotate=5", "--rotate"),
        ("--translate=1,0", "translate"),
    ):
        result = CliRunner().invoke(gen_images.main, [*arguments, flag])
        assert result.exit_code == 1 and message in result.output and "DCGAN" in result.output


def test_centroids_are_refused(tiny_folder, tmp_path):
    run_dir = run(tmp_path, "--data", tiny_folder, "--kimg", 0.01)
    arguments = ["--network", str(run_dir / "best_model.safetensors"), "--outdir", str(tmp_path / "out")]
    result = CliRunner().invoke(gen_images.main, [*arguments, "--centroids", "2"])
    assert result.exit_code == 1 and result.output.splitlines()[-1].startswith("Error: --centroids")


def test_several_steps_of_d_take_a_batch_each(tiny_folder, tmp_path):
    """WGAN at batch 4: 20 images an iteration, 3 iterations until 50 are reached."""
    run_dir = run(tmp_path, "--objective", "wgan", "--data", tiny_folder, "--kimg", 0.05, "--tick", 100)
    assert read_network(run_dir / "best_model.safetensors").info["cur_nimg"] == 60
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert sum(line["Loss/D/loss"]["num"] for line in lines) == 15
    assert sum(line["Loss/G/loss"]["num"] for line in lines) == 3


def test_directions_are_unit_vectors_in_the_file(tiny_folder, tmp_path):
    run_dir = run(tmp_path, "--objective", "hinge", "--data", tiny_folder, "--cond", 1, "--kimg", 0.02)
    D = read_network(run_dir / "network-snapshot.safetensors").D
    norms = D["critics.critic0.last.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))


# Configurations.


def test_defaults_are_those_of_the_papers():
    config = configure("--cfg", "dcgan", "--data", "digits")
    assert (config.objective, config.loss, config.batch_size, config.generator.z_dim) == (
        "nonsaturating", "san", 128, 100,
    )  # fmt: skip
    assert config.generator_optimizer.betas == (0.5, 0.999) and config.loss_terms.blur_fade_kimg == 0
    config = configure("--cfg", "dcgan", "--data", "digits", "--objective", "WGAN-GP")
    assert (config.objective, config.critic.num_steps, config.critic.penalty) == (
        "wasserstein", 5, "wgan_gp",
    )  # fmt: skip
    assert config.critic.penalty_weight == 10 and config.batch_size == 64


@pytest.mark.parametrize(
    ("name", "same"), [("minimax", "saturating"), ("DCGAN", "nonsaturating"), ("lsgan", "least_squares")]
)
def test_other_names(name, same):
    first, second = (configure("--cfg", "dcgan", "--data", "digits", "--objective", n) for n in (name, same))
    assert first == second


def test_flags_change_the_recipe():
    flags = (
        "--cbase",
        32,
        "--cmax",
        64,
        "--glr",
        0.01,
        "--dlr",
        0.02,
        "--blur-kimg",
        7,
        "--kimg",
        30,
        "--batch",
        16,
    )
    config = configure("--cfg", "dcgan", "--data", "digits", "--objective", "curriculum", "--cond", 1, *flags)
    assert config.generator.channel_base == 32 and config.discriminator.channel_bases == (8, 16, 32)
    assert config.generator.channel_max == config.discriminator.channel_max == 64
    assert (config.generator_optimizer.lr, config.discriminator_optimizer.lr) == (0.01, 0.02)
    assert config.loss_terms.blur_fade_kimg == 7 and config.batch_size == config.microbatch_size == 16
    assert config.critic.curriculum_kimg == 15  # still half of the run
    assert config.generator.c_dim == config.discriminator.c_dim == 10


@pytest.mark.parametrize(
    "objective", ["wasserstein", "saturating", "nonsaturating", "soft_least_squares", "hinge"]
)
def test_stylegan_takes_elementwise_objectives(objective):
    config = configure("--preset", "quickstart", "--embedding", "random", "--objective", objective)
    assert config.objective == objective and config.loss == "san"


def test_stylegan_takes_least_squares_as_gan():
    flags = ("--preset", "quickstart", "--embedding", "random", "--objective", "least_squares")
    assert configure(*flags, "--loss", "gan").objective == "least_squares"
    assert refusal(*flags) == (
        "Error: --objective least_squares has no SAN form: its generator loss turns round at the target; "
        "soft_least_squares has one; use --loss gan"
    )


# Refusals.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objective", "began", "--loss", "san"), "--objective began has no SAN form: its discriminator is an auto"),
        (("--objective", "least_squares", "--loss", "san"), "soft_least_squares has one; use --loss gan"),
        (("--objective", "began", "--cond", 1), "--cond 1: BEGAN's discriminator does not see classes"),
        (("--objective", "wasserstein"), "unbounded; use wgan or wgan_gp"),
        (("--objective", "hing"), "'hing' is not one of saturating"),
        (("--syn_layers", 5), "--syn_layers has no effect: --cfg dcgan has no StyleGAN3's layers; leave it out"),
        (("--map-depth", 5), "--map-depth has no effect"),
        (("--official-bn", 1), "--official-bn has no effect"),
        (("--cls_weight", 8), "--cls_weight has no effect"),
        (("--resume", "digits"), "--resume has no effect: --cfg dcgan has no fine-tuning"),
        (("--superres", "--path_stem", "digits"), "--superres has no effect"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(flags, message, tmp_path):
    line = refusal("--cfg", "dcgan", "--data", "digits", "--outdir", tmp_path / "runs", *flags)
    assert line.startswith("Error: ") and message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "objective", ["wgan", "wgan_gp", "curriculum", "dragan", "infogan", "began", "relativistic"]
)
def test_stylegan_refuses_the_others_with_the_reason(objective):
    line = refusal("--preset", "quickstart", "--objective", objective)
    assert f"--objective {objective} does not go with StyleGAN-XL's networks: " in line
    assert line.endswith("; use --cfg dcgan")


def test_data_is_needed_and_must_have_a_size_that_fits(write_dataset):
    assert (
        refusal("--cfg", "dcgan") == "Error: --data missing; give a value, or start from --preset quickstart"
    )
    small = write_dataset("small", {"a.png": np.zeros((4, 4, 3), np.uint8)})
    assert "4x4 pixels do not fit --cfg dcgan" in refusal("--cfg", "dcgan", "--data", small)


def test_a_dcgan_is_neither_stem_nor_checkpoint(tiny_folder, tmp_path):
    network = run(tmp_path, "--data", tiny_folder, "--kimg", 0.01) / "best_model.safetensors"
    line = refusal("--resume", network, "--data", tiny_folder)
    assert f"--resume {network} is a DCGAN" in line
    flags = ("--superres", "--cfg", "stylegan3-t", "--batch", 4, "--path_stem", network)
    assert "is a DCGAN, and stages need" in refusal(*flags, "--data", tiny_folder)
