# SPDX-License-Identifier: MIT
"""A ladder of tiny runs through train.py, 8 -> 16 -> 32 pixels: what stays, what moves, and files that stand alone.

pytest tests/integration/test_superres_run.py
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import gen_images
import train
from training.dataset import open_dataset
from training.network_io import load_network, read_network

pytestmark = pytest.mark.usefixtures("process_settings")
TINY = (
    "--device",
    "cpu",
    "--kimg",
    "0.032",
    "--tick",
    "0.016",
    "--snap",
    "1",
    "--batch",
    "16",
    "--metrics",
    "none",
)


def train_network(outdir: Path, *arguments: object) -> Path:
    """Run folder of a tiny run."""
    flags = [str(a) for a in (*arguments, *TINY, "--outdir", outdir)]
    result = CliRunner().invoke(train.main, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (run_dir,) = outdir.iterdir()
    return run_dir


def write_digits(folder: Path, resolution: int, num_images: int) -> Path:
    """A folder of enlarged digits with their labels."""
    images, ids = open_dataset("digits", use_labels=True).batch(np.arange(num_images))
    folder.mkdir()
    labels = []
    for index, (image, class_id) in enumerate(zip(images, ids, strict=True)):
        enlarged = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((resolution, resolution))
        enlarged.save(folder / f"{index:02d}.png")
        labels.append([f"{index:02d}.png", int(class_id)])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Run folders of a stem and two stages; each stage's stem is deleted once it has been trained."""
    root = tmp_path_factory.mktemp("ladder")
    run8 = train_network(root / "8", "--preset", "digits-8", "--embedding", "random")
    kept8 = shutil.copytree(run8, root / "kept8")
    run16 = train_network(
        root / "16", "--preset", "digits-16", "--path_stem", run8 / "best_model.safetensors"
    )
    kept16 = shutil.copytree(run16, root / "kept16")
    shutil.rmtree(run8)
    data = write_digits(root / "digits32", 32, 40)
    run32 = train_network(
        *(root / "32", "--preset", "quickstart", "--data", data, "--superres", "--head_layers", 4),
        *("--path_stem", run16 / "best_model.safetensors", "--train-stem-input", 1),
    )
    shutil.rmtree(run16)
    return kept8, kept16, run32


def weights(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return getattr(read_network(run_dir / "best_model.safetensors"), name)


def read_log(run_dir: Path) -> str:
    return (run_dir / "log.txt").read_text()


def layers_of(state: dict[str, torch.Tensor], with_input: bool) -> set[str]:
    """Tensors below the head of the stage at hand that its training must not move."""
    prefixes = ("mapping.", "synthesis.input.") if with_input else ("mapping.",)
    return {name for name in state if name.startswith(prefixes) and name != "mapping.w_avg"}


def test_every_stage_keeps_what_is_below_bit_for_bit(ladder):
    run8, run16, run32 = ladder
    for above, below, with_input in ((run16, run8, True), (run32, run16, False)):
        stem = weights(below, "G_ema")
        kept = load_network(above / "best_model.safetensors").synthesis.plan.kept
        assert len(kept) == {run16: 3, run32: 5}[above]
        for network in ("G", "G_ema"):
            state = weights(above, network)
            names = layers_of(state, with_input)
            names |= {n for n in state for layer in kept if n.startswith(f"synthesis.{layer.name}.")}
            assert len(names) > 20
            assert all(torch.equal(state[name], stem[name]) for name in names)


def test_what_is_trained_moves(ladder):
    """Against G_ema, which follows G: two steps apart."""
    _, run16, run32 = ladder
    for run_dir in (run16, run32):
        G, G_ema = weights(run_dir, "G"), weights(run_dir, "G_ema")
        head = load_network(run_dir / "best_model.safetensors").synthesis.plan.head
        for layer in head:
            assert not torch.equal(
                G[f"synthesis.{layer.name}.weight"], G_ema[f"synthesis.{layer.name}.weight"]
            )
    name = "synthesis.input.weight"
    assert not torch.equal(weights(run32, "G")[name], weights(run16, "G_ema")[name])  # --train-stem-input 1


def test_the_run_says_what_it_trains(ladder):
    _, run16, run32 = ladder
    assert re.search(
        r"Stem \S+: 3 layers kept \([\d,]+ frozen parameters\), 5 layers in the head", read_log(run16)
    )
    assert re.search(r"5 layers kept", read_log(run32))
    options = json.loads((run32 / "training_options.json").read_text())
    assert [stage["up_factor"] for stage in options["generator"]["superres"]] == [2, 2]
    assert options["path_stem"].endswith("best_model.safetensors") and options["trains_stem_input"]


def test_a_stages_file_needs_no_stem(ladder, tmp_path):
    path = ladder[2] / "best_model.safetensors"
    result = CliRunner().invoke(
        gen_images.main,
        [
            "--network",
            str(path),
            "--seeds",
            "1",
            "--class",
            "3",
            "--outdir",
            str(tmp_path),
            "--device",
            "cpu",
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*.png")
    assert np.asarray(Image.open(file)).shape[:2] == (32, 32)


def test_a_better_stem_goes_under_a_trained_stage(ladder, tmp_path):
    _, run16, _ = ladder
    better = train_network(tmp_path / "8", "--preset", "digits-8", "--embedding", "random", "--seed", 5)
    run_dir = train_network(
        *(tmp_path / "16", "--preset", "digits-16"),
        *("--path_stem", better / "best_model.safetensors"),
        *("--resume", run16 / "network-snapshot.safetensors"),
    )
    state, stem, stage = weights(run_dir, "G_ema"), weights(better, "G_ema"), weights(run16, "G_ema")
    kept = load_network(run_dir / "best_model.safetensors").synthesis.plan.kept
    names = layers_of(state, with_input=True)
    names |= {n for n in state for layer in kept if n.startswith(f"synthesis.{layer.name}.")}
    assert all(torch.equal(state[name], stem[name]) for name in names)
    assert any(not torch.equal(state[name], stage[name]) for name in names)
    assert "were taken from" in read_log(run_dir)
    # The head went on from the trained one: nearer to it than a fresh one would be.
    head = load_network(run_dir / "best_model.safetensors").synthesis.plan.head[0]
    name = f"synthesis.{head.name}.weight"
    assert (state[name] - stage[name]).abs().mean() < 0.1
