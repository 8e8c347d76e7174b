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


class TwoHeads(nn.Module):
    """A patch head and a class-conditional head on one feature map; logits are scaled after the layers."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(2, 5, 3), nn.LeakyReLU(0.2, inplace=True))
        self.patch = san.SANConv2d(5, 1, 3, stride=2, padding=1, input_bias=True)
        self.embed = san.SANEmbedding(num_classes, 5)
        nn.init.normal_(self.patch.bias)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, san.SANLogits]:
        h = self.trunk(x)
        projected = san.project(h, self.embed(labels)).flatten(1) / math.sqrt(5)
        return {"patch": 3 * self.patch(h).flatten(1), "class": projected}


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


def test_outputs_have_their_own_directions() -> None:
    D = make_mlp(out_features=3)
    diagnostics = SANDiagnostics(D)
    real, fake = draw(0, 20, 3) + 1, draw(1, 10, 3)
    record_both(diagnostics, (real,), (fake,))
    values = diagnostics.measure()
    real_h, fake_h = D[:2](real).detach(), D[:2](fake).detach()
    difference = conditions.mean_difference(real_h, fake_h)
    directions = F.normalize(D[2].weight.detach(), dim=1)
    orders = [conditions.compare_slices(real_h @ w, fake_h @ w) for w in directions]
    assert values["cosine"] == pytest.approx(
        conditions.direction_cosine(directions, difference).mean().item(), abs=1e-5
    )
    assert values["in_order"] == pytest.approx(sum(o.in_order.item() for o in orders) / 3, abs=1e-5)


@pytest.mark.parametrize("name", ["hinge", "nonsaturating"])
def test_patches_of_a_convolution_are_samples(name: str) -> None:
    D, objective = TwoHeads(), OBJECTIVES[name]
    diagnostics = SANDiagnostics(D, objective)
    labels = torch.arange(12) % 4
    real, fake = draw(0, 12, 2, 9, 9) + 0.5, draw(1, 12, 2, 9, 9)
    real_logits, fake_logits = record_both(diagnostics, (real, labels), (fake, labels))
    values = diagnostics.measure()
    patches, weights = [], []
    for x, logits in ((real, real_logits), (fake, fake_logits)):
        h = D.trunk(x).detach() + D.patch.bias.detach().view(-1, 1, 1)
        patches.append(F.unfold(h, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1))  # (N * K, features)
        weights.append(san.direction_weights(objective, logits["patch"].fun).flatten())
    difference = conditions.mean_difference(*patches, *weights)
    direction = F.normalize(D.patch.weight.detach().flatten(), dim=0)
    order = conditions.compare_slices(*(p @ direction for p in patches))
    assert values["cosine/patch"] == pytest.approx(direction_cosine(direction, difference), abs=1e-5)
    length = 3 * difference.norm().item()  # the logits enter D's output with a factor of 3
    assert values["mean_difference/patch"] == pytest.approx(length, rel=1e-4)
    assert values["in_order/patch"] == pytest.approx(order.in_order.item(), abs=1e-5)
    assert values["slice_distance/patch"] == pytest.approx(order.wasserstein.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["hinge", "saturating"])
def test_classes_have_their_own_directions(name: str) -> None:
    """Means over the classes in both batches; class 3 is missing from the fakes, class 2 from both."""
    D, objective = TwoHeads(), OBJECTIVES[name]
    diagnostics = SANDiagnostics(D, objective)
    real_labels, fake_labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3]), torch.tensor([1, 0, 0, 1, 1, 0])
    real, fake = draw(0, 8, 2, 9, 9) + 0.5, draw(1, 6, 2, 9, 9)
    real_logits, fake_logits = record_both(diagnostics, (real, real_labels), (fake, fake_labels))
    values = diagnostics.measure()
    cosines, gaps = [], []
    for label in (0, 1):
        sums, slices = [], []
        direction = F.normalize(D.embed.weight[label].detach(), dim=0)
        for x, labels, logits in ((real, real_labels, real_logits), (fake, fake_labels, fake_logits)):
            rows = labels == label
            h = D.trunk(x)[rows].detach().flatten(2).transpose(1, 2)  # (n, positions, C)
            weights = san.direction_weights(objective, logits["class"].fun[rows])
            sums.append((h * weights.unsqueeze(2)).sum(1).mean(0))
            slices.append((h.sum(1) @ direction) / math.sqrt(5))
        cosines.append(direction_cosine(direction, sums[0] - sums[1]))
        gaps.append(conditions.compare_slices(*slices).gap.item())
    assert values["cosine/embed"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert values["separability_gap/embed"] == pytest.approx(sum(gaps) / 2, abs=1e-5)
    assert values["scale/embed"] == pytest.approx(D.embed.scale[:2].mean().item(), rel=1e-5)


def test_heads_are_averaged() -> None:
    diagnostics = SANDiagnostics(TwoHeads())
    labels = torch.arange(8) % 4
    record_both(diagnostics, (draw(0, 8, 2, 9, 9), labels), (draw(1, 8, 2, 9, 9), labels))
    values = diagnostics.measure()
    assert list(values) == diagnostics.names
    for measure in ("cosine", "in_order", "collision", "scale"):
        mean = (values[f"{measure}/patch"] + values[f"{measure}/embed"]) / 2
        assert values[measure] == pytest.approx(mean)


def test_microbatches_add_up() -> None:
    D = TwoHeads()
    diagnostics = SANDiagnostics(D, OBJECTIVES["nonsaturating"])
    labels = torch.arange(8) % 2
    real, fake = draw(0, 8, 2, 9, 9) + 0.3, draw(1, 8, 2, 9, 9)
    record_both(diagnostics, (real, labels), (fake, labels))
    expected = diagnostics.measure()
    for part in (slice(0, 4), slice(4, 8)):
        record_both(diagnostics, (real[part], labels[part]), (fake[part], labels[part]))
    values = diagnostics.measure()
    expected = {
        key: value for key, value in expected.items() if "collision" not in key
    }  # pairs within a batch
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-4)


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


def test_a_frozen_head_is_left_out() -> None:
    D = TwoHeads()
    D.patch.weight.requires_grad_(False)
    diagnostics = SANDiagnostics(D)
    labels = torch.zeros(4, dtype=torch.long)
    record_both(diagnostics, (draw(0, 4, 2, 9, 9), labels), (draw(1, 4, 2, 9, 9), labels))
    values = diagnostics.measure()
    assert "cosine/embed" in values
    assert "cosine/patch" not in values


def test_what_has_no_evidence_is_left_out() -> None:
    """No class on both sides, and one real sample only: no cosine for the embedding, no halves, no pairs."""
    D = TwoHeads()
    diagnostics = SANDiagnostics(D)
    one = torch.zeros(1, dtype=torch.long)
    record_both(diagnostics, (draw(0, 1, 2, 9, 9), one), (draw(1, 1, 2, 9, 9), one + 1))
    values = diagnostics.measure()
    assert set(diagnostics.names) > set(values)
    assert [name for name in values if name.endswith("/embed")] == []
    assert "cosine/patch" in values
    assert "agreement" not in values
    assert "collision" not in values


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
