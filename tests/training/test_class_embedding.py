# SPDX-License-Identifier: MIT
"""Class embedding tables from every format, and hostile or damaged official pickles, which must run nothing.

pytest tests/training/test_class_embedding.py
"""

import collections
import io
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from torch_utils.errors import UserError
from training.config import MappingConfig
from training.generator.class_embedding import load_class_embedding, set_class_embedding_
from training.generator.mapping import MappingNetwork
from training.official_pickle import InertModule, load_official_pickle

TABLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def embedding_of(table):
    embedding = torch.nn.Embedding(*table.shape)
    with torch.no_grad():
        embedding.weight.copy_(table)
    return embedding


def write(path, table=TABLE):
    """`table` in the format of the path's suffix."""
    if path.suffix == ".npy":
        np.save(path, table.numpy())
    elif path.suffix == ".npz":
        np.savez(path, embed=table.numpy(), names=np.array(["a", "b"]))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({"embed.weight": table, "other": table[:1].clone()}, path)
    elif path.suffix == ".pt":
        torch.save(table, path)
    else:
        path.write_bytes(pickle.dumps({"embed": embedding_of(table)}, protocol=4))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".pkl"])
def test_every_format_gives_the_same_table(tmp_path, suffix):
    rows = load_class_embedding(write(tmp_path / f"table{suffix}"))
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    assert torch.equal(rows, TABLE)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_official_pickles_of_later_protocols(tmp_path, protocol):
    path = tmp_path / "embed.pkl"
    path.write_bytes(pickle.dumps({"embed": embedding_of(TABLE)}, protocol=protocol))
    content = load_official_pickle(path)
    assert list(content) == ["embed"]
    assert type(content["embed"]) is InertModule
    assert torch.equal(load_class_embedding(path), TABLE)


def test_half_precision_tables_become_float32(tmp_path):
    for suffix in (".npy", ".pt"):
        rows = load_class_embedding(write(tmp_path / f"half{suffix}", TABLE.half()))
        assert rows.dtype == torch.float32
        assert torch.equal(rows, TABLE.half().float())


def test_parts_of_a_storage_are_read_with_their_offset_and_strides(tmp_path):
    path = tmp_path / "view.pkl"
    view = torch.arange(24.0).reshape(4, 6)[1:3, ::2]
    path.write_bytes(pickle.dumps([view, view.t()]))
    first, second = load_official_pickle(path)
    assert torch.equal(first, view)
    assert torch.equal(second, view.t())


# Writing into the network


def mapping_network(c_dim=5, num_embeddings=7, embedding_dim=4):
    cfg = MappingConfig(
        z_dim=3, w_dim=3, c_dim=c_dim, num_embeddings=num_embeddings, embedding_dim=embedding_dim
    )
    return MappingNetwork(cfg, num_ws=2)


def test_rows_are_copied_and_others_stay():
    mapping = mapping_network()
    before = mapping.embed.weight.detach().clone()
    set_class_embedding_(mapping, TABLE)
    assert torch.equal(mapping.embed.weight[:6], TABLE)
    assert torch.equal(mapping.embed.weight[6:], before[6:])
    assert mapping.embed.weight.requires_grad
    assert mapping.embed.weight.is_leaf


def test_rows_beyond_the_table_are_ignored():
    mapping = mapping_network(c_dim=3, num_embeddings=3)
    set_class_embedding_(mapping, TABLE)
    assert torch.equal(mapping.embed.weight, TABLE[:3])


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"4 class embeddings.*5 classes"):
        set_class_embedding_(mapping_network(), TABLE[:4])
    with pytest.raises(UserError, match=r"\(6, 4\).*width 9"):
        set_class_embedding_(mapping_network(embedding_dim=9), TABLE)
    with pytest.raises(UserError, match=r"\(24,\)"):
        set_class_embedding_(mapping_network(), TABLE.flatten())


# Files that are not tables


def refused(path):
    with pytest.raises(UserError) as caught:
        load_class_embedding(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".pt", ".pkl"])
def test_missing_and_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    assert "no such file" in refused(path)
    path.write_bytes(write(tmp_path / f"whole{suffix}").read_bytes()[:40])
    refused(path)
    path.write_bytes(b"")
    refused(path)


def test_wrong_contents_are_refused(tmp_path):
    assert "(24,)" in refused(write(tmp_path / "vector.npy", TABLE.flatten()))
    assert "int64" in refused(write(tmp_path / "integers.npy", TABLE.long()))
    assert "NaN" in refused(write(tmp_path / "nan.npy", TABLE / 0 * 0))
    assert ".json" not in refused(write(tmp_path / "table.bin"))
    safetensors.torch.save_file({"a": TABLE, "b": TABLE.clone()}, tmp_path / "two.safetensors")
    assert "a, b" in refused(tmp_path / "two.safetensors")
    for number, content in enumerate(
        ({}, {"embed": 3}, {"embed": [TABLE]}, [1, 2], {"other": embedding_of(TABLE)})
    ):
        path = tmp_path / f"content{number}.pkl"
        path.write_bytes(pickle.dumps(content))
        assert "embed" in refused(path)


# Hostile files


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def target(tmp_path):
    """A file that appears if a hostile pickle gets to run its command."""
    return tmp_path / "executed"


def hostile_objects(target):
    command = f"touch {target}"
    embedding = embedding_of(TABLE)
    embedding.__dict__["note"] = Call(os.system, command)
    return {
        "top": (Call(os.system, command), "system"),
        "under embed": ({"embed": Call(os.system, command)}, "system"),
        "inside the module": ({"embed": embedding}, "system"),
        "after the table": (
            {"embed": embedding_of(TABLE), "x": Call(eval, f"open({str(target)!r}, 'w')")},
            "eval",
        ),
        "full torch.load": ({"embed": Call(torch.load, str(target))}, "torch.serialization.load"),
    }


@pytest.mark.parametrize(
    "name", ["top", "under embed", "inside the module", "after the table", "full torch.load"]
)
def test_a_foreign_global_is_refused_by_name_and_not_run(tmp_path, target, name):
    content, refused_global = hostile_objects(target)[name]
    path = tmp_path / "embed.pkl"
    path.write_bytes(pickle.dumps(content))
    message = refused(path)
    assert "refused the global" in message
    assert refused_global in message
    assert not target.exists()


def test_a_call_that_whole_snapshots_contain_is_not_made(tmp_path):
    path = tmp_path / "embed.pkl"
    path.write_bytes(pickle.dumps({"embed": Call(getattr, TABLE, "shape")}))
    assert load_official_pickle(path)["embed"].name == "builtins.getattr"
    assert "no torch Embedding" in refused(path)


def test_the_hostile_command_would_work_elsewhere(target):
    """Else the test above proves nothing."""
    pickle.loads(pickle.dumps(hostile_objects(target)["top"][0]))
    assert target.exists()


def test_a_text_pickle_of_os_system_is_refused(tmp_path, target):
    path = tmp_path / "embed.pkl"
    path.write_bytes(f"(dS'embed'\ncos\nsystem\n(S'touch {target}'\ntRs.".encode())
    assert "os.system" in refused(path)
    assert not target.exists()


def test_dotted_names_do_not_reach_through_an_allowed_one(tmp_path):
    path = tmp_path / "embed.pkl"
    path.write_bytes(b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.xxx\x93.")
    assert "OrderedDict.__init__" in refused(path)


def stack_global(module, name):
    words = [b"\x8c" + struct.pack("<B", len(word)) + word.encode() for word in (module, name)]
    return b"".join(words) + b"\x93"


def test_storage_bytes_with_a_call_inside_run_nothing(tmp_path, target):
    """The bytes of a storage are a nested file in torch's format, with pickles of its own."""
    hostile = io.BytesIO()
    torch.save(Call(os.system, f"touch {target}"), hostile, _use_new_zipfile_serialization=False)
    data = hostile.getvalue()
    body = stack_global("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data
    path = tmp_path / "embed.pkl"
    path.write_bytes(b"\x80\x04" + body + b"\x85R.")
    refused(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.nn.modules.sparse", "Embedding"),
        ("collections", "OrderedDict"),
    ],
)
def test_a_pickle_cannot_alter_the_reader(tmp_path, module, name):
    """BUILD with (None, {attribute: value}) sets attributes on whatever is on the stack."""
    path = tmp_path / "embed.pkl"
    state = b"N}\x8c\x05stateK\x01s\x86"  # (None, {"state": 1})
    path.write_bytes(b"\x80\x04" + stack_global(module, name) + state + b"b.")
    message = refused(path)
    if name.startswith("_"):
        assert "alter a function" in message
    assert InertModule.state is None
    assert not hasattr(collections.OrderedDict, "state")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "embed.pkl"
    data = pickle.dumps(torch.zeros(2, 3), protocol=4)
    sizes = b"K\x02K\x03\x86"
    assert data.count(sizes) == 1
    path.write_bytes(data.replace(sizes, b"K\x7fK\x7f\x86"))
    assert "(127, 127)" in refused(path)
