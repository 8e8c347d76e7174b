# SPDX-License-Identifier: MIT
"""Gradients that are not finite: found, explained, counted, and followed by what was asked for, on all ranks alike."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_utils.distributed import rank
from torch_utils.errors import RunError
from torch_utils.stats import StatsCollector
from training.health import (
    MAX_ROLLBACKS,
    GradientNorms,
    Health,
    NonFiniteError,
    RollbackRequest,
    reset_faulty_statistics_,
)
from training.train_step import StepContext, apply_gradients

NAN, INF = float("nan"), float("inf")


def make_network(*gradients: float) -> nn.Sequential:
    """A layer per gradient, every element of which has that value."""
    network = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in gradients))
    for parameter, value in zip(network.parameters(), gradients, strict=True):
        parameter.grad = torch.full_like(parameter, value)
    return network


def run_step(health: Health, *gradients: float, step="G", stats=None, nimg=3200, iteration=100) -> list[str]:
    """Apply gradients, enforce what follows; returns the warnings."""
    warnings: list[str] = []
    context = StepContext(
        config=None,
        loss=None,
        stats=stats or StatsCollector(),
        cur_nimg=nimg,
        cur_iteration=iteration,
        warn=warnings.append,
        health=health,
    )
    network = make_network(*gradients)
    before = [p.detach().clone() for p in network.parameters()]
    apply_gradients(network, torch.optim.SGD(network.parameters(), lr=1.0), context, step)
    is_skipped = all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    assert is_skipped == bool(warnings)
    health.enforce()
    return warnings


# What is said.


def test_a_fault_is_explained_in_one_line():
    stats = StatsCollector()
    stats.report("Loss/scores/fake", torch.tensor([1.0, NAN]))
    stats.report("Loss/signs/fake", torch.tensor([1.0, NAN]))
    stats.report("Loss/G/loss", NAN)
    stats.report("Loss/G/guidance_loss", 2.0)
    (warning,) = run_step(Health(), 3.0, NAN, 0.5, INF, stats=stats, nimg=12352, iteration=386)
    assert warning == (
        "Warning: G got a gradient that is not finite at 12.352 kimg (iteration 386): in 2 of 4 parameters "
        "(first 1.weight, last 3.weight); the largest finite norm is 6, of 0.weight; not finite already: "
        "D's logits of generated images, G's loss. This step was skipped (1 in a row, 1 in all)."
    )


def test_a_fault_of_the_backward_pass_is_told_from_one_of_the_loss():
    stats = StatsCollector()
    stats.report("Loss/D/loss", 1.0)
    (warning,) = run_step(Health(), NAN, step="D", stats=stats)
    assert "D got a gradient" in warning and "(first 0.weight); none is finite;" in warning
    assert "all parts of the loss were finite, so it arose in the backward pass" in warning


def test_faults_of_earlier_steps_are_not_blamed():
    stats, health = StatsCollector(), Health()
    stats.report("Loss/scores/real", NAN)
    run_step(health, NAN, step="D", stats=stats)
    stats.report("Loss/G/loss", 1.0)
    run_step(health, 1.0, stats=stats)
    stats.report("Loss/D/penalty", INF)
    (warning,) = run_step(health, NAN, step="D", stats=stats)
    assert "not finite already: gradient penalty." in warning


def test_a_gradient_whose_square_overflows_is_not_finite_either():
    """Adam's second moment would be infinite for good, and the parameter never move again."""
    assert run_step(Health(), 1e18) == []
    assert len(run_step(Health(), 1e20)) == 1


def test_statistics_count_steps_and_measure_gradients():
    stats, health = StatsCollector(), Health()
    for gradient in (3.0, NAN, 3.0, 3.0):
        run_step(health, gradient, 4.0, stats=stats)
    run_step(health, 1.0, step="D", stats=stats)
    health.report(stats)
    flushed = stats.flush()
    assert flushed["Health/nonfinite_G"] == pytest.approx({"num": 4, "mean": 0.25, "std": math.sqrt(3) / 4})
    assert flushed["Health/gradient_norm_G"]["num"] == 3  # a norm that is not finite is none
    assert flushed["Health/gradient_norm_G"]["mean"] == pytest.approx(10)  # (4 x 3^2 + 4 x 4^2)^(1/2)
    assert flushed["Health/nonfinite_D"]["mean"] == 0
    assert flushed["Health/nonfinite_total"]["mean"] == 1 and flushed["Health/rollbacks"]["mean"] == 0


def test_a_good_step_waits_for_the_device_once(monkeypatch):
    """As before there was a report: each wait costs the time in which the device could be given work."""
    waits = []
    for name in ("item", "__bool__", "tolist", "cpu", "__float__", "numpy"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _plain=plain, _name=name: waits.append(_name) or _plain(self, *a),
        )
    health, network = Health(), make_network(1.0, 2.0)
    context = StepContext(config=None, loss=None, stats=StatsCollector(), health=health)
    apply_gradients(network, torch.optim.SGD(network.parameters(), lr=1.0), context, "G")
    assert waits == ["__bool__"]


# What follows.


def test_skipping_goes_on_until_too_many_in_a_row():
    health = Health("skip", limit=3)
    for gradient in (NAN, NAN, 1.0, NAN, NAN):
        run_step(health, gradient)
    with pytest.raises(
        NonFiniteError, match=r"3 times in a row \(--nonfinite-limit\).*--resume: lower --glr"
    ) as caught:
        run_step(health, NAN)
    assert isinstance(caught.value, RunError) and caught.value.exit_code == 70
    assert "\n" not in str(caught.value)
    assert (health.counts["G"].in_a_row, health.counts["G"].total) == (3, 5)


def test_a_step_that_always_fails_is_not_hidden_by_the_others():
    """G's step of path length fails each time, G's other steps in between do not."""
    health = Health(limit=3)
    for _ in range(2):
        run_step(health, NAN, step="path_length")
        run_step(health, 1.0, step="G")
    with pytest.raises(NonFiniteError, match=r"G \(path length\) got"):
        run_step(health, NAN, step="path_length")


def test_abort_ends_at_the_first_fault():
    with pytest.raises(NonFiniteError, match="states saved before are intact"):
        run_step(Health("abort"), NAN)


def test_rollbacks_draw_other_numbers_and_are_limited():
    health = Health("rollback", limit=100, find_state=lambda: 2000)
    scopes = [health.draws_scope]
    for attempt in range(1, MAX_ROLLBACKS + 1):
        with pytest.raises(RollbackRequest, match=rf"state at 2 kimg.*attempt {attempt} of {MAX_ROLLBACKS}"):
            run_step(health, NAN)
        scopes.append(health.draws_scope)
    assert len(set(scopes)) == len(scopes) and scopes[0] == ""
    with pytest.raises(NonFiniteError, match=f"again after {MAX_ROLLBACKS} rollbacks to 2 kimg"):
        run_step(health, NAN)


def test_a_later_state_makes_rollbacks_possible_again():
    position = [1000]
    health = Health("rollback", limit=100, find_state=lambda: position[0])
    for nimg in (1000, 2000, 3000):
        position[0] = nimg
        for _ in range(MAX_ROLLBACKS):
            with pytest.raises(RollbackRequest):
                run_step(health, NAN)
    assert health.rollbacks == 3 * MAX_ROLLBACKS


def test_without_a_state_to_go_back_to_the_step_is_skipped():
    health = Health("rollback", limit=3)
    assert len(run_step(health, NAN)) == len(run_step(health, NAN)) == 1
    with pytest.raises(NonFiniteError, match="3 times in a row"):
        run_step(health, NAN)


def test_a_run_that_goes_on_counts_on():
    health = Health("rollback", limit=100, find_state=lambda: 2000)
    with pytest.raises(RollbackRequest):
        run_step(health, NAN)
    state = json.loads(json.dumps(health.state_dict()))  # numbers and texts only
    resumed = Health("rollback", limit=100, find_state=lambda: 2000)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == health.state_dict() and resumed.draws_scope == health.draws_scope
    with pytest.raises(RollbackRequest, match="attempt 2"):
        run_step(resumed, NAN)


def test_a_rollback_does_not_take_back_what_was_counted():
    """The state that is gone back to says 0: the second attempt must differ from the first."""
    health = Health("rollback", limit=100, find_state=lambda: 2000)
    before = health.state_dict()
    with pytest.raises(RollbackRequest):
        run_step(health, NAN)
    health.load_state_dict(before)
    assert health.rollbacks == 1 and health.counts["G"].total == 1 and health.counts["G"].in_a_row == 0


# What a faulty pass leaves behind.


def test_running_statistics_that_are_lost_start_anew():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    network(torch.randn(4, 2, 3, 3))
    network[1].running_var[0] = NAN
    kept = network[0].running_mean.clone()
    assert reset_faulty_statistics_(network) == ["1"]
    assert torch.equal(network[0].running_mean, kept) and kept.abs().max() > 0
    assert torch.equal(network[1].running_var, torch.ones(2)) and not network[1].running_mean.any()
    assert reset_faulty_statistics_(network) == []


def test_a_fault_repairs_the_networks_that_are_guarded():
    critic = nn.Sequential(nn.BatchNorm2d(2))
    critic[0].running_mean.fill_(NAN)
    (warning,) = run_step(Health(networks=[critic]), NAN)
    assert critic[0].running_mean.isfinite().all()
    assert "running statistics of 1 BatchNorm layers start anew" in warning


def test_norms_name_the_largest():
    network = make_network(1.0, NAN, 5.0)
    norms = GradientNorms.of(list(network.named_parameters()))
    assert norms.find_faulty() == ["1.weight"]
    assert norms.describe_largest() == "the largest finite norm is 10, of 2.weight"


# Several ranks.


def fault_on_rank_1(folder: str) -> None:
    """What each of two processes does."""
    torch.distributed.init_process_group("gloo")
    warnings: list[str] = []
    stats = StatsCollector()
    context = StepContext(config=None, loss=None, stats=stats, warn=warnings.append, health=Health(limit=1))
    network = make_network(NAN if rank() == 1 else 1.0, 2.0)
    stats.report("Loss/scores/real", NAN if rank() == 1 else 1.0)
    apply_gradients(network, torch.optim.SGD(network.parameters(), lr=1.0), context, "D")
    try:
        context.health.enforce()
        ended = ""
    except NonFiniteError as error:
        ended = str(error)
    share = stats.flush()["Health/nonfinite_D"]["mean"]
    with open(f"{folder}/{rank()}", "w", encoding="utf-8") as file:
        json.dump([warnings, ended, share], file)
    torch.distributed.destroy_process_group()


def test_ranks_decide_alike_and_name_whose_fault_it_was(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | common | {"RANK": str(r), "PYTHONPATH": root},
        )
        for r in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert first == second
    (warning,), ended, share = first
    assert "in 1 of 2 parameters (first 0.weight)" in warning and "; on rank 1. This step" in warning
    assert "D's logits of real images" in warning
    assert "1 times in a row" in ended and share == 1


if __name__ == "__main__":
    fault_on_rank_1(sys.argv[1])
