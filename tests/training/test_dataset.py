# SPDX-License-Identifier: MIT
"""Data sets against the official reader and sampler (d_data.npz), and what they promise beyond."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training import dataset as dataset_module
from training.data_loader import InfiniteSampler, make_loader
from training.dataset import choose_subset, open_dataset

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_data.npz")
READER_CASES = {
    "reader_plain": {"use_labels": True},
    "reader_xflip": {"use_labels": True, "mirror": True},
    "reader_max3_seed1": {"use_labels": True, "max_size": 3, "seed": 1},
    "reader_max3_seed7_xflip": {"use_labels": True, "max_size": 3, "seed": 7, "mirror": True},
    "reader_nolabel": {},
}
SAMPLER_CASES = [key for key in GOLDEN.files if key.startswith("sampler/")]


def golden_files() -> dict[str, np.ndarray]:
    prefix = "folder_center_crop/"
    return {
        key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if re.match(prefix + r".*\.png", key)
    }


def grey(side: int, value: int = 0) -> np.ndarray:
    return np.full((side, side), value, dtype=np.uint8)


@pytest.fixture
def large_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set counts as too large to decode when opened."""
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)


@pytest.mark.parametrize("case", READER_CASES)
@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("is_in_memory", [True, False])
def test_reader_matches_golden(write_dataset, monkeypatch, case, suffix, is_in_memory):
    if not is_in_memory:
        monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    text = str(GOLDEN["folder_center_crop/dataset_json_text"])
    dataset = open_dataset(
        write_dataset("o_center_crop" + suffix, golden_files(), text), **READER_CASES[case]
    )
    meta = json.loads(str(GOLDEN[case + "/meta"]))
    expected_labels = GOLDEN[case + "/labels"]
    assert dataset.is_in_memory == is_in_memory
    assert (dataset.name, len(dataset), dataset.resolution) == (meta["name"], meta["len"], meta["resolution"])
    assert (dataset.c_dim, dataset.num_channels) == (meta["label_dim"], meta["shape"][0])
    items = [dataset[i] for i in range(len(dataset))]
    np.testing.assert_array_equal(
        torch.stack([image for image, _ in items]).numpy(), GOLDEN[case + "/images"]
    )
    if dataset.c_dim:
        assert dataset.labels.tolist() == expected_labels.argmax(axis=1).tolist()
    else:
        assert dataset.labels.tolist() == [0] * len(dataset)
    assert [label for _, label in items] == dataset.labels.tolist()


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if key.startswith("subset/")])
def test_subset_matches_golden(key):
    num_images, max_size, seed = map(int, key.removeprefix("subset/").split("_"))
    assert choose_subset(num_images, max_size, seed).tolist() == GOLDEN[key].tolist()


@pytest.mark.parametrize("key", SAMPLER_CASES)
@pytest.mark.parametrize("num_skipped", [0, 1, 29])
def test_sampler_matches_golden_from_any_position(key, num_skipped):
    size, rank, num_replicas, seed = map(int, re.findall(r"\d+", key))
    sampler = InfiniteSampler(size, seed, rank, num_replicas, position=num_skipped * num_replicas)
    expected = GOLDEN[key][num_skipped:].tolist()
    assert list(itertools.islice(sampler, len(expected))) == expected


def test_sampler_position_survives_block_boundaries():
    sampler = InfiniteSampler(37, seed=5)
    sequence = list(itertools.islice(sampler, 9000))
    sampler.position = 8190  # settable; crosses the second block of random offsets
    assert list(itertools.islice(sampler, 800)) == sequence[8190:8990]


def test_sampler_shows_every_index_and_ranks_share_one_sequence():
    whole = list(itertools.islice(InfiniteSampler(50, seed=2), 600))
    assert set(whole) == set(range(50))
    ranks = [list(itertools.islice(InfiniteSampler(50, 2, rank, 3), 200)) for rank in range(3)]
    assert [index for triple in zip(*ranks, strict=True) for index in triple] == whole
    counts = np.bincount(list(itertools.islice(InfiniteSampler(50, seed=2), 20_000)), minlength=50)
    assert counts.min() > 300  # of 400 on average


def test_sampler_without_shuffling_counts():
    assert list(itertools.islice(InfiniteSampler(3, shuffle=False), 7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("arguments", [{"dataset_size": 0}, {"rank": 2, "num_replicas": 2}, {"position": -1}])
def test_sampler_refuses(arguments):
    with pytest.raises(ValueError, match="InfiniteSampler"):
        InfiniteSampler(**{"dataset_size": 5, **arguments})


def test_mirrored_items_are_flipped(tiny_zip):
    dataset = open_dataset(tiny_zip, use_labels=True, mirror=True)
    images, labels = dataset.batch(np.arange(12))
    assert torch.equal(images[6:], images[:6].flip(3))
    assert not torch.equal(images[6:], images[:6])
    assert torch.equal(labels[6:], labels[:6])


def test_batch_equals_items_and_does_not_share_memory(tiny_folder):
    dataset = open_dataset(tiny_folder, use_labels=True, mirror=True)
    indices = [11, 0, 0, 7]
    images, labels = dataset.batch(indices)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    for image, label, index in zip(images, labels, indices, strict=True):
        assert torch.equal(image, dataset[index][0]) and label == dataset[index][1]
    before = dataset[0][0].clone()
    images.zero_()
    dataset[0][0].zero_()
    assert torch.equal(dataset[0][0], before)


def test_grey_files_become_three_channels_or_stay_one(write_dataset):
    path = write_dataset("grey", {"1.png": grey(8, 7), "2.png": grey(8, 9)})
    assert torch.equal(open_dataset(path)[1][0], torch.full((3, 8, 8), 9, dtype=torch.uint8))
    assert open_dataset(path, channels=1)[0][0].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="channels"):
        open_dataset(path, channels=4)


def test_hidden_and_foreign_files_are_skipped(write_dataset):
    files = {"a.png": grey(8), "._a.png": b"", "__MACOSX/a.png": b"", ".git/b.png": b"", "notes.txt": b"x"}
    for name in ("set", "set.zip"):
        assert len(open_dataset(write_dataset(name, files))) == 1


def test_class_count_is_that_of_the_whole_set(tiny_folder):
    assert open_dataset(tiny_folder, use_labels=True, max_size=1).c_dim == 3


def test_index_out_of_range(tiny_folder):
    with pytest.raises(IndexError, match=r"index 6 .* 0 \.\.\. 5"):
        open_dataset(tiny_folder)[6]


def test_fingerprint_is_of_the_content(write_dataset, tiny_images, tiny_folder, tiny_zip):
    original = open_dataset(tiny_folder, use_labels=True).fingerprint()
    assert open_dataset(tiny_zip, use_labels=True).fingerprint() == original
    names = list(tiny_images)
    renamed = {f"x/{i}.png": tiny_images[name] for i, name in enumerate(reversed(names))}
    assert (
        open_dataset(write_dataset("renamed", renamed)).fingerprint() == open_dataset(tiny_zip).fingerprint()
    )
    changed = {**tiny_images, names[0]: 255 - tiny_images[names[0]]}
    others = [
        open_dataset(write_dataset("changed.zip", changed)),
        open_dataset(tiny_zip),
        open_dataset(tiny_zip, mirror=True),
        open_dataset(tiny_zip, max_size=5),
        open_dataset(tiny_zip, max_size=5, seed=1),
    ]
    assert len({original, *(other.fingerprint() for other in others)}) == 6


def test_reference_set_ignores_training_options(tiny_zip):
    whole = open_dataset(tiny_zip, use_labels=True)
    part = open_dataset(tiny_zip, use_labels=True, mirror=True, max_size=2)
    assert whole.reference_set() is whole
    assert part.reference_set().fingerprint() == whole.fingerprint()
    assert len(part.reference_set()) == 6


def test_lazy_set_survives_pickling_and_closing(large_sets, tiny_zip):
    dataset = open_dataset(tiny_zip, use_labels=True)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert torch.equal(copy[3][0], dataset[3][0])
    copy.close()


def test_digits_are_fixed():
    pytest.importorskip("sklearn")
    dataset = open_dataset("digits", use_labels=True)
    images, labels = dataset.batch(np.arange(len(dataset)))
    assert images.shape == (1797, 3, 16, 16) and dataset.c_dim == 10
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert images.amin() == 0 and images.amax() == 255
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest == "701a31329051b677a5948144962f43da8d5874791f1ccd83d7c734808ffcde81"


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r'"digits".*pip install scikit-learn'):
        open_dataset("digits")


def test_loader_follows_the_sampler_and_counts(tiny_folder):
    dataset = open_dataset(tiny_folder, use_labels=True, mirror=True)
    loader = make_loader(dataset, InfiniteSampler(12, seed=1), batch_size=5)
    order = list(itertools.islice(InfiniteSampler(12, seed=1), 15))
    for step in range(3):
        images, labels = next(loader)
        expected_images, expected_labels = dataset.batch(order[5 * step : 5 * step + 5])
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)
        assert loader.position == 5 * (step + 1)
    resumed = make_loader(dataset, InfiniteSampler(12, seed=1, position=loader.position), batch_size=5)
    assert torch.equal(next(resumed)[0], next(loader)[0])


def test_loader_counts_the_images_of_all_processes(tiny_folder):
    loader = make_loader(open_dataset(tiny_folder), InfiniteSampler(6, 0, 1, 4), batch_size=3)
    next(loader)
    assert loader.position == 12


@pytest.mark.parametrize("name", ["tiny_folder", "tiny_zip"])
def test_worker_processes_give_the_same_batches(large_sets, request, name):
    dataset = open_dataset(request.getfixturevalue(name), use_labels=True, mirror=True)
    dataset[0]  # an open zip handle in this process must not disturb the workers
    state = torch.get_rng_state()
    sampler = InfiniteSampler(12, seed=3)
    with_workers = make_loader(dataset, sampler, 4, num_workers=2)
    without = make_loader(dataset, sampler, 4, num_workers=0)
    for _ in range(4):
        for actual, expected in zip(next(with_workers), next(without), strict=True):
            assert torch.equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), state)
