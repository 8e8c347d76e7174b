# SPDX-License-Identifier: MIT
"""All that a run needs to go on exactly, as one dictionary of tensors, numbers and texts, and back.

No random state is in it: every draw of a training step comes from a counter (draws.py), and the order of the data
from the number of images seen (data_loader.py). Nor are pretrained networks, which are never trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_utils.distributed import world_size
from training.config import TrainConfig, to_json
from training.discriminator.kinds import AnyDiscriminator
from training.generator.kinds import AnyGenerator
from training.network_file import NetworkFileError, check_names_and_shapes
from training.state_file import FORMAT, VERSION, StateFileError

ADVICE = "it was saved with other networks; use the settings in the run's training_options.json"


class Stateful(Protocol):
    """An object whose state goes into a run's: numbers, texts and tensors, in dictionaries and lists."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """The clocks of a run, and what else moves during training besides weights and optimizers."""

    cur_nimg: int = 0  # real images seen
    cur_iteration: int = 0  # optimizer iterations done
    cur_tick: int = 0  # progress reports made
    tick_start_nimg: int = 0  # real images seen at the last of them
    total_seconds: float = 0.0  # that the run has taken until it was saved, in all its parts
    pl_mean: Tensor = field(default_factory=lambda: torch.zeros(()))  # running mean of path lengths

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; tensors stay on their device."""
        for name, value in vars(self).items():
            setattr(self, name, state[name].to(value.device) if isinstance(value, Tensor) else state[name])


@dataclass(frozen=True)
class RunParts:
    """Where the state of a run is while it trains."""

    config: TrainConfig
    data: dict[str, Any]  # what tells one data set from another, see `describe_data`
    G: AnyGenerator
    D: AnyDiscriminator
    G_ema: AnyGenerator
    G_optimizer: Optimizer
    D_optimizer: Optimizer
    others: Mapping[str, Stateful]  # "clock" (TrainState), "stats", "snapshots" and so on, by name


def describe_data(content_hash: str | None, num_images: int) -> dict[str, Any]:
    """What the data of a run that goes on must agree in. content_hash: None = not known."""
    return {"content_hash": content_hash, "num_images": num_images}


def capture(parts: RunParts) -> dict[str, Any]:
    """The state of a run between two iterations. All processes must call it together; all get the same.

    Tensors are those of the run: copy or write them before it goes on.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": to_json(parts.config),
        "data": dict(parts.data),
        "world_size": world_size(),
        "networks": {name: _network_state(network) for name, network in _networks(parts).items()},
        "optimizers": {
            name: optimizer.state_dict()["state"] for name, (optimizer, _) in _optimizers(parts).items()
        },
        "others": {name: other.state_dict() for name, other in parts.others.items()},
    }


def restore_(parts: RunParts, state: dict[str, Any], path: Path) -> list[str]:
    """Bring a freshly built run into a state of `capture`. Returns lines for its log.

    Everything is compared before anything is changed: StateFileError names the first tensor that does not fit, or the
    data. Hyperparameters of the optimizers stay those of the run's configuration. path: where the state comes from.
    """
    networks, optimizers = _networks(parts), _optimizers(parts)
    try:
        _check_data(state["data"], parts.data, path)
        for name, network in networks.items():
            _check_network(name, _network_state(network), state["networks"][name], path)
        for name, (optimizer, network) in optimizers.items():
            _check_optimizer(name, optimizer, network, state["optimizers"][name], path)
        lost = [name for name in parts.others if name not in state["others"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateFileError(f"{path} lacks a part of its state ({error!r}); use an older one") from error
    for name, network in networks.items():
        _load_network_(network, state["networks"][name])
    for name, (optimizer, _) in optimizers.items():
        _load_optimizer_(optimizer, state["optimizers"][name])
    for name, other in parts.others.items():
        if name not in lost:
            other.load_state_dict(state["others"][name])
    notes = [f"Note: {path} says nothing of {name!r}, which starts anew." for name in lost]
    if state["world_size"] != world_size():
        notes.append(
            f"Note: the run had {state['world_size']} processes and goes on with {world_size()}: the same images in "
            "the same order; sums over the batch are rounded differently."
        )
    return notes


def stored_config(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Configuration of the run that was saved, as JSON gives it. Raises StateFileError."""
    try:
        return json.loads(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateFileError(f"{path} has no configuration that can be read; use an older state") from error


def _networks(parts: RunParts) -> dict[str, nn.Module]:
    return {"G": parts.G, "D": parts.D, "G_ema": parts.G_ema}


def _optimizers(parts: RunParts) -> dict[str, tuple[Optimizer, nn.Module]]:
    return {"G": (parts.G_optimizer, parts.G), "D": (parts.D_optimizer, parts.D)}


def _network_state(network: nn.Module) -> dict[str, Tensor]:
    """All that is trained or moves; of a projected discriminator not its pretrained backbones."""
    has_frozen_parts = hasattr(network, "trained_state_dict")
    state = network.trained_state_dict() if has_frozen_parts else network.state_dict()
    return {name: value for name, value in state.items() if value is not None}


def _load_network_(network: nn.Module, state: dict[str, Tensor]) -> None:
    if hasattr(network, "load_trained_state_dict"):
        network.load_trained_state_dict(state)
    else:
        network.load_state_dict(state)


def _check_data(stored: dict[str, Any], present: dict[str, Any], path: Path) -> None:
    for name, words in (("content_hash", "other content"), ("num_images", "another number of images")):
        before, now = stored[name], present[name]
        if before is not None and now is not None and before != now:
            raise StateFileError(
                f"{path} belongs to a run on data with {words} ({before}, now {now}); give the same data, or start a "
                "new run from its network with --resume FILE"
            )


def _check_network(name: str, own: dict[str, Tensor], stored: dict[str, Tensor], path: Path) -> None:
    try:
        check_names_and_shapes(own, stored, path, ADVICE)
    except NetworkFileError as error:
        raise StateFileError(f"{name} of {error}") from error


def _check_optimizer(
    name: str, optimizer: Optimizer, network: nn.Module, stored: dict[int, dict[str, Any]], path: Path
) -> None:
    """Every moment must belong to a parameter, and be a number or have its shape."""
    names = {id(parameter): own for own, parameter in network.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if odd := [index for index in stored if not 0 <= index < len(parameters)]:
        raise StateFileError(
            f"{path}: the optimizer of {name} trained parameter {odd[0]}, and now has {len(parameters)}: {ADVICE}"
        )
    for index, moments in stored.items():
        parameter = parameters[index]
        for kind, moment in moments.items():
            if isinstance(moment, Tensor) and moment.ndim > 0 and moment.shape != parameter.shape:
                raise StateFileError(
                    f"{path}: {kind} of {name}'s {names.get(id(parameter), index)!r} has shape {tuple(moment.shape)}, "
                    f"expected {tuple(parameter.shape)}: {ADVICE}"
                )


def _load_optimizer_(optimizer: Optimizer, stored: dict[int, dict[str, Any]]) -> None:
    """Moments from the state, hyperparameters from the optimizer.

    Moments get the memory format of their parameters: fused steps go through both as they lie in memory.
    """
    optimizer.load_state_dict({"state": stored, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for kind, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moments[kind] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
