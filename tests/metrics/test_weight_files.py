# SPDX-License-Identifier: MIT
"""Tensors from every format, nothing executed, damage told in one line."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.weight_files import read_tensors
from torch_utils.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.output = nn.Linear(4, 5)
        self.register_buffer("table", torch.arange(6).half().reshape(2, 3).T)  # strides of its own
        self.sizes = [1, 2, 3]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x).mean(dim=(2, 3)))


class Wrapper:
    """A pickled object around TorchScript's bytes."""

    def __init__(self, content: bytes) -> None:
        self.before, self.content, self.after = {"a": (1, 2.5, None)}, content, "x" * 200_000


@pytest.fixture
def net() -> Net:
    net = Net().eval()
    net.layers[1].running_mean.normal_(), net.layers[1].running_var.uniform_(0.5, 2)
    return net


def script(net: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    return file.getvalue()


def traced(net: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 8, 8)), file)
    return file.getvalue()


def saved(value: object, is_zip: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


FORMATS: dict[str, Callable[[Net], bytes]] = {
    "torch.save": lambda net: saved(net.state_dict(), True),
    "torch.save before zip files": lambda net: saved(net.state_dict(), False),
    "a module by torch.save": lambda net: saved(net, True),
    "torch.jit.script": script,
    "torch.jit.trace": traced,
    "script in a pickle": lambda net: pickle.dumps(Wrapper(script(net)), protocol=4),
    "script in a pickle of protocol 3": lambda net: pickle.dumps(Wrapper(script(net)), protocol=3),
    "a pickled module": lambda net: pickle.dumps(net, protocol=4),
    "a pickled module in a dict": lambda net: pickle.dumps({"net": net}, protocol=3),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_tensors_by_name_and_in_order(kind, net, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(FORMATS[kind](net))
    expected = net.state_dict()
    found = {name.removeprefix("net.").removeprefix("content."): x for name, x in read_tensors(path).items()}
    skipped = {"layers.1.num_batches_tracked"} if kind == "torch.jit.trace" else set()
    assert set(found) | skipped == set(expected)
    for name in set(expected) - skipped:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name
    layers = [name for name in found if name.endswith("weight")]
    assert layers == ["layers.0.weight", "layers.1.weight", "output.weight"]


def test_safetensors(net, tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "net.safetensors")
    assert torch.equal(read_tensors(tmp_path / "net.safetensors")["a"], torch.ones(2, 3))


def test_the_file_is_not_written_to(net, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps(net))
    before = path.read_bytes()
    for tensor in read_tensors(path).values():
        tensor.fill_(0)
    assert path.read_bytes() == before


# Nothing is executed.


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def attack_in_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({"a": Attack()}, protocol=2))
        archive.writestr("net/code/__torch__.py", "raise SystemExit")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Attack()), pickle.dumps({"net": [Attack()]}), attack_in_zip(), saved([Attack()], False)],
)
def test_nothing_in_a_file_is_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a command was run"))
    Path("net.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"net\.pkl holds no (tensors|weights)"):
        read_tensors("net.pkl")
    assert not Path("executed").exists()


# Damage.


def rewritten(
    content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip with its files changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def damaged(kind: str, net: nn.Module) -> bytes:
    content = saved(net.state_dict(), True)
    if kind == "a compressed zip":
        return rewritten(content, lambda name, data: data, zipfile.ZIP_DEFLATED)
    if kind == "a short storage":
        return rewritten(content, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    if kind == "a big-endian machine":
        return rewritten(content, lambda name, data: b"big" if name.endswith("byteorder") else data)
    if kind == "flipped bits":
        start = content.index(net.layers[0].weight.detach().numpy().tobytes()[:16])
        return content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]
    if kind == "half a zip":
        return content[: len(content) // 2]
    if kind == "a lost storage":
        return content.replace(b"/data/1", b"/data/x")
    if kind == "half a pickle":
        return pickle.dumps(net)[:2000]
    return {"nothing": b"", "text": b"<html>404</html>", "no network": saved([], True)}[kind]


DAMAGE = {
    "nothing": "empty file",
    "text": "holds no weights",
    "no network": "holds no tensors",
    "a compressed zip": "is compressed",
    "a short storage": "does not hold its",
    "a big-endian machine": "big-endian",
    "flipped bits": "Bad CRC-32",
    "half a zip": "without its end",
    "a lost storage": "no item named",
    "half a pickle": "holds no weights",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(kind, net, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(damaged(kind, net))
    with pytest.raises(UserError, match=DAMAGE[kind]) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_tensors(tmp_path / "net.pt")


def test_a_tensor_beyond_its_storage(tmp_path):
    content = saved({"a": torch.zeros(64)}, True)
    changed = rewritten(
        content, lambda name, data: data.replace(b"K@\x85", b"M\x00\x10\x85") if "data.pkl" in name else data
    )
    (tmp_path / "net.pt").write_bytes(changed)
    with pytest.raises(UserError, match=r"shape \(4096,\) from 64"):
        read_tensors(tmp_path / "net.pt")


def test_containers_that_hold_themselves_end(tmp_path):
    text = b"X" + struct.pack("<I", 1) + b"a"
    (tmp_path / "net.pkl").write_bytes(b"\x80\x04}\x94" + text + b"h\x00s.")  # d["a"] = d
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "net.pkl")
