# SPDX-License-Identifier: MIT
"""The measures of tests/benchmarks/quickstart.py on images whose answer is known."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from metrics import features
from training.dataset import open_dataset

PATH = Path(__file__).parents[1] / "benchmarks" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    dataset = open_dataset("digits", use_labels=True)
    return dataset.batch(range(len(dataset)))


@pytest.fixture(scope="module")
def judge(quickstart, digits):
    return quickstart.train_judge(*digits)


def test_judge_reads_real_digits(judge, quickstart):
    assert judge[1] >= quickstart.MIN_JUDGE_ACCURACY


def test_class_accuracy_counts_per_class(quickstart, judge, digits):
    images, labels = digits
    overall, per_class = quickstart.class_accuracy(judge[0], images, labels)
    assert overall > 0.98 and len(per_class) == 10
    swapped = torch.where(labels == 3, 5, torch.where(labels == 5, 3, labels))
    overall_swapped, per_class = quickstart.class_accuracy(judge[0], images, swapped)
    assert per_class[3] < 0.05 and per_class[5] < 0.05 and per_class[4] > 0.95
    assert overall_swapped == pytest.approx(0.8, abs=0.03)


def test_pairwise_distance(quickstart):
    images = torch.tensor([0, 3, 7], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert quickstart.mean_pairwise_distance(images) == pytest.approx((6 + 8 + 14) / 3)


def test_diversity_of_real_images_is_one_and_of_collapsed_ones_zero(quickstart, digits):
    images, labels = digits
    real = quickstart.diversity_per_class(images, labels, images, labels)
    assert real == pytest.approx([1.0] * 10)
    collapsed = images.clone()
    collapsed[labels == 4] = collapsed[labels == 4][0]
    ratios = quickstart.diversity_per_class(images, labels, collapsed, labels)
    assert ratios[4] == pytest.approx(0, abs=1e-4) and ratios[3] == pytest.approx(1)


def result_with(quickstart, **changes):
    values = {
        "network": "net",
        "fd": 1.0,
        "fd_init": 10.0,
        "judge_accuracy": 0.98,
        "accuracy": 0.7,
        "accuracy_per_class": [0.7] * 10,
        "diversity_per_class": [0.8] * 10,
        "seconds": 300.0,
    }
    return quickstart.Measurement(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"fd": 2.0}, []),
        ({"fd": 2.1}, ["fd_lite0 final / initial"]),
        ({"accuracy": 0.59}, ["class accuracy"]),
        ({"judge_accuracy": 0.96}, ["judge on held-out real digits"]),
        ({"diversity_per_class": [0.8, 0.49]}, ["diversity, worst class"]),
        ({"diversity_per_class": [0.8, float("nan")]}, ["diversity, worst class"]),
        ({"seconds": 601.0}, ["wall time in minutes"]),
        ({"seconds": None, "fd_init": None}, []),
    ],
)
def test_rules(quickstart, changes, failed):
    result = result_with(quickstart, **changes)
    checks = quickstart.check(result, limit_minutes=10)
    assert [c.name for c in checks if not c.passed] == failed
    table = quickstart.format_table(result, checks)
    assert table.count("FAIL") == len(failed) and table.count("PASS") == len(checks) - len(failed)


def test_logs_of_a_run(quickstart, tmp_path):
    assert quickstart.read_initial_fd(tmp_path) is None and quickstart.read_total_seconds(tmp_path) is None
    lines = [{"results": {"fd_lite0": v}, "cur_nimg": n} for v, n in ((50.0, 0), (5.0, 1000))]
    (tmp_path / "metric-fd_lite0.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "stats.jsonl").write_text('{"Timing/total_sec": {"num": 1, "mean": 12.5, "std": 0}}\n')
    assert quickstart.read_initial_fd(tmp_path) == 50.0 and quickstart.read_total_seconds(tmp_path) == 12.5
    (tmp_path / "metric-fd_lite0.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert quickstart.read_initial_fd(tmp_path) is None


def test_training_is_started_and_its_folder_found(quickstart, tmp_path, monkeypatch):
    (tmp_path / "00000-earlier").mkdir()
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / "00001-quickstart").mkdir()

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    run_dir, seconds = quickstart.train("quickstart", 7, tmp_path)
    assert run_dir == tmp_path / "00001-quickstart" and seconds >= 0
    expected = ["--loss", "san", "--preset", "quickstart", "--seed", "7", "--outdir", str(tmp_path)]
    assert commands[0][2:] == expected and Path(commands[0][1]).name == "train.py"


def test_an_untrained_network_fails(quickstart, tmp_path, monkeypatch, write_network):
    class MeanDetector:  # a stand-in: the real network would take seconds
        name, fingerprint = "mean", "1"

        def __call__(self, images):
            return images.float().mean(dim=(1, 2))

    monkeypatch.setattr(features, "lite0_detector", lambda device: MeanDetector())
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart.cpu, "tune_for_training", lambda: None)  # a setting of the whole process
    network = write_network(tmp_path / "net.safetensors", c_dim=10)
    result = CliRunner().invoke(quickstart.main, [network, "--json", "--device", "cpu"])
    assert result.exit_code == 1, result.output
    (row,) = json.loads(result.output)
    assert row["fd"] > 0 and row["accuracy"] < 0.6 and len(row["accuracy_per_class"]) == 10
    verdicts = {c["name"]: c["passed"] for c in row["checks"]}
    assert verdicts["judge on held-out real digits"] and not verdicts["class accuracy"]


def test_a_network_of_something_else_is_refused(quickstart, tmp_path, monkeypatch, write_network):
    monkeypatch.setattr(quickstart.cpu, "tune_for_training", lambda: None)
    network = write_network(tmp_path / "net.safetensors", c_dim=2)
    result = CliRunner().invoke(quickstart.main, [network, "--device", "cpu"])
    assert result.exit_code == 1 and "was not trained on the digits" in result.output
