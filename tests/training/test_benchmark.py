# SPDX-License-Identifier: MIT
"""`python -m training.benchmark` on tiny networks: phases add up, the floor counts, points grow, the command works."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from torch_utils.ops import choice
from training.benchmark import floor, growth, growth_figure, measure, phases, tables
from training.benchmark.__main__ import main
from training.benchmark.measure import Comparison, Machine, Timing
from training.benchmark.recipes import DEFAULT_RECIPES, benchmark_config
from training.benchmark.subjects import OurTrainer, build_networks, draw_images
from training.generator.generator import Generator
from training.generator.reach import reached_paddings
from training.generator.synthesis import SynthesisInput
from training.presets import PRESETS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MACHINE = Machine(device="cpu", threads=1, ops="reference")
CEILINGS = floor.Ceilings(flops_per_s=1e11, half_flops_per_s=4e11, bytes_per_s=1e10)


@pytest.fixture(autouse=True)
def settings_of_this_process(monkeypatch):
    """`measure.set_up` is meant for processes of its own."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(choice, "_chosen", choice.backend())
    monkeypatch.setattr(measure, "reset_peak", lambda device: None)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def tiny_trainer(recipe="cifar10-16", batch_size=3):
    config = benchmark_config(recipe, batch_size, is_tiny=True)
    return OurTrainer(config, build_networks(config, CPU), None, CPU)


def test_default_recipes_are_presets():
    assert set(DEFAULT_RECIPES) <= set(PRESETS)


def test_width_scales_channels_and_nothing_else():
    full, narrow = (benchmark_config("imagenet-256", 2, width) for width in (1.0, 0.25))
    assert full.generator == PRESETS["imagenet-256"]().generator
    assert narrow.generator.synthesis.channel_max == full.generator.synthesis.channel_max // 4
    assert replace(narrow, generator=full.generator) == full
    assert full.batch_size == full.microbatch_size == 2


def test_phases_add_up_to_the_iteration():
    seconds = itertools.count()  # a second between two marks
    trainer, clock = tiny_trainer(), phases.PhaseClock(now=lambda: next(seconds))
    images = draw_images(trainer.config, CPU)
    with phases.watch(trainer, clock):
        clock.start()
        trainer.iterate(images)
        clock.mark("EMA")
    expected = set(phases.PHASES) - {"data", "path length"}
    assert {name: s for name, s in clock.seconds.items() if s} == dict.fromkeys(expected, 1)
    # The hooks are gone.
    trainer.iterate(images)
    assert sum(clock.seconds.values()) == len(expected)


def test_phases_and_trace(tmp_path):
    config = benchmark_config("cifar10-16", 3, is_tiny=True)
    config = replace(config, data=replace(config.data, num_workers=0))
    report = phases.measure_phases(config, MACHINE, repeats=1, trace=tmp_path / "trace.json")
    assert list(report.seconds) == list(phases.PHASES) and min(report.seconds.values()) > 0
    assert report.loader_images_per_s > 0
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any("Adam" in str(name) for name in names)
    works = floor.iteration_work(config, "cpu")
    table = tables.phase_table(report, works, CEILINGS)
    for name in (*phases.PHASES, "iteration"):
        assert f"\n{name} " in table


def test_flops_of_layers_follow_their_formula(monkeypatch):
    """A convolution has 2 * I * O * k * k operations per output pixel; the backward pass twice as many."""
    config = benchmark_config("imagenet-16", 2, is_tiny=True)
    with torch.device("meta"):
        G = Generator(config.generator)
    forward, backward = floor.generator_work(G, 2, "cpu")
    convolutions = filters = 0
    size = G.synthesis.plan.input.size
    for layer, padding in zip(G.synthesis.layers, reached_paddings(G.synthesis.plan.layers), strict=True):
        plan = layer.plan
        side = size + plan.conv_kernel - 1
        convolutions += 2 * 2 * side**2 * plan.source.channels * plan.target.channels * plan.conv_kernel**2
        x = torch.zeros(2, plan.target.channels, side, side, device="meta")
        size, work = floor.filter_work(layer, x, sum(padding[:2]))
        filters += work.flops
    assert size == G.img_resolution
    assert forward.full.flops == pytest.approx(
        convolutions + filters, rel=0.2
    )  # styles and the input come on top
    assert forward.full.flops > convolutions + filters
    assert 1.5 * convolutions + filters < backward.full.flops < 2.5 * convolutions + filters
    assert forward.half.flops == 0
    half, _ = floor.generator_work(G, 2, "cuda")
    assert half.half.flops > 0
    monkeypatch.setattr(SynthesisInput, "is_determined_by_nodes", lambda self: False)  # as on a GPU
    whole, _ = floor.generator_work(G, 2, "cpu")
    assert half.half.flops + half.full.flops == pytest.approx(whole.full.flops)


def test_flops_of_nodes(monkeypatch):
    """Of 36x36 pixels the input and the first 1x1 convolution need 20x20; to make the others costs little."""
    with torch.device("meta"):
        G = Generator(PRESETS["cifar10-16"]().generator)
    few, _ = floor.generator_work(G, 1, "cpu")
    monkeypatch.setattr(SynthesisInput, "is_determined_by_nodes", lambda self: False)
    whole, _ = floor.generator_work(G, 1, "cpu")
    channels = G.synthesis.plan.input.channels
    saved = 2 * 2 * (36**2 - 20**2) * channels**2
    assert 0.9 * saved < whole.full.flops - few.full.flops < saved


def test_filter_work_of_a_separable_filter():
    """By hand, for a layer that up-samples and down-samples by two with twelve taps each."""
    config = benchmark_config("imagenet-16", 1, is_tiny=True)
    with torch.device("meta"):
        G = Generator(config.generator)
    layer = next(x for x in G.synthesis.layers if (x.plan.up_taps, x.plan.down_taps) == (12, 12))
    plan = layer.plan
    size, out, channels = plan.source.size + 2, plan.target.size, plan.target.channels
    x = torch.zeros(1, channels, size, size, device="meta")
    full = 2 * size + sum(plan.padding[:2]) - 11
    assert (full - 11 + 1) // 2 == out
    macs = 6 * (size * full + full * full) + 12 * (full * out + out * out)
    side, work = floor.filter_work(layer, x, sum(plan.padding[:2]))
    assert side == out and work.flops == 2 * channels * macs


def test_work_of_an_iteration_grows_with_the_batch():
    small, large = (
        floor.iteration_work(benchmark_config("cifar10-16", n, is_tiny=True), "cpu") for n in (2, 4)
    )
    assert small.keys() == set(phases.PHASES) - {"data"}
    for name in ("G forward", "G backward", "G through D", "D real", "path length"):
        assert large[name].full.flops == pytest.approx(2 * small[name].full.flops, rel=0.1)
    for name in ("optimizer of G", "optimizer of D", "EMA"):
        assert large[name] == small[name] and small[name].full.bytes > 0
    assert small["G through D"].full.flops > small["D fake"].full.flops


def test_least_time_is_that_of_the_scarcer():
    work = floor.PhaseWork(floor.Work(2e11, 1e9), floor.Work(4e11, 1e9))
    assert work.seconds(CEILINGS) == pytest.approx(
        3
    )  # two seconds in float32, one in half, 0.2 for the traffic
    assert work.seconds(replace(CEILINGS, bytes_per_s=1e8)) == pytest.approx(20)


def test_table_names_what_differs_and_what_did_not_fit():
    timings = {
        "ours": Timing(seconds=[1.0, 3.0, 2.0], peak_bytes=2**30),
        "naive": Timing(seconds=[8.0], peak_bytes=2**31),
    }
    common = {"recipe": "r", "batch_size": 1, "width": 1.0}
    same = Comparison(row="step", **common, timings=timings, differences={"G": 1e-5}, tolerances={"G": 1e-3})
    off = replace(same, row="forward", differences={"images": 0.5}, tolerances={"images": 1e-4})
    lost = Comparison(row="sampling", **common, timings={"ours": timings["ours"]})
    text = tables.comparison_table([same, off, lost])
    assert "4.00x" in text and "0.50x" in text and "same" in text
    assert "DIFFERENT" in text and "images 0.5 (at most 0.0001)" in text
    assert "out of memory" in text and "27.78 h" in text
    value = json.loads(json.dumps(tables.to_json_value({"rows": [same, off]})))
    assert value["rows"][0]["agrees"] is True and value["rows"][1]["agrees"] is False


def test_points_vary_in_one_thing():
    batch, classes = growth.growth_config("batch", 16), growth.growth_config("classes", 20_000)
    assert batch.batch_size == 16 and classes.batch_size == growth.BATCH
    assert classes.generator.c_dim == classes.discriminator.num_class_embeddings == 20_000
    sides = [
        growth.growth_config("resolution", value).generator.img_resolution for value in growth.RESOLUTIONS
    ]
    assert sides == list(growth.RESOLUTIONS)
    counts = [value for axis, value in growth.plan_points(MACHINE, is_quick=False) if axis == "processes"]
    assert counts == [1, 2, 4]


def test_plots_of_growth(tmp_path, monkeypatch):
    """With made-up times; a point that ran out of memory is told, and not drawn."""

    def measure_point(axis, value, machine, is_tiny):
        lost = axis == "batch" and value == 2
        return growth.Point(axis, value, 2, None if lost else 0.5 * value, None if lost else 2**30)

    monkeypatch.setattr(growth, "measure_point", measure_point)
    points = growth.run_growth(tmp_path / "new", MACHINE, is_quick=True)
    assert (tmp_path / "new" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "new" / "growth.json").read_text())) == len(points) == 8
    assert "out of memory" in growth.format_points(points)


def test_what_does_not_grow_looks_level():
    points = [growth.Point("processes", n, n, 0.1 * n * n**0.01, 2**30) for n in (1, 2)]
    time, memory = (panel.get_ylim() for panel in growth_figure.draw_growth(points).axes)
    assert time[1] / time[0] == pytest.approx(growth_figure.MIN_RATIO)
    assert memory[1] / memory[0] >= growth_figure.MIN_RATIO


@pytest.mark.slow
def test_a_point_of_two_processes():
    point = growth.measure_point("processes", 2, MACHINE, is_tiny=True)
    assert point.images == 2 * growth.RANK_BATCH
    assert point.seconds > 0 and point.peak_bytes > 2**26


def test_the_command(tmp_path):
    """A row in two processes, and everything as JSON."""
    arguments = [
        "--quick",
        "--rows",
        "forward",
        "--recipes",
        "cifar10-16",
        "--threads",
        "1",
        "--ops",
        "reference",
    ]
    command = [sys.executable, "-m", "training.benchmark", *arguments, "--json", str(tmp_path / "out.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["table"]
    assert row["agrees"] and len(row["timings"]["naive"]["seconds"]) == 2
    assert "G forward" in result.stdout and "same" in result.stdout


def test_processes_end_with_a_killed_parent():
    """In the middle of their work. Their standard output, which they share with it, is open as long as they live."""
    code = (
        "import time; from training.benchmark.measure import start_process; process = start_process();"
        "process.submit(print, 'started', flush=True).result(); process.submit(time.sleep, 600); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "forwards"], "'forwards' is not one of forward, backward"),
        (["--recipes", "cifar"], "'cifar' is not one of"),
        (["--rows", "forward", "--profile", "x.json"], "add phases to --rows"),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--json", "/dev/null/out.json"], "--json /dev/null/out.json: "),
        (["--quick", "--width", "0.0001", "--recipes", "imagenet-256"], "channel_base"),
    ],
)
def test_refusals(arguments, words):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0 and words in result.output and "Traceback" not in result.output


def test_peak_of_this_process_grows():
    before = measure.read_peak()
    block = np.ones(2**27, dtype=np.uint8)
    assert measure.read_peak() >= before and measure.read_peak() > block.nbytes
