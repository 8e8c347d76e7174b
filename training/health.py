# SPDX-License-Identifier: MIT
"""Gradients that are not finite: where they come from, and what the run does about them, the same on all ranks.

The decision is taken on the averaged gradients, which are equal everywhere; what single ranks know, such as whose loss
it was, is exchanged only when something is wrong. The official code turns NaN into 0 and goes on, which hides the
fault: docs/fidelity.md#non-finite-gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_utils.distributed import BATCHNORMS, gather_objects, world_size
from torch_utils.errors import RunError
from torch_utils.stats import StatsCollector
from training.stopping import ABORTED

Policy = Literal["skip", "rollback", "abort"]
Step = Literal["G", "path_length", "D"]

STEPS: dict[Step, str] = {"G": "G", "path_length": "G (path length)", "D": "D"}  # and how messages call them
MAX_ROLLBACKS = 3  # to one saved state, before the run gives up
LOSS_TERMS = {  # statistics whose values a step makes, in the order in which a fault would spread, and their names
    "Loss/scores/fake": "D's logits of generated images",
    "Loss/scores/real": "D's logits of real images",
    "Loss/G/guidance_loss": "classifier guidance",
    "InfoGAN/categorical": "InfoGAN's categorical code",
    "InfoGAN/continuous": "InfoGAN's continuous codes",
    "Loss/D/penalty": "gradient penalty",
    "Loss/pl_penalty": "path length penalty",
    "Loss/G/loss": "G's loss",
    "Loss/D/loss": "D's loss",
}
ADVICE = "lower --glr or --dlr, try --fp32 1 or another --seed"


class NonFiniteError(RunError):
    """The run ends, because its gradients are not finite; what was saved before is intact."""

    exit_code = ABORTED


class RollbackRequest(Exception):  # noqa: N818 -- asks for something
    """The run must go back to its last complete state, everything but the Health object, and go on from there."""


@dataclass(frozen=True)
class GradientNorms:
    """Norms of the gradients of a network, by parameter in the order of the network."""

    names: Sequence[str]
    norms: Tensor  # float32 (P,), on the device

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, nn.Parameter]]) -> GradientNorms:
        """A norm is finite when Adam's second moment of all its elements is, too: from 1.8e19 on it overflows."""
        norms = [torch.linalg.vector_norm(p.grad) for _, p in parameters]
        return cls([name for name, _ in parameters], torch.stack(norms))

    def find_faulty(self) -> list[str]:
        """Parameters whose gradient is not finite. Waits for the device."""
        values = self.norms.tolist()
        return [name for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)]

    def describe_largest(self) -> str:
        """The largest finite norm and whose it is. Waits for the device."""
        finite = [(v, n) for n, v in zip(self.names, self.norms.tolist(), strict=True) if math.isfinite(v)]
        return (
            "none is finite"
            if not finite
            else "the largest finite norm is {:.3g}, of {}".format(*max(finite))
        )


@dataclass
class Count:
    """Steps of one kind whose gradient was not finite."""

    in_a_row: int = 0  # up to now
    total: int = 0  # of the run


class Health:
    """Counts faulty steps of a run, and says what follows from one."""

    def __init__(
        self,
        policy: Policy = "skip",
        limit: int = 10,
        networks: Sequence[nn.Module] = (),
        find_state: Callable[[], int | None] = lambda: None,
    ) -> None:
        """limit: abort after so many faulty steps of a kind in a row. networks: whose BatchNorm statistics a faulty
        pass may have spoilt. find_state: images seen at the last complete state, equal on all ranks; None = none yet.
        """
        self.policy, self.limit = policy, limit
        self._networks, self._find_state = networks, find_state
        self.counts = {step: Count() for step in STEPS}
        self.rollbacks = 0  # of the run
        self.attempts: dict[int, int] = {}  # rollbacks by the state they went to; of the last state only
        self._fault: str | None = None  # the first since `enforce`

    @property
    def draws_scope(self) -> str:
        """What `Draws` of the run's steps start with: after a rollback they must not repeat the step that failed."""
        return f"/rollback{self.rollbacks}" if self.rollbacks else ""

    def note_success(self, step: Step) -> None:
        """A step whose gradient was finite."""
        self.counts[step].in_a_row = 0

    def note_fault(
        self, step: Step, own: GradientNorms, averaged: GradientNorms, stats: StatsCollector, place: str
    ) -> str:
        """Count a faulty step, which is skipped; returns a warning. All ranks call it. What else follows: `enforce`.

        own: of this rank's gradients, before they were averaged; place: when it happened, for people.
        """
        count = self.counts[step]
        count.in_a_row += 1
        count.total += 1
        origin = describe_origin(own, averaged, stats.take_faulty_names())
        what = f"{STEPS[step]} got a gradient that is not finite at {place}: {origin}"
        repaired = [name for network in self._networks for name in reset_faulty_statistics_(network)]
        if self._fault is None:
            self._fault = what
        notes = f"; running statistics of {len(repaired)} BatchNorm layers start anew" if repaired else ""
        return f"Warning: {what}. This step was skipped ({count.in_a_row} in a row, {count.total} in all){notes}."

    def enforce(self) -> None:
        """What follows from the faults since the last call; between two iterations, on all ranks.

        Raises NonFiniteError or RollbackRequest. Nothing follows with "skip", nor with "rollback" before there is a
        state to go back to, until there are `limit` faults in a row.
        """
        fault, self._fault = self._fault, None
        if fault is None:
            return
        in_a_row = max(count.in_a_row for count in self.counts.values())
        if self.policy == "abort":
            raise NonFiniteError(f"{fault}. The states saved before are intact; before --resume: {ADVICE}")
        if in_a_row >= self.limit:
            raise NonFiniteError(
                f"{fault}; {in_a_row} times in a row (--nonfinite-limit). The states saved before are intact; before "
                f"--resume: {ADVICE}"
            )
        state_nimg = self._find_state() if self.policy == "rollback" else None
        if state_nimg is not None:
            self._roll_back(state_nimg, fault)

    def _roll_back(self, state_nimg: int, fault: str) -> None:
        self.attempts = {state_nimg: self.attempts.get(state_nimg, 0) + 1}
        if self.attempts[state_nimg] > MAX_ROLLBACKS:
            raise NonFiniteError(
                f"{fault}; again after {MAX_ROLLBACKS} rollbacks to {state_nimg / 1000:g} kimg. That state is intact; "
                f"before --resume: {ADVICE}"
            )
        self.rollbacks += 1
        raise RollbackRequest(
            f"Going back to the state at {state_nimg / 1000:g} kimg, with other latents and augmentations from there "
            f"on (attempt {self.attempts[state_nimg]} of {MAX_ROLLBACKS})."
        )

    def report(self, stats: StatsCollector) -> None:
        """Report at a tick what has been counted since the start of the run."""
        stats.report("Health/nonfinite_total", float(sum(count.total for count in self.counts.values())))
        stats.report("Health/rollbacks", float(self.rollbacks))

    def state_dict(self) -> dict[str, Any]:
        """All counts, as numbers."""
        counts = {step: [count.in_a_row, count.total] for step, count in self.counts.items()}
        attempts = [number for pair in self.attempts.items() for number in pair]
        return {"counts": counts, "rollbacks": self.rollbacks, "attempts": attempts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. In a rollback totals stay: what happened since the state did happen."""
        for step, (in_a_row, total) in state["counts"].items():
            self.counts[step] = Count(in_a_row, max(total, self.counts[step].total))
        if state["rollbacks"] > self.rollbacks:
            self.rollbacks = state["rollbacks"]
            self.attempts = dict([state["attempts"]] if state["attempts"] else [])


def describe_origin(own: GradientNorms, averaged: GradientNorms, faulty_names: list[str]) -> str:
    """Which parameters, which parts of the loss and which ranks, for people. All ranks call it.

    faulty_names: statistics of this rank's step that are not finite.
    """
    parameters = averaged.find_faulty()
    terms = [term for name, term in LOSS_TERMS.items() if name in faulty_names]
    by_rank = gather_objects((bool(own.find_faulty()), terms))
    all_terms = list(dict.fromkeys(term for _, terms in by_rank for term in terms))
    first, last = parameters[0], parameters[-1]
    place = f"first {first}" if first == last else f"first {first}, last {last}"
    parts = [
        f"in {len(parameters)} of {len(averaged.names)} parameters ({place}); {averaged.describe_largest()}"
    ]
    if all_terms:
        parts.append(f"not finite already: {', '.join(all_terms)}")
    else:
        parts.append("all parts of the loss were finite, so it arose in the backward pass")
    if world_size() > 1:
        ranks = [str(rank) for rank, (is_faulty, _) in enumerate(by_rank) if is_faulty]
        parts.append(f"on rank {', '.join(ranks)}" if ranks else "on no rank alone: their sum overflowed")
    return "; ".join(parts)


@torch.no_grad()
def reset_faulty_statistics_(network: nn.Module) -> list[str]:
    """Let BatchNorm layers whose running statistics are not finite start them anew; returns their names.

    A moving average never recovers from NaN. Training does not use these statistics, what is saved does.
    """
    moving = {n: m for n, m in network.named_modules() if isinstance(m, BATCHNORMS) and m.track_running_stats}
    faulty = [
        n for n, m in moving.items() if not torch.stack([m.running_mean, m.running_var]).isfinite().all()
    ]
    for name in faulty:
        moving[name].reset_running_stats()
    return faulty
