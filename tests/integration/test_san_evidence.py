# SPDX-License-Identifier: MIT
"""The comparison of tests/benchmarks/san_evidence.py: fair starts, honest tables, and documents that hold its runs.

python -m pytest tests/integration/test_san_evidence.py
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import san
from training.dataset import open_dataset
from training.discriminator.dcgan import DCGANDiscriminator
from training.presets import dcgan

ROOT = Path(__file__).parents[2]
PLAIN_GAN = ("gan", "normalized", "normalized, fixed scale")  # last layers that the GAN's loss trains


@pytest.fixture(scope="module")
def evidence():
    path = ROOT / "tests" / "benchmarks" / "san_evidence.py"
    spec = importlib.util.spec_from_file_location("san_evidence_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def result(evidence, objective: str, variant: str, seed: int, fd: float, accuracy: float = 0.5):
    return evidence.report.Result(objective, variant, seed, fd, accuracy, 1.0, 0.5, 9.0)


# Last layers.


def last_layer(evidence, variant: str) -> nn.Module:
    torch.manual_seed(0)
    return evidence.VARIANTS[variant][1](nn.Conv2d(6, 3, 4, bias=False))


def test_all_last_layers_start_as_the_same_function(evidence):
    features = torch.randn(5, 6, 4, 4)
    expected = last_layer(evidence, "gan")(features)
    for variant in evidence.VARIANTS:
        if variant != "gan":
            logits = last_layer(evidence, variant)(features)
            torch.testing.assert_close(logits.fun, expected, msg=variant)
            torch.testing.assert_close(logits.dir, expected, msg=variant)


def test_each_last_layer_is_trained_by_what_its_name_says(evidence):
    features = torch.randn(5, 6, 4, 4, requires_grad=True)
    for variant, (loss, _) in evidence.VARIANTS.items():
        layer = last_layer(evidence, variant)
        assert (loss == "gan") == (variant in PLAIN_GAN)
        has_scale = "scale" in dict(layer.named_parameters())
        assert has_scale == (variant in ("san", "normalized", "san, weights of mean 1"))
        if variant == "gan":
            continue
        logits = layer(features)
        (of_fun,) = torch.autograd.grad(logits.fun.sum(), layer.weight, retain_graph=True, allow_unused=True)
        assert (of_fun is not None and bool(of_fun.any())) == (variant in PLAIN_GAN)
        if loss == "san":
            (of_dir,) = torch.autograd.grad(logits.dir.sum(), layer.weight)
            radial = (of_dir * layer.weight).sum((1, 2, 3)).abs().max()
            assert of_dir.any() and (radial > 1e-3) == (variant == "split")  # the others stay on the sphere


def test_the_cosine_is_1_at_the_optimum_and_lower_elsewhere(evidence):
    """With a generator of fixed images, the optimal direction of each class can be written into the layer."""
    dataset = open_dataset("digits", use_labels=True)
    config = dcgan("hinge").discriminator
    D = DCGANDiscriminator(replace(config, channel_bases=(4,), c_dim=10), "san")
    images, labels = dataset.batch(range(len(dataset)))
    fakes = torch.rand(images.shape) * 2 - 1

    class Fixed:
        z_dim = 2

        def __call__(self, z, labels):
            return fakes

    arguments = (Fixed(), D, san.OBJECTIVES["hinge"], dataset, False)
    assert evidence.direction_cosine(*arguments) < 0.9
    critic = D.critics["critic0"]
    with torch.no_grad():
        real, fake = critic.trunk(images.float() / 127.5 - 1), critic.trunk(fakes)
        for k in range(10):
            critic.last.weight[k] = real[labels == k].mean(0) - fake[labels == k].mean(0)
    assert evidence.direction_cosine(*arguments) == pytest.approx(1, abs=1e-4)


def test_budgets_are_equal_within_an_objective(evidence):
    for objective in evidence.OBJECTIVES:
        gan, of_san = (evidence.make_config(objective, loss, 10, 1.0) for loss in ("gan", "san"))
        assert gan == replace(of_san, loss="gan")


def test_plan_goes_seed_by_seed(evidence):
    runs = evidence.plan_runs(list(evidence.OBJECTIVES), list(evidence.VARIANTS), [0, 1])
    assert [seed for _, _, seed in runs] == sorted(seed for _, _, seed in runs)
    assert {("hinge", "gan", 0), ("hinge", "san", 1), ("hinge", "split", 1)} <= set(runs)
    assert ("wgan", "split", 0) not in runs  # the ablation has two objectives
    assert ("hinge", "san, weights of mean 1", 0) not in runs  # as its weights are 1


# Tables.


def test_tables_of_made_up_runs(evidence, tmp_path):
    results = [result(evidence, "hinge", "gan", seed, fd) for seed, fd in enumerate((700.0, 800.0, 900.0))]
    results += [result(evidence, "hinge", "san", seed, fd) for seed, fd in enumerate((650.0, 810.0, 910.0))]
    results.append(result(evidence, "hinge", "split", 1, 640.0))
    results.append(result(evidence, "wgan", "gan", 0, 1000.0))  # nothing to compare with yet
    order = ("hinge", "wgan"), ("gan", "san", "split")
    tables = evidence.report.write_report(results[::-1], *order, tmp_path)
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == tables
    assert tables.startswith("8 runs, seeds 0, 1, 2.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines()]
    comparison = next(row for row in rows if row[0] == "hinge")
    assert comparison[1:4] == ["800 ± 100", "790 ± 131", "1 of 3"]
    assert ["hinge", "split", "640 ± 0", "1 of 1"] in [row[:4] for row in rows]
    assert not any(row[0] == "wgan" for row in rows)
    with Image.open(tmp_path / "evidence.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors()}
    assert {(0xC4, 0x45, 0x1C), (0x1C, 0x6F, 0xB5), (255, 255, 255)} <= colors


def test_tables_replace_what_stands_between_the_marks(evidence, tmp_path):
    report, document = evidence.report, tmp_path / "d.md"
    document.write_text(f"before\n{report.BEGIN}\nold | \\1\n{report.END}\nafter\n")
    for tables in ("new \\1\n", "newer\n"):
        report.put_tables(document, tables)
        assert (
            document.read_text(encoding="utf-8") == f"before\n{report.BEGIN}\n{tables}{report.END}\nafter\n"
        )
    document.write_text("no marks\n")
    with pytest.raises(ValueError, match="needs one"):
        report.put_tables(document, "new\n")
    assert document.read_text(encoding="utf-8") == "no marks\n"


def test_the_document_holds_the_runs_beside_it(evidence):
    """docs/evidence.md shows the tables that docs/evidence.jsonl gives, digit by digit."""
    report = evidence.report
    results = report.read_results(ROOT / "docs" / "evidence.jsonl")
    groups = report.group(results, evidence.OBJECTIVES, tuple(evidence.VARIANTS))
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.format_tables(groups)}{report.END}" in text
    for objective in evidence.OBJECTIVES:
        for kind in ("gan", "san"):
            assert len(groups[objective, kind]) >= 3, f"{objective} {kind} wants 3 seeds"


# The program.


def test_bad_flags_end_in_one_line(evidence, tmp_path):
    for flags, message in (
        (["--objectives", "hing"], "'hing' is not one of saturating"),
        (["--variants", "gan|sun"], "'sun' is not one of gan, san"),
        (["--seeds", "x"], "x"),
    ):
        outcome = CliRunner().invoke(evidence.main, ["--outdir", str(tmp_path), *flags])
        assert outcome.exit_code == 1 and message in outcome.output.splitlines()[-1]


@pytest.mark.slow
def test_runs_are_added_and_not_repeated(evidence, tmp_path):
    flags = ["--outdir", str(tmp_path), "--kimg-factor", "0.02", "--seeds", "0"]
    flags += ["--objectives", "nonsaturating"]
    runs = tmp_path / "runs.jsonl"
    for variants, count in (("gan", 1), ("gan|san, weights of mean 1", 2), ("gan", 2)):
        outcome = CliRunner().invoke(evidence.main, [*flags, "--variants", variants])
        assert outcome.exit_code == 0, outcome.output
        lines = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == count
    assert [line["variant"] for line in lines] == ["gan", "san, weights of mean 1"]
    assert "nonsaturating | san, weights of mean 1" in (tmp_path / "evidence.md").read_text(encoding="utf-8")
