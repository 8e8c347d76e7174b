# SPDX-License-Identifier: MIT
"""A sanified discriminator under what torch offers: autocast, compile, DDP, checkpointing, torch.func, copies.

This file is also the program that the two processes of the DDP test run.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import san
from san import OBJECTIVES

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2


def make_discriminator() -> nn.Module:
    """Two sanified heads on one trunk, a padded convolution with a bias and a linear layer."""
    torch.manual_seed(0)
    D = TwoHeads()
    san.sanify(D, names=["conv_head", "linear_head"])
    return D


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Softplus())
        self.conv_head, self.linear_head = nn.Conv2d(8, 1, 3, padding=1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> san.SANLogits:
        h = self.trunk(x)
        return torch.cat([self.conv_head(h).flatten(1), self.linear_head(h.mean((2, 3)))], dim=1)


def make_images(num_samples: int = 4) -> Tensor:
    return torch.randn(num_samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def d_loss(D: nn.Module, real: Tensor, fake: Tensor, name: str = "nonsaturating") -> Tensor:
    return san.san_discriminator_loss(OBJECTIVES[name], D(real), D(fake))


def grads_of(D: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    D.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in D.named_parameters()}


def assert_same_grads(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    D, x = make_discriminator(), make_images()
    expected = D(x).fun
    with torch.autocast("cpu", dtype=dtype):
        logits = D(x)
        loss = d_loss(D, x, x.flip(0) / 2)
    assert torch.equal(logits.fun, logits.dir)
    torch.testing.assert_close(logits.fun.float(), expected, rtol=5e-2, atol=5e-2)
    grads = grads_of(D, loss)
    assert all(g.isfinite().all() and g.any() and g.dtype == torch.float32 for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_normalised_in_float32(dtype: torch.dtype) -> None:
    D, x = make_discriminator().to(dtype), make_images().to(dtype)
    optimizer = torch.optim.SGD(D.parameters(), lr=0.1)
    san.keep_normalized(optimizer, D)
    for _ in range(3):
        optimizer.zero_grad()
        loss = d_loss(D, x, x / 2)
        loss.backward()
        optimizer.step()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for layer in (D.linear_head, D.conv_head[1]):
        assert layer.weight.dtype == dtype
        assert layer.weight.float().norm().item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str) -> None:
    D, real, fake = make_discriminator(), make_images(), make_images().flip(0) / 2
    expected_logits, expected = D(real), grads_of(D, d_loss(D, real, fake))
    compiled = torch.compile(D, backend=backend, fullgraph=True)
    logits = compiled(real)
    assert isinstance(logits, san.SANLogits)
    torch.testing.assert_close(logits.fun, expected_logits.fun)
    torch.testing.assert_close(logits.dir, expected_logits.dir)
    assert_same_grads(grads_of(D, d_loss(compiled, real, fake)), expected)
    step = torch.compile(d_loss, backend=backend, fullgraph=True)
    assert_same_grads(grads_of(D, step(D, real, fake)), expected)


def test_compile_leaves_the_direction_frozen_where_it_is() -> None:
    D, x = make_discriminator().requires_grad_(False), make_images().requires_grad_()
    compiled = torch.compile(D, backend="aot_eager", fullgraph=True)
    logits = compiled(x)
    (expected,) = torch.autograd.grad(D(x).fun.sum(), x)
    (actual,) = torch.autograd.grad(logits.fun.sum(), x)
    torch.testing.assert_close(actual, expected)
    assert not logits.dir.requires_grad


def test_gradient_checkpointing() -> None:
    D, x = make_discriminator(), make_images()

    def loss_of(logits: san.SANLogits) -> Tensor:
        return san.san_fake_loss(OBJECTIVES["saturating"], logits)

    expected = grads_of(D, loss_of(D(x)))
    logits = checkpoint(D, x, use_reentrant=False)
    assert isinstance(logits, san.SANLogits)
    assert_same_grads(grads_of(D, loss_of(logits)), expected)


@pytest.mark.parametrize("power", [1, 2])
def test_gradient_penalties_train_features_and_scale_but_no_direction(power: int) -> None:
    """R1 (power 1) and WGAN-GP (power 2): against finite differences in one parameter each."""
    D = make_discriminator().double()
    x = make_images().double().requires_grad_()

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(D(x).fun.sum(), x, create_graph=True)
        size = gradient.square().sum((1, 2, 3))
        return size.mean() if power == 1 else (size.sqrt() - 1).square().mean()

    D.zero_grad(set_to_none=True)
    penalty().backward()
    assert D.linear_head.weight.grad is None
    assert D.conv_head[1].weight.grad is None
    for parameter in (D.linear_head.scale, D.trunk[0].weight):
        index, step = (0,) * parameter.ndim, 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(penalty().item())
            with torch.no_grad():
                parameter[index] -= sign * step
        assert parameter.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_functional_call_and_per_sample_gradients() -> None:
    D, x = make_discriminator(), make_images()
    parameters = {name: p.detach() for name, p in D.named_parameters()}
    swapped = {name: p + 0.1 for name, p in parameters.items()}
    logits = functional_call(D, swapped, (x,))
    twin = copy.deepcopy(D)
    twin.load_state_dict(swapped, strict=False)
    torch.testing.assert_close(logits.fun, twin(x).fun)

    def loss_of(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(D, parameters, (sample[None],))
        return san.san_real_loss(OBJECTIVES["soft_least_squares"], logits)

    per_sample = vmap(grad(loss_of), in_dims=(None, 0))(parameters, x)
    mean = {name: value.mean(0) for name, value in per_sample.items()}
    assert_same_grads(mean, grads_of(D, san.san_real_loss(OBJECTIVES["soft_least_squares"], D(x))))


def test_a_vmapped_ensemble_keeps_the_gradient_of_its_directions() -> None:
    """Inside vmap a tensor does not tell that it is differentiated; the direction must not be taken for frozen."""
    members, x = [make_discriminator() for _ in range(2)], make_images()
    with torch.no_grad():
        for parameter in members[1].parameters():
            parameter.add_(0.1)
    stacked, _ = stack_module_state(members)
    stacked = {name: p.detach().requires_grad_() for name, p in stacked.items()}

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return san.san_fake_loss(OBJECTIVES["hinge"], functional_call(members[0], parameters, (x,)))

    vmap(loss_of)(stacked).sum().backward()
    for index, member in enumerate(members):
        expected = grads_of(member, san.san_fake_loss(OBJECTIVES["hinge"], member(x)))
        assert_same_grads({name: p.grad[index] for name, p in stacked.items()}, expected)


def test_vmapped_label_vectors_keep_the_gradient_of_their_directions() -> None:
    h, w = torch.randn(3, 2, 5), torch.randn(3, 2, 5, requires_grad=True)
    vmap(lambda h, w: san.project(h, w).dir.sum())(h, w).sum().backward()
    assert w.grad.any()


def test_deepcopy_and_moving_average() -> None:
    """An average of two SANs is a SAN: its directions are normalised in the forward pass."""
    D, x = make_discriminator(), make_images()
    D_ema = copy.deepcopy(D).requires_grad_(False)
    assert torch.equal(D_ema(x).fun, D(x).fun)
    assert all(a is not b for a, b in zip(D_ema.parameters(), D.parameters(), strict=True))
    optimizer = torch.optim.Adam(D.parameters(), lr=0.05)
    san.keep_normalized(optimizer, D)
    d_loss(D, x, x / 2).backward()
    optimizer.step()
    for averaged, current in zip(D_ema.parameters(), D.parameters(), strict=True):
        averaged.lerp_(current, 0.5)
    assert D_ema.linear_head.weight.norm() < 1 - 1e-4
    assert D_ema(x).fun.isfinite().all()
    assert san.normalize_directions_(D_ema) == 2
    average = torch.optim.swa_utils.AveragedModel(D)
    average.update_parameters(D)
    torch.testing.assert_close(average(x).fun, D(x).fun)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    D, fresh, x = make_discriminator(), TwoHeads(), make_images()
    optimizer = torch.optim.Adam(D.parameters(), lr=0.05)
    d_loss(D, x, x / 2).backward()
    optimizer.step()
    san.normalize_directions_(D)
    torch.save({"D": D.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    run = torch.load(tmp_path / "run.pt", weights_only=True)
    san.sanify(fresh, names=["conv_head", "linear_head"])
    fresh.load_state_dict(run["D"])
    assert torch.equal(fresh(x).fun, D(x).fun)
    torch.optim.Adam(fresh.parameters()).load_state_dict(run["optimizer"])
    assert {"linear_head.weight", "linear_head.scale", "linear_head.bias", "conv_head.1.weight"} <= set(
        run["D"]
    )


def run_process(process: int) -> dict[str, Tensor]:
    """Three steps of a DistributedDataParallel discriminator on this process's share of the batch."""
    D = nn.parallel.DistributedDataParallel(make_discriminator())
    share = slice(process, None, NUM_PROCESSES)
    return train(D, make_images()[share], (make_images().flip(0) / 2)[share])


def train(D: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(D.parameters(), lr=2.0)
    san.keep_normalized(optimizer, D)
    for _ in range(3):
        optimizer.zero_grad()
        real_logits, fake_logits = D(torch.cat([real, fake])).chunk(2)
        san.hinge_discriminator_loss(real_logits, fake_logits).backward()
        optimizer.step()
    return {name.removeprefix("module."): value for name, value in D.state_dict().items()}


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes on halves of a batch end where one on the whole batch does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(r), str(tmp_path)], env=environment)
        for r in range(NUM_PROCESSES)
    ]
    expected = train(make_discriminator(), make_images(), make_images().flip(0) / 2)
    assert [process.wait(timeout=300) for process in processes] == [0] * NUM_PROCESSES
    assert (expected["linear_head.weight"] - make_discriminator().linear_head.weight).abs().max() > 1e-2
    for r in range(NUM_PROCESSES):
        assert_same_grads(torch.load(tmp_path / f"{r}.pt"), expected)


if __name__ == "__main__":
    process_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=process_rank, world_size=NUM_PROCESSES)
    torch.save(run_process(process_rank), folder / f"{process_rank}.pt")
    dist.destroy_process_group()
