# SPDX-License-Identifier: MIT
"""Plans of super-resolution networks: official numbers of 8 chains, properties, refused stages.

pytest tests/training/test_network_plan.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError, GeneratorConfig, SuperresConfig, SynthesisConfig
from training.generator.layer_plan import LayerPlan
from training.generator.network_plan import NetworkPlan, plan_network

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/data/g_layer_specs.json").read_text())
HEAD_FIELDS = [*GOLDEN["layer_fields"], "conv_clamp", "magnitude_ema_beta"]
STEM = SynthesisConfig(img_resolution=16, channel_base=512, channel_max=16, num_layers=7)


def chains() -> list:
    """(stem, stages) of every golden chain, and of every shorter one that it begins with."""
    cases = []
    for chain in GOLDEN["superres"]:
        stem, stages = chain["stem"], chain["chain"]
        names = [f"{stage['cfg']}{stage['up_factor']}x{stage['head_layers']}" for stage in stages]
        for length in range(1, len(stages) + 1):
            name = "-".join([f"{stem['cfg']}{stem['num_layers']}", *names[:length]])
            cases.append(pytest.param(stem, stages[:length], id=name))
    return cases


def plan_of(stem: dict, stages: list[dict]) -> NetworkPlan:
    is_r = stem["cfg"] == "r"
    synthesis = SynthesisConfig(
        img_resolution=stem["img_resolution"],
        num_layers=stem["num_layers"],
        channel_base=131072 if is_r else 65536,
        channel_max=2048 if is_r else 1024,
        conv_kernel=1 if is_r else 3,
        use_radial_filters=is_r,
    )
    superres = tuple(
        SuperresConfig(
            up_factor=stage["up_factor"],
            head_layers=stage["head_layers"],
            conv_kernel=1 if stage["cfg"] == "r" else 3,
            use_radial_filters=stage["cfg"] == "r",
        )
        for stage in stages
    )
    return plan_network(GeneratorConfig(synthesis=synthesis, superres=superres))


def flatten(plan: LayerPlan) -> dict:
    """One layer under the golden file's names."""
    values = {name: getattr(plan, name) for name in HEAD_FIELDS if hasattr(plan, name)}
    for side, spec in (("in", plan.source), ("out", plan.target)):
        for name in ("channels", "sampling_rate", "cutoff", "half_width"):
            values[f"{side}_{name}"] = getattr(spec, name)
        values[f"{side}_size"] = [spec.size, spec.size]
    values["tmp_sampling_rate"] = plan.oversampled_rate
    values["padding"] = list(plan.padding)
    down = [plan.down_taps] * (2 if plan.down_radial else 1)
    values["up_filter_shape"] = [plan.up_taps] if plan.up_taps > 1 else None
    values["down_filter_shape"] = down if plan.down_taps > 1 else None
    return values


@pytest.mark.parametrize(("stem", "stages"), chains())
def test_networks_equal_the_official_ones(stem, stages):
    plan, expected = plan_of(stem, stages), stages[-1]
    assert [layer.name for layer in plan.layers] == expected["layer_names"]
    assert [layer.name for layer in plan.head] == expected["head_layer_names"]
    assert (plan.num_ws, plan.img_resolution) == (expected["num_ws"], expected["img_resolution"])


@pytest.mark.parametrize(("stem", "stages"), chains())
def test_feature_maps_of_the_head_equal_the_official_ones(stem, stages):
    specs, expected = [layer.target for layer in plan_of(stem, stages).head], stages[-1]["filterparams"]
    assert [s.sampling_rate for s in specs] == expected["sampling_rates"]
    assert [s.size for s in specs] == expected["sizes"]
    assert [s.channels for s in specs] == expected["channels"]
    for name in ("cutoff", "half_width", "stopband"):
        values = [getattr(s, name) for s in specs]
        assert values == pytest.approx(expected[f"{name}s"], rel=1e-12, abs=0), name


@pytest.mark.parametrize(("stem", "stages"), chains())
def test_layers_of_the_head_equal_the_official_ones(stem, stages):
    for layer, row in zip(plan_of(stem, stages).head, stages[-1]["head"], strict=True):
        actual, expected = flatten(layer), dict(zip(HEAD_FIELDS, row, strict=True))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert actual[name] == pytest.approx(value, rel=1e-12, abs=0), (layer.name, name)
            else:
                assert actual[name] == value, (layer.name, name)


def test_an_index_is_skipped_once_in_a_chain():
    """The stem's layers 5, 6 and 7 go; the head starts at 6; the next head starts where it would anyway."""
    stages = [SuperresConfig(up_factor=2, head_layers=4)] * 3
    names = [
        [int(layer.name.split("_")[0][1:]) for layer in plan_network(cfg).layers]
        for cfg in (GeneratorConfig(synthesis=STEM, superres=tuple(stages[:n])) for n in range(4))
    ]
    assert names[0] == list(range(8))
    for num_stages in (1, 2, 3):
        assert names[num_stages] == [i for i in range(9 + 2 * num_stages) if i != 5]


def test_a_stage_keeps_every_layer_that_is_not_critically_sampled():
    below = plan_network(GeneratorConfig(synthesis=STEM))
    above = plan_network(
        GeneratorConfig(synthesis=STEM, superres=(SuperresConfig(up_factor=4, head_layers=5),))
    )
    assert below.kept == () and len(below.head) == 8
    assert above.kept == below.head[:5] and len(above.head) == 6
    assert above.input == below.input
    for before, after in zip(above.layers, above.layers[1:], strict=False):
        assert after.source == before.target


def test_padding_gives_the_planned_size_across_the_cut():
    """Also where r layers follow t layers, and without a critically sampled layer but ToRGB below."""
    for synthesis in (STEM, replace(STEM, num_critical=0), replace(STEM, margin_size=3)):
        stages = (
            SuperresConfig(up_factor=4, head_layers=5, conv_kernel=1, use_radial_filters=True),
            SuperresConfig(up_factor=2, head_layers=3),
        )
        for plan in plan_network(GeneratorConfig(synthesis=synthesis, superres=stages)).layers:
            oversampled = (plan.source.size + plan.conv_kernel - 1) * plan.up_factor + sum(plan.padding[:2])
            filtered = oversampled - (plan.up_taps - 1) - (plan.down_taps - 1)
            assert (filtered + plan.down_factor - 1) // plan.down_factor == plan.target.size


def test_clamp_and_decay_are_each_stages_own():
    synthesis = replace(STEM, conv_clamp=None, magnitude_ema_beta=0.5)
    stages = (
        SuperresConfig(up_factor=2, head_layers=4),
        SuperresConfig(up_factor=2, head_layers=4, conv_clamp=9.0, magnitude_ema_beta=0.25),
    )
    plan = plan_network(GeneratorConfig(synthesis=synthesis, superres=stages))
    values = [(layer.conv_clamp, layer.magnitude_ema_beta) for layer in plan.layers]
    assert values == [(None, 0.5)] * 5 + [(256.0, 0.999)] * 2 + [(9.0, 0.25)] * 5


def test_half_precision_counts_from_each_stages_resolution():
    synthesis = replace(STEM, img_resolution=64, num_fp16_res=1)
    cfg = GeneratorConfig(synthesis=synthesis, superres=(SuperresConfig(up_factor=4, head_layers=7),))
    plan = plan_network(cfg)
    assert [layer.use_fp16 for layer in plan.kept] == [
        layer.target.sampling_rate * 2 > 64 for layer in plan.kept
    ]
    assert [layer.use_fp16 for layer in plan.head] == [
        layer.target.sampling_rate * 2 > 256 for layer in plan.head
    ]
    assert any(layer.use_fp16 for layer in plan.kept) and not plan.head[0].use_fp16


def test_planning_needs_no_torch():
    code = "import sys; import training.generator.network_plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up_factor": 3}, ["up_factor=3", "2, 4, 8, 16"]),
        ({"up_factor": 1}, ["up_factor=1"]),
        ({"up_factor": 32}, ["up_factor=32"]),
        ({"head_layers": 2}, ["head_layers=2", "at least 3"]),
        ({"head_layers": 0}, ["head_layers=0"]),
        ({"conv_kernel": 2}, ["conv_kernel=2", "odd"]),
    ],
)
def test_impossible_stages_are_refused_in_one_line(change, words):
    stage = replace(SuperresConfig(up_factor=2, head_layers=4), **change)
    with pytest.raises(ConfigError) as caught:
        plan_network(GeneratorConfig(synthesis=STEM, superres=(stage,)))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_head_without_channels_is_refused():
    cfg = GeneratorConfig(
        synthesis=replace(STEM, channel_base=64), superres=(SuperresConfig(up_factor=16, head_layers=4),)
    )
    with pytest.raises(ConfigError, match=r"channel_base=64.*without channels; use at least 256"):
        plan_network(cfg)
