# SPDX-License-Identifier: MIT
"""The synthesis network's plan: official numbers of 45 configurations, properties, refused configurations.

pytest tests/training/test_layer_plan.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError, SynthesisConfig
from training.generator.layer_plan import LayerPlan, connect_layers, plan_layers

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/data/g_layer_specs.json").read_text())
STEMS = [pytest.param(s, id=f"{s['cfg']}-{s['img_resolution']}-{s['num_layers']}") for s in GOLDEN["stems"]]


def stem_config(stem: dict) -> SynthesisConfig:
    names = (
        "img_resolution",
        "num_layers",
        "channel_base",
        "channel_max",
        "conv_kernel",
        "use_radial_filters",
    )
    return SynthesisConfig(**{name: stem[name] for name in names})


def filter_shape(num_taps: int, is_radial: bool) -> list[int] | None:
    if num_taps == 1:
        return None
    return [num_taps, num_taps] if is_radial else [num_taps]


def flatten(plan: LayerPlan) -> dict:
    """One layer under the golden file's names."""
    values = {"name": plan.name, "tmp_sampling_rate": plan.oversampled_rate, "padding": list(plan.padding)}
    for side, spec in (("in", plan.source), ("out", plan.target)):
        values[f"{side}_channels"] = spec.channels
        values[f"{side}_size"] = [spec.size, spec.size]
        values[f"{side}_sampling_rate"] = spec.sampling_rate
        values[f"{side}_cutoff"] = spec.cutoff
        values[f"{side}_half_width"] = spec.half_width
    for name in ("is_torgb", "is_critically_sampled", "use_fp16", "conv_kernel", "up_factor", "down_factor"):
        values[name] = getattr(plan, name)
    for name in ("up_taps", "down_taps", "down_radial"):
        values[name] = getattr(plan, name)
    values["up_filter_shape"] = filter_shape(plan.up_taps, is_radial=False)
    values["down_filter_shape"] = filter_shape(plan.down_taps, is_radial=plan.down_radial)
    return values


@pytest.mark.parametrize("stem", STEMS)
def test_specs_equal_the_official_ones(stem):
    specs = plan_layers(stem_config(stem))
    for name, values in (
        ("cutoffs", [s.cutoff for s in specs]),
        ("stopbands", [s.stopband for s in specs]),
        ("half_widths", [s.half_width for s in specs]),
    ):
        assert values == pytest.approx(stem[name], rel=1e-12, abs=0), name
    assert [s.sampling_rate for s in specs] == stem["sampling_rates"]
    assert [s.size for s in specs] == stem["sizes"]
    assert [s.channels for s in specs] == stem["channels"]
    first = specs[0]
    assert [first.size, first.size] == stem["input"]["size"]
    assert (first.channels, first.sampling_rate) == (
        stem["input"]["channels"],
        stem["input"]["sampling_rate"],
    )
    assert first.cutoff == pytest.approx(stem["input"]["bandwidth"], rel=1e-12)
    assert len(specs) + 1 == stem["num_ws"]


@pytest.mark.parametrize("stem", STEMS)
def test_layers_equal_the_official_ones(stem):
    cfg = stem_config(stem)
    plans = connect_layers(cfg, plan_layers(cfg))
    assert [plan.name for plan in plans] == stem["layer_names"]
    for plan, row in zip(plans, stem["layers"], strict=True):
        actual, expected = flatten(plan), dict(zip(GOLDEN["layer_fields"], row, strict=True))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert actual[name] == pytest.approx(value, rel=1e-12, abs=0), (plan.name, name)
            else:
                assert actual[name] == value, (plan.name, name)


@pytest.mark.parametrize("margin_size", [0, 3, 10])
@pytest.mark.parametrize("conv_kernel", [1, 3])
def test_padding_gives_the_planned_size(margin_size, conv_kernel):
    cfg = SynthesisConfig(img_resolution=64, margin_size=margin_size, conv_kernel=conv_kernel)
    for plan in connect_layers(cfg, plan_layers(cfg)):
        oversampled = (plan.source.size + plan.conv_kernel - 1) * plan.up_factor + sum(plan.padding[:2])
        filtered = oversampled - (plan.up_taps - 1) - (plan.down_taps - 1)
        assert (filtered + plan.down_factor - 1) // plan.down_factor == plan.target.size


def test_no_layer_in_half_precision_when_fp16_is_off():
    cfg = SynthesisConfig(img_resolution=256, num_fp16_res=0)
    assert not any(plan.use_fp16 for plan in connect_layers(cfg, plan_layers(cfg)))


def test_planning_needs_no_torch():
    code = "import sys; import training.generator.layer_plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_resolution": 48}, ["48", "power of two"]),
        ({"img_resolution": 4}, ["first_cutoff=2.0", "2.0"]),
        ({"num_layers": 2}, ["num_layers=2", "num_critical=2"]),
        ({"num_critical": -1}, ["num_critical=-1"]),
        ({"conv_kernel": 2}, ["conv_kernel=2", "odd"]),
        ({"first_stopband": 1.5}, ["1.5", "2.0"]),
        ({"last_stopband_rel": 1.0}, ["last_stopband_rel=1.0"]),
        ({"margin_size": -1}, ["margin_size=-1"]),
        ({"channel_base": 20}, ["channel_base=20", "without channels"]),
    ],
)
def test_impossible_plans_are_refused_in_one_line(change, words):
    cfg = replace(SynthesisConfig(img_resolution=64), **change)
    with pytest.raises(ConfigError) as caught:
        plan_layers(cfg)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)
