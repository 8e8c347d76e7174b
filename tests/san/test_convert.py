# SPDX-License-Identifier: MIT
"""san.sanify: which layers it takes for the last ones, what it reports, and that a refusal changes nothing.

python -m pytest tests/san/test_convert.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import san


def make_trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.LeakyReLU(0.2))


class HeadsD(nn.Module):
    """Two heads on one trunk, the first followed by a second scale."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 3)  # registered before the trunk: the order says nothing
        self.trunk = make_trunk()
        self.single = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"wide": self.wide(h).mean(1), "features": h, "single": self.single(h)}


class ProjectionD(nn.Module):
    def __init__(self, is_edited: bool) -> None:
        super().__init__()
        self.trunk, self.linear, self.embed = make_trunk(), nn.Linear(8, 1), nn.Embedding(3, 8)
        self.is_edited = is_edited

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.trunk(x)
        if self.is_edited:
            return self.linear(h) + san.project(h, self.embed(y)).unsqueeze(1)
        return self.linear(h) + (self.embed(y) * h).sum(1, keepdim=True)


class GainD(nn.Module):
    """A trained factor after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.gain = make_trunk(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).sum(1) * self.gain


class ListD(nn.Module):
    """Reaches its head through a list that torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = make_trunk(), nn.Linear(8, 1)
        self.steps = [self.trunk, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class DropsD(nn.Module):
    """Returns a plain tensor whatever the head gives."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = make_trunk(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.trunk(x))
        return logits.fun if isinstance(logits, san.SANLogits) else logits


class RandomD(nn.Module):
    """Draws torch's random numbers, and counts its calls in a buffer that is replaced, not written to."""

    def __init__(self) -> None:
        super().__init__()
        self.head = spectral_norm(nn.Linear(4, 1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(x + torch.randn_like(x))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


def test_the_last_layer_is_found_with_and_without_an_example() -> None:
    plain = nn.Sequential(make_trunk(), nn.Linear(8, 1))
    for example in (None, X, (X,), [X], {"input": X}):
        D = copy.deepcopy(plain)
        report = san.sanify(D, example=example)
        assert [layer.name for layer in report.replaced] == ["1"]
        assert isinstance(D[1], san.SANLinear)
        torch.testing.assert_close(D(X).fun, plain(X))


def test_all_heads_are_found_and_nothing_else() -> None:
    D, plain = HeadsD(), None
    plain = copy.deepcopy(D)
    report = san.sanify(D, example=X)
    assert [layer.name for layer in report.replaced] == ["wide", "single"]
    for name, value in plain(X).items():
        actual = D(X)[name]
        torch.testing.assert_close(actual.fun if name != "features" else actual, value)
    guessed = HeadsD()
    assert [layer.name for layer in san.sanify(guessed).replaced] == ["single"]
    named = HeadsD()
    assert [layer.name for layer in san.sanify(named, names="wide").replaced] == ["wide"]
    assert isinstance(named.single, nn.Linear)


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    D = nn.ModuleDict({"a": nn.Linear(4, 1)})
    D["b"] = D["a"]
    san.sanify(D, names=["a"])
    assert D["a"] is D["b"]
    assert isinstance(D["b"], san.SANLinear)


def test_the_report_is_a_table() -> None:
    D = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 4, padding=1))
    lines = str(san.sanify(D)).splitlines()
    assert lines[0].split() == ["layer", "was", "now", "directions", "difference"]
    assert " ".join(lines[1].split()[:-1]) == "1 Conv2d with bias ConstantPad2d + SANConv2d 1 x 128"
    assert float(lines[1].split()[-1]) < 1e-5


def test_projection_head_edited_and_named() -> None:
    plain, D = ProjectionD(False), ProjectionD(True)
    D.load_state_dict(plain.state_dict())
    report = san.sanify(D, names=["linear", "embed"], example=(X, Y))
    assert [(r.name, r.num_directions, r.direction_dim) for r in report.replaced] == [
        ("linear", 1, 8),
        ("embed", 3, 8),
    ]
    torch.testing.assert_close(D(X, Y).fun, plain(X, Y))


def test_random_numbers_and_buffers_of_the_runs_leave_no_trace() -> None:
    D = RandomD()
    before, random_state = D.calls.clone(), torch.get_rng_state()
    D(X)
    torch.set_rng_state(random_state)
    san.sanify(D, example=X)
    assert torch.equal(D.calls, before + 1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert copy.deepcopy(D).head.weight.shape == (1, 4)


def make_shared() -> nn.Module:
    D = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(4, 1))
    D[2].weight = D[0].weight
    return D


REFUSED = {
    "no_single": (lambda: nn.Sequential(nn.Linear(4, 2)), {}, "no layer has one output unit.*example="),
    "embedding": (lambda: ProjectionD(True), {}, r"embedding may belong.*candidates: linear, embed.*names=\["),
    "unknown": (HeadsD, {"names": ["singel"]}, "no module 'singel'; there are single"),
    "empty": (HeadsD, {"names": []}, "names is empty"),
    "whole": (lambda: nn.Linear(4, 1), {}, "san.convert_layer"),
    "second_fails": (HeadsD, {"names": ["single", "trunk"]}, r"'trunk' \(Sequential\).*no SAN twin"),
    "shared": (make_shared, {"names": "2"}, "shares a parameter with '0.weight'"),
    "gain": (GainD, {"example": X}, "parameter 'gain' acts on the output"),
    "no_parameters": (nn.ReLU, {"example": X}, "no layer with parameters"),
    "product": (
        lambda: ProjectionD(False), {"names": ["linear", "embed"], "example": (X, Y)}, r"san\.project\(features",
    ),
    "edited_unnamed": (lambda: ProjectionD(True), {"example": (X, Y)}, r"SANLogits\.plain.*names=\["),
    "list": (ListD, {"example": X}, "another way than as submodules|does not reach"),
    "drops": (DropsD, {"example": X}, "direction of 'head' does not reach"),
    "parallel": (lambda: nn.DataParallel(HeadsD()), {}, "before wrapping"),
    "compiled": (lambda: torch.compile(HeadsD()), {}, "before wrapping or compiling"),
    "twice": (lambda: nn.Sequential(san.SANLinear(4, 1)), {"names": "0"}, "SANLinear already"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(name: str) -> None:
    make, arguments, words = REFUSED[name]
    D = make()
    modules = list(D.modules())
    before = {k: v.clone() for k, v in D.state_dict().items()}
    with pytest.raises(san.SanifyError, match=words):
        san.sanify(D, **arguments)
    assert list(D.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in D.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in D.parameters())


def test_an_unedited_product_is_refused_in_training_with_the_remedy() -> None:
    D = ProjectionD(False)
    san.sanify(D, names=["linear", "embed"])
    with pytest.raises(TypeError, match=r"san\.project\(features, class_vectors\)"):
        D(X, Y)


def test_keep_normalized_follows_the_optimizer() -> None:
    D = nn.Sequential(make_trunk(), nn.Linear(8, 2, bias=False))
    early = torch.optim.SGD(D.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"no SAN layer in D: call san\.sanify"):
        san.keep_normalized(early, D)
    san.sanify(D, names="1")
    with pytest.raises(ValueError, match="does not hold the direction of 1: build it after"):
        san.keep_normalized(early, D)
    optimizer = torch.optim.SGD(D.parameters(), lr=0.5)
    handle = san.keep_normalized(optimizer, D)

    def norms_after_a_step() -> Tensor:
        optimizer.zero_grad()
        D(X).dir.square().sum().backward()
        optimizer.step()
        return D[1].weight.detach().norm(dim=1)

    torch.testing.assert_close(norms_after_a_step(), torch.ones(2))
    handle.remove()
    assert (norms_after_a_step() - 1).abs().max() > 1e-3  # a tangent step leaves the sphere
