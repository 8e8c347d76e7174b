# SPDX-License-Identifier: MIT
"""Mapping networks for other classes, for none, and for new ones: the styles that follow, compared exactly."""

from dataclasses import replace

import pytest
import torch

from training.config import MappingConfig
from training.finetune.class_sources import ClassSources, mean_of_all, same_ids
from training.finetune.mapping_conversion import convert_mapping, embedding_vectors
from training.generator.mapping import MappingNetwork, normalize_second_moment

CLASSES, NUM_WS = 4, 3
SOURCE = MappingConfig(z_dim=5, w_dim=8, c_dim=CLASSES, num_embeddings=6, embedding_dim=7)


def make_mapping(cfg: MappingConfig) -> MappingNetwork:
    mapping = MappingNetwork(cfg, NUM_WS)
    with torch.no_grad():
        mapping.w_avg.normal_()
        for name, parameter in mapping.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=10 if name.startswith("fc") else 0.1)
    return mapping


def converted(old: MappingNetwork, target: MappingConfig, classes: ClassSources | None) -> MappingNetwork:
    new = make_mapping(target)
    new.load_state_dict(
        convert_mapping(old.state_dict(), old.cfg, target, classes), strict=classes is not None
    )
    return new


def test_rows_follow_their_classes():
    old = make_mapping(SOURCE)
    new = converted(old, replace(SOURCE, c_dim=3), ClassSources(((3,), (1,), (3,)), CLASSES, "as listed"))
    z = torch.randn(3, 5)
    for psi in (1.0, 0.5):  # with truncation: the mean styles too
        assert torch.equal(new(z, torch.arange(3), psi), old(z, torch.tensor([3, 1, 3]), psi))
    assert torch.equal(new.embed.weight[3:], old.embed.weight[3:])


def test_same_classes_change_nothing():
    old = make_mapping(SOURCE)
    new = converted(old, SOURCE, same_ids(CLASSES, CLASSES))
    assert all(torch.equal(new.state_dict()[name], x) for name, x in old.state_dict().items())


def test_more_classes_than_rows():
    old = make_mapping(SOURCE)
    new = converted(old, replace(SOURCE, c_dim=9, num_embeddings=9), mean_of_all(CLASSES, 9))
    torch.testing.assert_close(new.embed.weight, old.embed.weight[:CLASSES].mean(0).expand(9, -1))
    torch.testing.assert_close(new.w_avg, old.w_avg.mean(0).expand(9, -1))


@pytest.mark.parametrize("class_id", [0, 3])
def test_one_class_without_conditions_gives_its_styles(class_id):
    old = make_mapping(SOURCE)
    new = converted(old, replace(SOURCE, c_dim=0), ClassSources(((class_id,),), CLASSES, "as listed"))
    z = torch.randn(16, 5)
    for psi in (1.0, 0.5):
        expected = old(z, torch.full((16,), class_id), psi)
        torch.testing.assert_close(new(z, None, psi), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(new.embed.weight, old.embed.weight)  # there, and not used


def test_mean_of_all_classes_takes_the_mean_class_vector():
    old = make_mapping(SOURCE)
    new = converted(old, replace(SOURCE, c_dim=0), mean_of_all(CLASSES, 1))
    z = torch.randn(16, 5)
    y = normalize_second_moment(old.embed_proj(old.embed.weight[:CLASSES])).mean(0)
    x = torch.cat([normalize_second_moment(z), y.expand(16, -1)], dim=1)
    expected = old.fc1(old.fc0(x))
    torch.testing.assert_close(new(z)[:, 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new.w_avg, old.w_avg.mean(0))


def test_new_classes_start_with_the_unconditional_styles():
    old = make_mapping(replace(SOURCE, c_dim=0))
    new = converted(old, SOURCE, None)
    z = torch.randn(8, 5)
    for psi in (1.0, 0.5):
        for class_id in range(CLASSES):
            styles = new(z, torch.full((8,), class_id), psi)
            torch.testing.assert_close(styles, old(z, None, psi), rtol=1e-5, atol=1e-5)
    new(z, torch.arange(8) % CLASSES).square().sum().backward()
    assert new.fc0.weight.grad[:, 5:].abs().max() > 0  # the class can make a difference


def test_what_must_start_anew_is_not_in_the_state():
    state = convert_mapping(
        make_mapping(replace(SOURCE, c_dim=0)).state_dict(), replace(SOURCE, c_dim=0), SOURCE, None
    )
    assert make_mapping(SOURCE).state_dict().keys() - state.keys() == {
        "embed.weight",
        "embed_proj.weight",
        "embed_proj.bias",
    }


def test_class_vectors_are_those_of_the_network():
    old = make_mapping(SOURCE)
    vectors = embedding_vectors(old.embed_proj.weight, old.embed_proj.bias, old.embed.weight)
    assert vectors.dtype == torch.float64
    torch.testing.assert_close(vectors.float(), old.embed_proj(old.embed.weight), rtol=1e-5, atol=1e-6)
