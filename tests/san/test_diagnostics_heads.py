# SPDX-License-Identifier: MIT
"""`SANDiagnostics` on heads of all kinds: convolutions, classes, several outputs and several heads, by hand.

python -m pytest tests/san/test_diagnostics_heads.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san import OBJECTIVES, conditions
from san.diagnostics import SANDiagnostics


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record_both(diagnostics: SANDiagnostics, real: tuple, fake: tuple) -> tuple:
    with diagnostics.record("fake"):
        fake_logits = diagnostics.D(*fake)
    with diagnostics.record("real"):
        real_logits = diagnostics.D(*real)
    return real_logits, fake_logits


def direction_cosine(direction: Tensor, difference: Tensor) -> float:
    return F.cosine_similarity(direction.flatten(), difference.flatten(), dim=0).item()


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


class ClassLogits(nn.Module):
    """One output per class, of which a sample's own is kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = san.SANLinear(3, 4)

    def judge(self, x: Tensor, labels: Tensor) -> san.SANLogits:
        return self.last(x).gather(1, labels.unsqueeze(1))

    def forward(self, x: Tensor, labels: Tensor) -> san.SANLogits:
        return self.judge(x, labels)


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


def test_dropped_logits_are_no_evidence() -> None:
    D = ClassLogits()
    diagnostics = SANDiagnostics(D)
    real_labels, fake_labels = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 2, 2])
    real, fake = draw(0, 6, 3) + 1, draw(1, 6, 3)
    record_both(diagnostics, (real, real_labels), (fake, fake_labels))
    values = diagnostics.measure()
    cosines, orders = [], []
    for label in (0, 1):  # on both sides
        direction = F.normalize(D.last.weight[label].detach(), dim=0)
        own = real[real_labels == label], fake[fake_labels == label]
        cosines.append(direction_cosine(direction, conditions.mean_difference(*own)))
        orders.append(conditions.compare_slices(*(h @ direction for h in own)).in_order.item())
    assert values["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert values["in_order"] == pytest.approx(sum(orders) / 2, abs=1e-5)


def test_runs_by_another_method_are_noted_by_the_caller() -> None:
    D = ClassLogits()
    diagnostics = SANDiagnostics(D)
    labels = torch.arange(8) % 4
    sides = {"real": draw(0, 8, 3), "fake": draw(1, 8, 3)}
    for side, x in sides.items():
        with diagnostics.record(side):
            D(x, labels)
    expected = diagnostics.measure()
    for side, x in sides.items():
        with diagnostics.record(side) as recording:
            recording.note_run(x, [D.judge(x, labels)])
    assert diagnostics.measure() == pytest.approx(expected)


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


class Negated(nn.Module):
    """Logits with the other sign."""

    def __init__(self, D: nn.Module) -> None:
        super().__init__()
        self.D = D

    def forward(self, *inputs: Tensor) -> san.SANLogits:
        return -self.D(*inputs)


class ClassHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = san.SANEmbedding(2, 3)

    def forward(self, x: Tensor, labels: Tensor) -> san.SANLogits:
        return san.project(x, self.embed(labels))


@pytest.mark.parametrize("name", ["hinge", "nonsaturating"])
@pytest.mark.parametrize("is_conditional", [False, True])
def test_measures_are_those_of_the_function_whatever_signs_it_is_written_with(
    name: str, is_conditional: bool
) -> None:
    """s <w, h>, (-s) <-w, h> and -(s <-w, h>) are one discriminator: the same direction, for the same samples."""
    labels = (torch.arange(16) % 2,) if is_conditional else ()
    real, fake = (draw(0, 16, 3) + 1, *labels), (draw(1, 16, 3), *labels)

    def measure(negates_scale: bool, negates_logits: bool) -> dict[str, float]:
        torch.manual_seed(0)
        D = ClassHead() if is_conditional else nn.Sequential(san.SANLinear(3, 1))
        layer = D.embed if is_conditional else D[0]
        with torch.no_grad():
            layer.weight.mul_(-1 if negates_scale != negates_logits else 1)
            layer.scale.mul_(-1 if negates_scale else 1)
        diagnostics = SANDiagnostics(Negated(D) if negates_logits else D, OBJECTIVES[name])
        record_both(diagnostics, real, fake)
        values = diagnostics.measure()
        return {key: value for key, value in values.items() if not key.startswith("scale") and "/" not in key}

    plain = measure(False, False)
    assert abs(plain["cosine"]) > 0.1
    for signs in ((True, False), (False, True), (True, True)):
        assert measure(*signs) == pytest.approx(plain, abs=1e-5)
