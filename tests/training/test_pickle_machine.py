# SPDX-License-Identifier: MIT
"""Values, damage and bombs: what is rebuilt, what a broken file leads to, and how much a hostile one can allocate.

pytest tests/training/test_pickle_machine.py
"""

from __future__ import annotations

import os
import pickle
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training.network_io import read_network
from training.official_pickle import MAX_OBJECT_BYTES, MAX_OPERATIONS, load_official_pickle
from training.official_values import numpy_array

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "g_snapshot_san_stem.pkl"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def body(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


# Values.


def test_numpy_values_are_rebuilt(written):
    arrays = [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3), ">f4")), np.array([True, False])]
    numbers = [np.float64(0.1), np.int16(-3), np.bool_(True), np.float32(0.5)]
    path = written(pickle.dumps((arrays, numbers), protocol=4))
    found, scalars = load_official_pickle(path)
    for array, value in zip(arrays, found, strict=True):
        assert np.array_equal(numpy_array(value), array)
    assert scalars == [0.1, -3, True, 0.5] and [type(x) for x in scalars] == [float, int, bool, float]


def test_object_arrays_are_not_rebuilt(written):
    path = written(pickle.dumps(np.array([{"a": 1}, None], dtype=object), protocol=4))
    assert numpy_array(load_official_pickle(path)) is None


def test_an_array_must_fit_its_bytes(written):
    data = pickle.dumps(np.arange(6.0), protocol=4).replace(b"K\x06\x85", b"K\x07\x85")
    with pytest.raises(Exception, match="an array of 7 numbers in 48 bytes"):
        numpy_array(load_official_pickle(written(data)))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_every_type(dtype, written):
    tensors = [
        torch.tensor([[1, 0], [0, 1]]).to(dtype),
        torch.zeros(0, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    path = written(pickle.dumps([*tensors, torch.nn.Parameter(torch.ones(2))], protocol=4))
    for tensor, value in zip(tensors, load_official_pickle(path), strict=False):
        assert value.dtype == dtype and torch.equal(value, tensor)


def test_tensors_are_views_that_do_not_write_to_the_file(written):
    path = written(pickle.dumps(torch.zeros(4), protocol=4))
    before = path.read_bytes()
    load_official_pickle(path).fill_(7.0)
    assert path.read_bytes() == before


# Damage.


def tensor_data() -> bytes:
    return pickle.dumps(torch.arange(6.0).reshape(2, 3), protocol=4)


def replaced(old: bytes, new: bytes) -> bytes:
    data = tensor_data()
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


DAMAGED = {
    "empty": (b"", "empty file"),
    "not a pickle": (b"\x80\x04hello", "no instruction|used before it is made|ends early"),
    "only a start": (b"\x80\x04", "ends early"),
    "ends in a number": (b"\x80\x04J\x01", "ends early"),
    "bytes that are not there": (body(b"B\xff\xff\xff\x7fabc"), "ends early"),
    "text that is not there": (body(b"X\x00\x00\x10\x00abc"), "ends early"),
    "a petabyte of bytes": (body(b"\x8e" + struct.pack("<Q", 1 << 50)), "ends early"),
    "a petabyte of text": (body(b"\x8d" + struct.pack("<Q", 1 << 50)), "more text than a network"),
    "an exabyte in a bytearray": (body(b"\x96" + struct.pack("<Q", 1 << 62)), "ends early"),
    "a negative length": (body(b"T\xff\xff\xff\xff"), "ends early"),
    "a huge number": (body(b"\x8b\x00\x00\x00\x40"), "a number of 1073741824 bytes"),
    "a number without end": (b"\x80\x04I" + b"9" * 10000, "does not end"),
    "a decimal of 4000 digits": (b"\x80\x04L" + b"9" * 4090 + b"L\n.", "no network G_ema"),
    "no stack": (body(b"R"), "lacks its argument"),
    "no mark": (body(b"K\x01t"), "lacks its mark"),
    "an odd dict": (body(b"(K\x01d"), "a key lacks its value"),
    "unknown memo": (body(b"h\x05"), "object 5 is used before it is made"),
    "an extension": (body(b"\x82\x01"), "no instruction"),
    "a buffer outside": (body(b"\x97"), "no instruction"),
    "an object outside": (body(text("x"), b"Q"), "objects outside the file"),
    "a call of text": (body(text("x"), b")R"), "it calls a str"),
    "arguments that are no tuple": (body(named("torch", "Size"), b"K\x01R"), "no tuple"),
    "a name that is no text": (body(b"K\x01", text("x"), b"\x93"), "no text"),
    "items for a number": (body(b"K\x01", b"(K\x01e"), "put into a int"),
    "storage that is no storage": (
        body(named("torch.storage", "_load_from_bytes"), b"B\x03\x00\x00\x00abc\x85R"),
        "no instruction|not a pickle",
    ),
    "a storage of fewer numbers": (replaced(b"\x06" + b"\0" * 7, b"\x05" + b"\0" * 7), "does not hold its 5 numbers"),
    "a storage of more numbers": (replaced(b"\x06" + b"\0" * 7, b"\0" * 6 + b"\x01\0"), "does not hold its"),
    "another magic number": (replaced(b"l\xfc\x9cF\xf9", b"l\xfc\x9cF\xf8"), "unknown format"),
    "a type that is none": (replaced(b"FloatStorage", b"FloatStoragf"), "refused the global torch.FloatStoragf"),
    "a shape beyond the storage": (replaced(b"K\x02K\x03\x86", b"K\x03K\x03\x86"), r"shape \(3, 3\) from 6"),
    "strides beyond the storage": (replaced(b"K\x03K\x01\x86", b"K\x7fK\x01\x86"), "leaves its storage"),
    "a negative shape": (replaced(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"), "without a storage or a shape"),
    "a network without a name": (
        body(named("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}\x85R"),
        "a network without a name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(name, written):
    data, reason = DAMAGED[name]
    path = written(data)
    with pytest.raises(UserError) as caught:
        content = load_official_pickle(path)
        if reason == "no network G_ema":
            assert isinstance(content, int)
            raise UserError(reason)
    assert re.search(reason, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_keys_that_collide_do_not_take_for_ever(written):
    prime = (1 << 61) - 1  # integers that differ by this have the same hash
    items = b"".join(
        b"\x8a\x0b" + (k * prime << 8).to_bytes(11, "little") + b"K\x01" for k in range(1, 50000)
    )
    assert load_official_pickle(written(body(b"}(", items, b"u"))) == {}


def test_deep_nesting_is_no_recursion(written, refused):
    depth = MAX_OPERATIONS // 8
    thing = named("timm", "Thing")
    for data in (
        body(b")", b"\x85" * depth),
        body(b"]" * depth, b"a" * (depth - 1)),
        body(b"".join([b"}", text("a")]) * (depth // 4), b"N", b"s" * (depth // 4)),
        body(thing, b"q\x00", b"0", b"h\x00)\x81" * (depth // 2), b"b" * (depth // 2 - 1)),
    ):
        refused(written(data))


def test_nested_storages_are_not_opened(written, refused):
    data = b""
    for _ in range(300):
        inner = (
            named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"
        )
        data = body(inner)
    assert "storage" in refused(written(data))


@pytest.mark.parametrize("cut", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_snapshots(cut, written, refused):
    data = SNAPSHOT.read_bytes()
    refused(written(data[: int(cut * len(data))]))


def mutant(data: bytes, seed: int) -> bytes:
    """`data` with bytes flipped, removed, repeated or replaced by instructions that could do harm."""
    rng = random.Random(seed)
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 2, 5, 20])):
        # The first 20 kB hold most instructions, what follows is mainly numbers.
        position = rng.randrange(2, rng.choice([400, 20000, len(mutated) - 100]))
        kind = rng.randrange(5)
        if kind == 0:
            mutated[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[position] = rng.choice(b"cR\x81\x93bib(.0tuesQ\x82\x8e\x96J\xff\x00")
        elif kind == 2:
            del mutated[position : position + rng.randrange(1, 40)]
        elif kind == 3:
            mutated[position:position] = mutated[position : position + rng.randrange(1, 40)]
        else:
            mutated[position:position] = b"cos\nsystem\n(X\x04\x00\x00\x00truetR"
    return bytes(mutated)


@pytest.mark.parametrize("first_seed", range(0, 100, 20))
def test_mutated_snapshots_execute_nothing_and_fail_in_one_line(monkeypatch, first_seed, written):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a mutant ran a command"))
    data = SNAPSHOT.read_bytes()
    num_refused = 0
    for seed in range(first_seed, first_seed + 20):
        try:
            stored = read_network(written(mutant(data, seed)))
            assert stored.G_ema  # the change hit a number, or a part that is not needed
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            num_refused += 1
    assert num_refused >= 10


# Memory.

MEASURE = """
import re, sys
from torch_utils.errors import UserError
from training import official_pickle
from training.network_io import read_network
official_pickle.MAX_OPERATIONS = int(sys.argv[1])
def peak():  # of this program: getrusage counts what the parent process had as well
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
try:
    read_network(sys.argv[2])  # a sound file: everything that reading imports is imported
except UserError:
    raise SystemExit("not read")
for path in sys.argv[3:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at what is in use
    before = peak()
    try:
        read_network(path)
    except UserError as error:
        print(peak() - before, str(error))
"""


def bombs(count: int) -> dict[str, bytes]:
    """Small files that claim much, and files of somewhat more than `count` instructions."""
    count += 100
    laugh = b"".join(
        b"(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"l" + b"q" + bytes([i + 1]) for i in range(60)
    )
    tensor = pickle.dumps(torch.zeros(64), protocol=4)
    return {
        "shape": tensor.replace(b"K@\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", 1),
        "stride of zero": tensor.replace(b"K@\x85", b"J\x00\x00\x00\x7f\x85", 1).replace(
            b"K\x01\x85", b"K\x00\x85"
        ),
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        "memo": body(b"Nr\xff\xff\xff\xff"),
        "laughs": body(b"Nq\x00", laugh),
        "array": pickle.dumps(np.zeros(3), protocol=4).replace(
            b"K\x03\x85", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"
        ),
        "texts": body(text("\U0001f600" + "a" * 1000000) * 60),
        "lists": body(b"]" * count),
        "sets": body(b"\x8f\x94" * (count // 2)),
        "dicts with an item": body(b"}K\x01K\x01s" * (count // 4)),
        "objects": body(named("timm", "X"), b"q\x00", b"h\x00)R" * (count // 3)),
        "bytes": body(b"C\x00\x94" * (count // 2)),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux tells it")
def test_bombs_allocate_less_than_the_stated_bound(tmp_path):
    """With a tenth of the instructions that are allowed, and a tenth of the bound that follows from them."""
    num_operations = MAX_OPERATIONS // 10
    paths = []
    for name, data in bombs(num_operations).items():
        paths.append(tmp_path / f"{name.replace(' ', '_')}.pkl")
        paths[-1].write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(num_operations), str(SNAPSHOT), *map(str, paths)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths), result.stderr
    num_text_bytes = MAX_OBJECT_BYTES - 300 * MAX_OPERATIONS
    for path, line in zip(paths, lines, strict=True):
        bound = num_text_bytes if path.stem == "texts" else 300 * num_operations
        bound = 5e6 if path.stat().st_size < 10_000 else bound + path.stat().st_size
        assert int(line.split()[0]) < bound, (path.stem, line)
