# SPDX-License-Identifier: MIT
"""What the sampling tools' command lines share: classes by index and name, truncation flags."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.download import cached_path
from torch_utils.errors import UserError
from training.sampling_cli import (
    check_truncation,
    create_folder,
    open_network,
    parse_classes,
    read_truncation,
    save_png,
)

NAMES = ["cat", "dog", "Egyptian cat", "great white shark, white shark", "7", "Cat"]


@pytest.fixture(scope="module", name="network")
def network_with_names(tmp_path_factory, write_network):
    path = tmp_path_factory.mktemp("names") / "net.safetensors"
    return write_network(path, c_dim=6, info={"class_names": NAMES})


@pytest.fixture(name="cache")
def cached_centroids(tmp_path, monkeypatch):
    """Centroids that have been downloaded before; returns their address."""
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    url = "https://example.org/centroids.npy"
    cached_path(url).parent.mkdir(parents=True)
    np.save(cached_path(url), np.ones((2, 8), np.float32))
    return url


def test_indices_need_no_file():
    assert parse_classes("0,3,5-7", 10, "absent") == [0, 3, 5, 6, 7]
    assert parse_classes(" 3 , 0 - 1", 10, "absent") == [3, 0, 1]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("dog", [1]),
        ("dog,0,cat", [1, 0, 0]),
        ("DOG", [1]),
        ("Cat,cat", [5, 0]),  # where capitals tell classes apart, they count
        ("egyptian cat", [2]),
        ("great white shark, white shark", [3]),
        ("dog,great white shark,white shark, 2-3", [1, 3, 2, 3]),
    ],
)
def test_names(network, text, classes):
    assert parse_classes(text, 6, network) == classes


def test_a_number_is_an_index_even_if_it_is_a_name(network):
    assert parse_classes("4", 6, network) == [4]
    with pytest.raises(UserError, match="class 7 does not exist: the network has classes 0 to 5"):
        parse_classes("7", 6, network)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dgo", "class 'dgo' is neither an index nor a class name; did you mean 'dog'"),
        ("shark", "did you mean .*'great white shark, white shark'"),
        ("aeroplane", "the network knows 'cat', 'dog'"),
        ("dog,", "class '' is neither"),
        ("3,dog,6", "class 6 does not exist"),
        ("CAT", "class 'CAT' is neither an index nor a class name; did you mean 'cat'"),  # or 'Cat'
        ("-1", "class '-1' is neither"),
        ("5-3,dog", "runs backwards"),
    ],
)
def test_classes_that_do_not_exist(network, text, message):
    with pytest.raises(UserError, match=message):
        parse_classes(text, 6, network)


def test_names_for_a_network_without_names(tmp_path, write_network):
    network = write_network(tmp_path / "net.safetensors", c_dim=6)
    with pytest.raises(UserError, match=r"class 'dog' is no index, and .* has no class names; .* 0 to 5"):
        parse_classes("0,dog", 6, network)


def test_classes_for_an_unconditional_network():
    with pytest.raises(UserError, match="unconditional"):
        parse_classes("0", 0, "absent")


def test_truncation_flags(capsys):
    for psi in (math.nan, math.inf):
        with pytest.raises(UserError, match="--trunc"):
            check_truncation(psi, None, None)
    with pytest.raises(UserError, match="one of the two"):
        check_truncation(0.7, 64, "c.npy")
    check_truncation(-0.5, 64, None)
    assert capsys.readouterr().out == ""
    check_truncation(1, 64, None)
    assert "truncates nothing" in capsys.readouterr().out


def test_addresses_are_fetched_once(network, cache):
    G, file = open_network(network, "cpu", offline=True)
    assert file == Path(network) and not G.training
    truncation = read_truncation(G, 0.5, 3, cache, offline=True)
    assert truncation.psi == 0.5 and truncation.cutoff == 3
    assert truncation.centroids.equal(torch.ones(2, 8))
    for open_other in (
        lambda: read_truncation(G, 0.5, 3, "https://example.org/other.npy", offline=True),
        lambda: open_network("https://example.org/other.pkl", "cpu", offline=True),
    ):
        with pytest.raises(UserError, match="has not been downloaded yet"):
            open_other()


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        create_folder(str(tmp_path / "file" / "out"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_png(tmp_path / "folder.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
