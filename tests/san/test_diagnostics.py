# SPDX-License-Identifier: MIT
"""`SANDiagnostics` against the same numbers by hand, and what it must leave alone.

python -m pytest tests/san/test_diagnostics.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san import OBJECTIVES, PAIRED_OBJECTIVES, conditions
from san.diagnostics import SANDiagnostics

ALL_OBJECTIVES = {**OBJECTIVES, **PAIRED_OBJECTIVES}
SAN_OBJECTIVES = [name for name, objective in ALL_OBJECTIVES.items() if objective.potential is not None]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_mlp(out_features: int = 1, input_bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    D = nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.2), san.SANLinear(6, out_features, input_bias))
    if input_bias:
        nn.init.normal_(D[2].bias)
    return D


def record_both(diagnostics: SANDiagnostics, real: tuple, fake: tuple) -> tuple:
    with diagnostics.record("fake"):
        fake_logits = diagnostics.D(*fake)
    with diagnostics.record("real"):
        real_logits = diagnostics.D(*real)
    return real_logits, fake_logits


def direction_cosine(direction: Tensor, difference: Tensor) -> float:
    return F.cosine_similarity(direction.flatten(), difference.flatten(), dim=0).item()


@pytest.mark.parametrize("input_bias", [False, True])
@pytest.mark.parametrize("name", SAN_OBJECTIVES)
def test_linear_head(name: str, input_bias: bool) -> None:
    D, objective = make_mlp(input_bias=input_bias), ALL_OBJECTIVES[name]
    diagnostics = SANDiagnostics(D, objective)
    real, fake = draw(0, 32, 3) + 0.5, draw(1, 32, 3)
    real_logits, fake_logits = record_both(diagnostics, (real,), (fake,))
    values = diagnostics.measure()
    real_h, fake_h = (D[:2](x) + (D[2].bias if input_bias else 0) for x in (real, fake))
    reals = real_logits.fun if objective.is_paired else None
    weights = [san.direction_weights(objective, x.fun, reals)[:, 0] for x in (real_logits, fake_logits)]
    difference = conditions.mean_difference(real_h, fake_h, *weights)
    halves = [
        conditions.mean_difference(real_h[i::2], fake_h[i::2], *(w[i::2] for w in weights)) for i in (0, 1)
    ]
    direction = F.normalize(D[2].weight.detach(), dim=1)
    order = conditions.compare_slices((real_h @ direction.T)[:, 0], (fake_h @ direction.T)[:, 0])
    ratios = conditions.expansion_ratios(real, real_h)
    expected = {
        "cosine": direction_cosine(direction, difference),
        "mean_difference": difference.norm().item(),
        "agreement": direction_cosine(*halves),
        "in_order": order.in_order.item(),
        "separability_gap": order.gap.item(),
        "slice_distance": order.wasserstein.item(),
        "collision": (ratios.min() / ratios.median()).item(),
        "drift_deg": 0.0,
        "scale": D[2].scale.item(),
    }
    assert {key: value for key, value in values.items() if "/" not in key} == pytest.approx(
        expected, abs=1e-5
    )
    assert {key: values[f"{key}/2"] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert len(values) == 2 * len(expected)


def test_optimal_direction_has_cosine_one_and_training_moves_towards_it() -> None:
    D = san.SANLinear(8, 1)
    diagnostics = SANDiagnostics(D)
    real, fake = draw(0, 200, 8) + 0.5, draw(1, 200, 8)
    optimizer = torch.optim.Adam([D.weight], lr=0.05)
    cosines = []
    for _ in range(60):
        logits = record_both(diagnostics, (real,), (fake,))
        optimizer.zero_grad()
        san.hinge_discriminator_loss(*logits).backward()
        optimizer.step()
        san.normalize_directions_(D)
        cosines.append(diagnostics.measure()["cosine"])
    assert cosines[0] < 0.8
    assert cosines[-1] > 0.99
    with torch.no_grad():
        D.weight.copy_(F.normalize((real.mean(0) - fake.mean(0)).unsqueeze(0)))
    record_both(diagnostics, (real,), (fake,))
    assert diagnostics.measure()["cosine"] == pytest.approx(1, abs=1e-5)


def test_drift_is_the_angle_that_the_step_turned() -> None:
    D = make_mlp()
    diagnostics = SANDiagnostics(D)
    record_both(diagnostics, (draw(0, 8, 3),), (draw(1, 8, 3),))
    with torch.no_grad():
        direction = F.normalize(D[2].weight)
        orthogonal = draw(2, 1, 6)
        orthogonal = F.normalize(orthogonal - (orthogonal * direction).sum() * direction)
        angle = math.radians(2.5)
        D[2].weight.copy_(math.cos(angle) * direction + math.sin(angle) * orthogonal)
    assert diagnostics.measure()["drift_deg"] == pytest.approx(2.5, rel=1e-4)


def test_collision_tells_features_that_lose_the_input() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = san.SANLinear(3, 1)

        def forward(self, x: Tensor) -> san.SANLogits:
            return self.head(x.abs())

    points = draw(0, 8, 3)
    folded, kept = SANDiagnostics(Folded()), SANDiagnostics(make_mlp())
    for diagnostics in (folded, kept):
        record_both(diagnostics, (torch.cat([points, -points]),), (points,))
    assert folded.measure()["collision"] < 1e-6
    assert kept.measure()["collision"] > 0.05


def test_training_goes_on_as_without() -> None:
    def step(is_measured: bool) -> tuple[list[Tensor], Tensor]:
        D = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), san.SANLinear(6, 1))
        torch.manual_seed(1)
        D[0].reset_parameters()
        D[3].weight.data.copy_(F.normalize(draw(5, 1, 6)))
        D[3].scale.data.fill_(1)
        if is_measured:
            diagnostics = SANDiagnostics(D, OBJECTIVES["saturating"])
            logits = record_both(diagnostics, (draw(0, 16, 3),), (draw(1, 16, 3),))
            assert diagnostics.measure()
        else:
            fake = D(draw(1, 16, 3))
            logits = D(draw(0, 16, 3)), fake
        san.san_discriminator_loss(OBJECTIVES["saturating"], *logits).backward()
        assert not any(m._forward_hooks for m in D.modules())
        return [*(p.grad for p in D.parameters()), *D.buffers()], torch.rand(3)

    with_it, without = step(True), step(False)
    for actual, expected in zip(with_it[0], without[0], strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(with_it[1], without[1])


def test_half_precision_and_checkpointed_features() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.D = make_mlp()

        def forward(self, x: Tensor) -> san.SANLogits:
            h = torch.utils.checkpoint.checkpoint(self.D[:2], x, use_reentrant=False)
            return self.D[2](h)

    D = Checkpointed()
    real, fake = draw(0, 64, 3) + 1, draw(1, 64, 3)
    exact, coarse = SANDiagnostics(D), SANDiagnostics(D)
    record_both(exact, (real,), (fake,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = record_both(coarse, (real,), (fake,))
    assert coarse.measure() == pytest.approx(exact.measure(), abs=0.05)
    san.hinge_discriminator_loss(*logits).backward()
    assert D.D[0].weight.grad is not None


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call san\.sanify"):
        SANDiagnostics(nn.Linear(2, 1))
    D = make_mlp()
    diagnostics = SANDiagnostics(D)
    with pytest.raises(ValueError, match="'real' or 'fake'"), diagnostics.record("reals"):
        pass
    with pytest.raises(ValueError, match="heard nothing"), diagnostics.record("real"):
        pass
    with pytest.raises(ValueError, match="without gradients"), diagnostics.record("real"), torch.no_grad():
        D(draw(0, 4, 3))
    with diagnostics.record("real"):
        D(draw(0, 4, 3))
    with pytest.raises(ValueError, match="fake samples as well"):
        diagnostics.measure()
    with pytest.raises(KeyError), diagnostics.record("real"):
        raise KeyError  # what goes wrong inside comes out as it is, and leaves no hook
    assert not any(m._forward_hooks for m in D.modules())


def test_fakes_of_a_paired_objective_wait_for_the_reals() -> None:
    D = make_mlp()
    diagnostics = SANDiagnostics(D, PAIRED_OBJECTIVES["relativistic"])
    with diagnostics.record("fake"):
        D(draw(1, 16, 3))
    with pytest.raises(ValueError, match="real samples as well"):
        diagnostics.measure()
    with diagnostics.record("real"):
        D(draw(0, 16, 3))
    first = diagnostics.measure()
    with diagnostics.record("real"):
        D(draw(0, 16, 3))
    with diagnostics.record("fake"):
        D(draw(1, 16, 3))
    assert diagnostics.measure() == pytest.approx(first)


def test_fakes_of_a_paired_objective_meet_the_reals_of_their_microbatch() -> None:
    """Whichever side comes first."""
    D = make_mlp()
    diagnostics = SANDiagnostics(D, PAIRED_OBJECTIVES["relativistic"])
    real, fake = [draw(i, 16, 3) + i for i in range(2)], [draw(2 + i, 16, 3) for i in range(2)]
    results = []
    for order in (("fake", "real"), ("real", "fake")):
        for i in range(2):
            for side in order:
                with diagnostics.record(side):
                    D({"real": real, "fake": fake}[side][i])
        results.append(diagnostics.measure())
    assert results[0] == pytest.approx(results[1])
    h = [D[:2](x).detach() for x in (*real, *fake)]
    logits = [D[2](x).fun.detach() for x in h]
    objective = PAIRED_OBJECTIVES["relativistic"]
    weighted = [
        (x * san.direction_weights(objective, f, logits[i % 2])).mean(0)
        for i, (x, f) in enumerate(zip(h, logits, strict=True))
    ]
    length = ((weighted[0] + weighted[1] - weighted[2] - weighted[3]) / 2).norm().item()
    assert results[0]["mean_difference"] == pytest.approx(length, rel=1e-4)


def test_normalised_weights_are_those_of_the_loss() -> None:
    """The gradient of the loss at the direction is the difference that the cosine is measured to."""
    D, objective = make_mlp(), OBJECTIVES["nonsaturating"]
    diagnostics = SANDiagnostics(D, objective, normalize_weights=True)
    real, fake = draw(0, 20, 3) + 1, draw(1, 10, 3)
    real_logits, fake_logits = record_both(diagnostics, (real,), (fake,))
    san.san_discriminator_loss(objective, real_logits, fake_logits, normalize_weights=True).backward()
    direction = F.normalize(D[2].weight.detach().flatten(), dim=0)
    weighted = []
    for x, logits in ((real, real_logits), (fake, fake_logits)):
        weights = san.direction_weights(objective, logits.fun.detach())
        weighted.append((D[:2](x).detach() * weights).mean(0) / weights.mean())
    expected = direction_cosine(direction, weighted[0] - weighted[1])
    assert diagnostics.measure()["cosine"] == pytest.approx(expected, abs=1e-5)
