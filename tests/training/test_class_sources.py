# SPDX-License-Identifier: MIT
"""Which classes of a checkpoint new classes start from: every choice, the default's order, and each refusal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_utils.errors import UserError
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig, to_json
from training.finetune.class_sources import (
    ClassSources,
    choose_sources,
    has_feature_rows,
    mean_of_all,
    nearest_rows,
    take_rows,
)
from training.network_file import NetworkFile
from training.presets import quickstart

FEATURES = torch.eye(4, 320) + 0.1


def make_file(
    c_dim: int = 4, names: list[str] | None = None, embedding_dim: int = 320, source: str | None = None
):
    """A checkpoint whose class i has embedding row FEATURES[i]; source: embedding_source of the run that wrote it."""
    config = GeneratorConfig(
        mapping=MappingConfig(c_dim=c_dim, num_embeddings=6, embedding_dim=embedding_dim),
        synthesis=SynthesisConfig(img_resolution=16),
    )
    rows = torch.full((6, embedding_dim), 9.0)
    rows[:4] = FEATURES[:, :embedding_dim]
    own = None if source is None else to_json(replace(quickstart(), embedding_source=source))
    return NetworkFile(
        path=Path("net.pkl"),
        generator_config=config,
        train_config_json=own,
        G_ema={"mapping.embed.weight": rows},
        G=None,
        D=None,
        discriminator_config=None,
        head_kind=None,
        info={} if names is None else {"class_names": names},
    )


def choose(
    choice: str, stored: NetworkFile, num_classes: int, names=None, features=None
) -> ClassSources | None:
    def compute():
        if features is None:
            raise AssertionError("image features are not needed here")
        return features

    return choose_sources(choice, stored, num_classes, names, compute)


# Choices.


def test_same_ids():
    classes = choose("same", make_file(), 4)
    assert classes.ids == ((0,), (1,), (2,), (3,)) and classes.is_identity
    assert classes.describe() == "classes 0 to 3 as they are"
    assert choose("same", make_file(c_dim=0), 0) is None


def test_names():
    classes = choose("names", make_file(names=["cat", "dog", "hen", "owl"]), 2, ("owl", "cat"))
    assert classes.ids == ((3,), (0,)) and not classes.is_identity
    assert classes.describe() == "same names: from class 3, 0"


def test_nearest_compares_directions_of_the_classes_in_use():
    features = 50 * FEATURES[[2, 0, 2]] + 0.01 * torch.randn(3, 320)
    classes = choose("nearest", make_file(), 3, features=features)
    assert classes.ids == ((2,), (0,), (2,))
    assert classes.describe() == "nearest by image features: from class 2, 0, 2"
    # A row of the table that is no class would be the nearest.
    assert choose("nearest", make_file(), 1, features=torch.full((1, 320), 9.0)).ids[0][0] < 4


def test_mean():
    classes = choose("mean", make_file(), 2)
    assert classes.ids == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert classes.describe() == "mean of 4 classes"
    assert choose("mean", make_file(), 0).ids == ((0, 1, 2, 3),)  # without classes: one


def test_lists_and_files(tmp_path):
    stored = make_file(names=["cat", "dog", "hen", "3 owls"])
    assert choose("2,0", stored, 2).ids == ((2,), (0,))
    assert choose("hen, 1+cat", stored, 2).ids == ((2,), (1, 0))
    assert choose("3 owls", stored, 0).ids == ((3,),)
    (tmp_path / "classes.txt").write_text("# new: old\n2  # hens\n\ndog+3\n")
    classes = choose(str(tmp_path / "classes.txt"), stored, 2)
    assert classes.ids == ((2,), (1, 3)) and classes.describe() == "as listed: from class 2, 1+3"


def test_long_lists_are_shortened():
    assert choose("0,1,2,3,0,1,2", make_file(), 7).describe() == "as listed: from class 0, 1, 2, 3, 0, 1, ..."


# The default.


@pytest.mark.parametrize(
    ("stored", "num_classes", "names", "origin"),
    [
        (make_file(), 4, None, "same ids"),
        (make_file(), 4, ("a", "b", "c", "d"), "same ids"),  # the file does not know its names
        (make_file(names=["a", "b", "c", "d"]), 4, None, "same ids"),
        (make_file(names=["a", "b", "c", "d"]), 4, ("d", "c", "b", "a"), "same names"),
        (make_file(names=["a", "b", "c", "d"]), 2, ("d", "b"), "same names"),
        (make_file(names=["a", "b", "c", "d"]), 4, ("d", "c", "b", "x"), "nearest by image features"),
        (make_file(), 2, None, "nearest by image features"),
        (make_file(embedding_dim=24), 2, None, "mean"),
        (make_file(source="data"), 2, None, "mean"),  # standardised rows do not compare with features
        (make_file(source="table.npy"), 2, None, "nearest by image features"),
        (make_file(), 0, None, "mean"),
    ],
)
def test_default(stored, num_classes, names, origin):
    is_nearest = origin.startswith("nearest")
    classes = choose("auto", stored, num_classes, names, FEATURES[:num_classes] if is_nearest else None)
    assert classes.origin == origin and len(classes.ids) == max(num_classes, 1)


def test_a_checkpoint_without_classes_has_no_sources():
    assert choose("auto", make_file(c_dim=0), 3) is None
    assert choose("auto", make_file(c_dim=0), 0) is None


def test_which_tables_hold_features():
    assert has_feature_rows(make_file()) and has_feature_rows(make_file(source="imagenet.npy"))
    for source in ("random", "data", "stem", "checkpoint"):
        assert not has_feature_rows(make_file(source=source))


# Refusals.


@pytest.mark.parametrize(
    ("choice", "stored", "num_classes", "names", "message"),
    [
        ("same", make_file(), 3, None, "has 4 classes and this run 3; use names, nearest, mean or a list"),
        ("same", make_file(c_dim=0), 3, None, "has 0 classes and this run 3"),
        ("mean", make_file(c_dim=0), 3, None, "net.pkl has no classes; leave --classes-from out"),
        ("names", make_file(), 3, ("a", "b", "c"), "net.pkl has no class names"),
        ("names", make_file(names=["a"] * 4), 3, None, "the data has no class names"),
        ("names", make_file(names=list("abcd")), 3, tuple("axy"), r"no class 'x' \(2 in all are missing\)"),
        ("nearest", make_file(embedding_dim=24), 3, None, "does not hold image features"),
        ("1,2", make_file(), 3, None, "2 source classes for 3 classes of this run; give one for each"),
        ("1,2", make_file(), 0, None, "2 source classes for one class of this run"),
        ("1,2,4", make_file(), 3, None, r"'4' is not a class id 0\.\.\.3; correct it"),
        ("1,2,-1", make_file(), 3, None, "'-1' is not a class id"),
        (
            "1,2,cow",
            make_file(names=list("abcd")),
            3,
            None,
            r"'cow' is not a class id 0\.\.\.3 or the name of one",
        ),
        ("absent.txt", make_file(), 3, None, "absent.txt: no such file"),
        ("nearset", make_file(), 3, None, "nearset"),
    ],
)
def test_refusals_are_one_line(choice, stored, num_classes, names, message):
    with pytest.raises(UserError, match=message) as error:
        choose(choice, stored, num_classes, names)
    assert "\n" not in str(error.value) and "--classes-from" in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "classes.npy").write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(UserError, match="not a text file of class ids"):
        choose(str(tmp_path / "classes.npy"), make_file(), 3)


# Rows.


def test_rows_are_copied_bit_for_bit_or_averaged():
    table = torch.randn(6, 3)
    classes = ClassSources(((2,), (0, 1), (2,)), 4, "as listed")
    rows = take_rows(table, classes)
    assert torch.equal(rows[0], table[2]) and torch.equal(rows[2], table[2])
    torch.testing.assert_close(rows[1], (table[0] + table[1]) / 2)
    assert rows.dtype == table.dtype


def test_spare_rows_stay_and_missing_ones_are_the_mean():
    table = torch.randn(6, 3)
    classes = mean_of_all(num_stored=4, num_classes=2)
    rows = take_rows(table, classes, num_rows=8)
    mean = table[:4].mean(dim=0)
    assert rows.shape == (8, 3) and torch.equal(rows[2:6], table[2:])
    for index in (0, 1, 6, 7):
        torch.testing.assert_close(rows[index], mean)
    assert torch.equal(take_rows(table, classes, num_rows=3)[2], table[2])


def test_nearest_does_not_depend_on_lengths():
    rows = torch.tensor([[100.0, 0.0], [0.01, 0.01]])
    assert nearest_rows(torch.tensor([[3.0, 2.9]]), rows).ids == ((1,),)
