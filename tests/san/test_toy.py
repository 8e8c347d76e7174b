# SPDX-License-Identifier: MIT
"""The synthetic experiment: its measures, its stacked runs, its program; the paper's claim, which takes minutes.

python -m pytest tests/san/test_toy.py
python -m pytest tests/san/test_toy.py -m slow
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import san
from san import conditions, toy, toy_figure, toy_ring, toy_training
from san.toy_ring import Ring
from san.toy_training import ALL_OBJECTIVES, Draws, Settings

TINY = Settings(
    width=12, batch_size=16, iterations=6, record_iterations=3, num_samples=64, num_final_samples=100
)


def run(
    name: str, settings: Settings = TINY, seeds: range = range(2)
) -> list[dict[str, toy_training.Record]]:
    return list(toy_training.train(name, settings, seeds))


# The ring and its measures.


def test_the_ring_is_what_it_says() -> None:
    ring = Ring(num_modes=8, radius=2.0, std=0.1)
    samples = ring.sample(40_000, torch.Generator().manual_seed(0))
    distances = torch.cdist(samples, ring.centres())
    nearest = distances.argmin(1)
    assert (nearest.bincount() / 40_000).tolist() == pytest.approx([1 / 8] * 8, abs=0.01)
    offsets = samples - ring.centres()[nearest]
    assert offsets.std(0).tolist() == pytest.approx([0.1, 0.1], abs=0.002)
    assert ring.centres().norm(dim=1).tolist() == pytest.approx([2.0] * 8)
    assert ring.centres()[2].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)


def test_all_modes_of_true_samples_are_covered() -> None:
    ring = Ring()
    modes, quality = toy_ring.count_modes(ring.sample(10_000, torch.Generator().manual_seed(0)), ring)
    assert modes.item() == 8
    assert quality.item() == pytest.approx(1 - math.exp(-4.5), abs=0.003)  # Rayleigh: within 3 deviations


def test_a_mode_needs_one_percent_of_the_samples() -> None:
    ring, centres = Ring(), Ring().centres()
    at_first = centres[:1].expand(99, 2)
    modes, quality = toy_ring.count_modes(torch.stack([torch.cat([at_first, centres[1:2]])] * 2), ring)
    assert modes.tolist() == [2, 2]
    assert quality.tolist() == [1, 1]
    less = torch.cat([at_first, at_first, centres[1:2]])  # 1 in 199
    assert toy_ring.count_modes(less, ring)[0].item() == 1
    border = centres[:1] * (1 + 3 * ring.std * torch.tensor([[0.99], [1.01]]))
    assert toy_ring.count_modes(border, ring)[1].item() == 0.5


def test_sliced_distance_of_a_shift_and_of_a_scaling() -> None:
    points = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.3, 0.4])
    assert toy_ring.sliced_wasserstein(points, points + shift).item() == pytest.approx(
        0.5 * 2 / math.pi, rel=1e-3
    )
    scaled = toy_ring.sliced_wasserstein(points, 3 * points).item()
    assert scaled == pytest.approx(2 * math.sqrt(2 / math.pi), rel=0.05)
    assert toy_ring.sliced_wasserstein(points, points.flip(0)).item() == 0


# Stacked runs.


def test_a_stacked_discriminator_is_one_network_per_run() -> None:
    draws = Draws(range(3), 2, torch.device("cpu"))
    D = toy_training.Discriminator(10, 3, 2, draws)
    x = torch.randn(6, 5, 2)
    logits = D(x)
    for i in range(6):
        layers = [m for m in D.features if isinstance(m, toy_training.StackedLinear)]
        h = x[i]
        for layer in layers:
            h = nn.functional.leaky_relu(h @ layer.weight[i] + layer.bias[i], 0.1)
        if i < 3:
            expected = san.SANLogits.plain(h @ D.weight[i])
        else:
            head = san.SANLinear(10, 1)
            with torch.no_grad():
                head.weight.copy_(D.embed.weight[i - 3])
                head.scale.copy_(D.embed.scale[i - 3])
            expected = head(h)[:, 0]
        torch.testing.assert_close(logits[i].fun, expected.fun)
        torch.testing.assert_close(logits[i].dir, expected.dir)


@pytest.mark.parametrize("name", ["nonsaturating", "wasserstein", "relativistic"])
def test_a_run_does_not_depend_on_its_neighbours(name: str) -> None:
    together, alone = run(name, seeds=range(3)), run(name, seeds=range(1, 2))
    for kind in ("GAN", "SAN"):
        torch.testing.assert_close(
            together[-1][kind].samples[1], alone[-1][kind].samples[0], atol=1e-4, rtol=1e-3
        )


def test_losses_are_those_of_the_library_run_by_run() -> None:
    fun = torch.randn(3, 20)
    logits = san.SANLogits(fun.clone(), fun.clone())
    objective = san.OBJECTIVES["saturating"]

    def loss(one: san.SANLogits) -> torch.Tensor:
        return san.san_real_loss(objective, one, normalize_weights=True)

    total = toy_training.sum_over_runs(loss, logits)
    assert total.item() == pytest.approx(sum(loss(logits[i]).item() for i in range(3)), rel=1e-5)


@pytest.mark.parametrize("name", list(ALL_OBJECTIVES))
def test_every_objective_trains(name: str) -> None:
    records = run(name)
    assert [r["GAN"].iteration for r in records] == [0, 3, 6]
    assert set(records[0]) == ({"GAN"} if name == "least_squares" else {"GAN", "SAN"})
    for kind, record in records[-1].items():
        assert not torch.equal(record.samples, records[0][kind].samples)
        for field in dataclasses.fields(record):
            if field.name not in ("iteration", "samples"):
                assert getattr(record, field.name).isfinite().all()
                assert getattr(record, field.name).shape == (2,)
    assert records[-1]["GAN"].samples.shape == (2, 100, 2)


def test_a_seed_s_gan_and_san_start_equal() -> None:
    first = run("hinge")[0]
    for field in ("samples", "cosine", "mean_difference", "wasserstein"):
        torch.testing.assert_close(getattr(first["GAN"], field), getattr(first["SAN"], field))


def test_runs_repeat_by_seed() -> None:
    first, second, other = run("hinge"), run("hinge"), run("hinge", seeds=range(2, 4))
    assert torch.equal(first[-1]["SAN"].samples, second[-1]["SAN"].samples)
    assert not torch.equal(first[-1]["SAN"].samples, other[-1]["SAN"].samples)


def test_directions_stay_on_the_sphere_and_measures_are_those_of_the_conditions() -> None:
    draws = Draws(range(2), 2, torch.device("cpu"))
    objective = san.OBJECTIVES["nonsaturating"]
    G = toy_training.make_mlp([TINY.z_dim, 12, 2], nn.ReLU(), draws)
    D = toy_training.Discriminator(12, 2, 2, draws)
    optimizer = torch.optim.Adam(D.parameters(), lr=0.05)
    before = D.directions()
    for _ in range(5):
        toy_training.discriminator_step("nonsaturating", TINY, G, D, optimizer, draws)
    directions = D.directions()
    torch.testing.assert_close(directions[2:].norm(dim=1), torch.ones(2))
    assert (directions - before).abs().amax(1).min() > 0.01  # every run has learned something
    state = [generator.get_state() for generator in draws.generators]
    record = toy_training.make_record(objective, TINY, G, D, draws, 5, 50)["SAN"]
    for generator, value in zip(draws.generators, state, strict=True):
        generator.set_state(value)
    real, fake = draws.data(TINY.ring, 50), G(draws.normal(50, TINY.z_dim))
    for i in range(2):
        h_real, h_fake = D.features(real)[2 + i], D.features(fake)[2 + i]
        weights = [
            san.direction_weights(objective, D.embed.scale[i] * h @ directions[2 + i])
            for h in (h_real, h_fake)
        ]
        weights = [w / w.mean() for w in weights]
        difference = conditions.mean_difference(h_real, h_fake, *weights)
        cosine = conditions.direction_cosine(directions[2 + i], difference)
        torch.testing.assert_close(record.cosine[i], cosine, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(record.mean_difference[i], difference.norm(), atol=1e-4, rtol=1e-4)


# The program.


def test_program_writes_table_numbers_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [
        "--seeds=2",
        "--iterations=4",
        "--record-every=2",
        "--width=8",
        "--batch=8",
        "--threads=1",
        "--first-seed=3",
    ]
    toy.main([*flags, "--objectives", "hinge", "least_squares", "--outdir", str(tmp_path / "new" / "out")])
    out = tmp_path / "new" / "out"
    assert sorted(file.name for file in out.iterdir()) == ["figure.svg", "results.json", "table.md"]
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    lines = table.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    assert {len(row) for row in cells} == {len(toy.COLUMNS)}
    assert [row[:2] for row in cells[2:]] == [
        ["hinge", "GAN"],
        ["hinge", "SAN"],
        ["least_squares", "GAN"],
        ["data", ""],
    ]
    assert "claim does not hold" in lines[7]  # after four steps
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert numbers["settings"]["width"] == 8
    assert numbers["seeds"] == [3, 4]
    series = numbers["results"]["hinge"]["SAN"]
    assert series["iteration"] == [0, 2, 4]
    assert len(series["cosine"]) == 3
    assert len(series["cosine"][0]) == 2
    svg = ElementTree.fromstring((out / "figure.svg").read_text(encoding="utf-8"))
    assert svg.tag.endswith("svg")
    assert len(svg.findall(".//{*}circle")) == 3 * 2 * 8  # rows of panels, panels, modes


def make_record(iteration: int, modes: list[float], cosine: list[float]) -> toy_training.Record:
    count = len(modes)
    zeros = torch.zeros(count)
    return toy_training.Record(
        iteration,
        torch.tensor(modes, dtype=torch.float32),
        zeros,
        zeros,
        torch.tensor(cosine),
        zeros,
        zeros,
        zeros,
        torch.zeros(count, 3, 2),
    )


@pytest.mark.parametrize(
    ("modes", "cosines", "verdicts"),
    [
        ([8, 8, 8, 8, 3], [0.9, 0.8], ["holds", "holds"]),
        ([8, 8, 8, 7, 3], [0.9, 0.8], ["does not hold", "holds"]),
        ([8, 8, 8, 8, 8], [0.9, 0.2], ["holds", "does not hold"]),
    ],
)
def test_the_verdict_counts_seeds_and_measurements(
    modes: list[int], cosines: list[float], verdicts: list[str]
) -> None:
    runs = {
        "GAN": [make_record(i, [8] * 5, [0.5] * 5) for i in range(3)],
        "SAN": [make_record(i, modes, [c] * 5) for i, c in enumerate([0.5, *cosines])],
    }
    (line,) = toy.judge({"hinge": runs}, Ring())
    assert [part.split(")")[0] for part in line.split("(claim ")[1:]] == verdicts
    table = toy.make_table({"hinge": runs}, Settings(num_final_samples=1000))
    assert f"{sum(m == 8 for m in modes)} of 5" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0 is less than 1"),
        (["--record-every", "0"], "--record-every 0 is less than 1"),
        (["--first-seed", "-1"], "--first-seed -1 is negative"),
        (["--std", "-1"], "--std -1.0 is not a positive number"),
        (["--lr", "nan"], "--lr nan is not a positive number"),
        (["--objectives", "hing"], "invalid choice: 'hing'"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_bad_flags_end_in_one_line_and_write_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        toy.main([*flags, "--outdir", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_settings_in_the_documentation_are_flags() -> None:
    """Every setting that docs/evidence.md reports can be asked for."""
    text = (Path(san.__file__).parents[1] / "docs" / "evidence.md").read_text(encoding="utf-8")
    settings = re.findall(r"^\| `(--[^`]+)` \| (\w+) ", text, flags=re.MULTILINE)
    assert len(settings) >= 5
    for flags, objective in settings:
        options = toy.make_parser().parse_args([*flags.split(), "--objectives", objective])
        assert toy.find_problem(options) is None


def test_outdir_must_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        toy.main(["--outdir", str(tmp_path / "out")])
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_panels_are_spread_over_training() -> None:
    records = [make_record(i, [0.0], [0.0]) for i in range(0, 1300, 100)]
    assert [r.iteration for r in toy_figure.pick_times(records)] == [200, 400, 600, 800, 1000, 1200]
    assert [r.iteration for r in toy_figure.pick_times(records[:3])] == [100, 200]
    assert toy_figure.pick_times(records[:1]) == records[:1]


def test_san_directions_are_closer_to_the_optimum_on_a_short_run() -> None:
    settings = dataclasses.replace(
        TINY,
        width=16,
        batch_size=32,
        lr=5e-3,
        num_d_steps=3,
        iterations=150,
        record_iterations=15,
        num_samples=256,
    )
    records = run("nonsaturating", settings, range(4))
    cosines = {
        kind: torch.stack([r[kind].cosine for r in records[4:]]).mean().item() for kind in ("GAN", "SAN")
    }
    assert cosines["SAN"] > cosines["GAN"] + 0.02
    assert cosines["SAN"] > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", toy.PAPER_OBJECTIVES)
def test_the_papers_claim_at_the_defaults(name: str) -> None:
    """SAN covers all modes in at least 4 of 5 seeds, and its direction is closer to the optimal one than the GAN's.

    Closer throughout but for the first steps, where it may tie, and now and then at the end, where both
    distributions agree and the optimal direction is noise: 9 of 10 measurements. Other settings fail:
    docs/evidence.md has them.
    """
    records = run(name, Settings(), range(5))
    runs = {kind: [record[kind] for record in records] for kind in ("GAN", "SAN")}
    assert (runs["SAN"][-1].modes == 8).sum() >= 4
    cosines = {kind: values.mean().item() for kind, values in toy.mean_cosines(runs).items()}
    assert cosines["SAN"] > cosines["GAN"] + 0.05
    above, total = toy.share_above(runs)
    assert above >= 0.9 * total
