# SPDX-License-Identifier: MIT
"""Hostile, damaged and enormous pickles: nothing runs, little is allocated, and one line says what is wrong.

pytest tests/training/test_official_pickle.py
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import types
from pathlib import Path

import pytest
import torch

from training.official_globals import is_known
from training.official_pickle import InertModule, load_official_pickle

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "g_snapshot_san_stem.pkl"


class Call:
    """Pickles as a call of `function` with `arguments`, followed by `state` if that is given."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (
            (self.function, self.arguments)
            if self.state is None
            else (self.function, self.arguments, self.state)
        )


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def body(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


# Names.


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("sys", "exit"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "open"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("importlib", "import_module"),
        ("runpy", "run_path"),
        ("pickle", "loads"),
        ("marshal", "loads"),
        ("shutil", "rmtree"),
        ("operator", "attrgetter"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.hub", "load"),
        ("torch.utils.cpp_extension", "load_inline"),
        ("torch.package", "PackageImporter"),
        ("torch.jit", "load"),
        ("ctypes", "CDLL"),
        ("webbrowser", "open"),
        ("timmy", "x"),
        ("torchvision", "models"),
        ("torch.nn", "modules.os.system"),
        ("timm", "os.system"),
    ],
)
def test_foreign_names_are_refused(module, name, written, refused):
    for data in (
        body(named(module, name), b")R"),
        b"\x80\x02c" + f"{module}\n{name}\n)R.".encode(),
        b"\x80\x02(" + f"i{module}\n{name}\n.".encode(),
        body(named("torch.nn", "Module"), b")\x81}", text("x"), named(module, name), b"sb"),
    ):
        module_name = "builtins" if module == "__builtin__" else module
        assert f"refused the global {module_name}.{name}" in refused(written(data))


def test_long_names_from_a_file_make_short_messages(written, refused):
    name = "a\nb\x1b[31m" * 1000
    assert "a b" in refused(written(body(named("os", name), b")R")))


def test_what_snapshots_name_becomes_a_stand_in():
    content = load_official_pickle(SNAPSHOT)
    D = content["D"]
    assert type(D) is InertModule and D.name == "pg_modules.discriminator.ProjectedDiscriminator"
    vit = D.state["_modules"]["feature_networks"].state["_modules"]["deit_base_distilled_patch16_224"]
    model = vit.state["_modules"]["pretrained"].state["_modules"]["model"]
    (hook,) = model.state["_forward_hooks"].values()
    assert hook.name == "dill._dill._create_function" and hook.arguments[0].name == "dill._dill._create_code"
    assert type(model.state["forward_flex"]) is InertModule


def test_stand_ins_accept_whatever_a_pickle_does_to_them(written):
    thing = named("timm.models", "Thing")
    data = body(
        thing, b")\x81", b"(K\x01K\x02u", b"(K\x01K\x02e", b"K\x01a", b"K\x01K\x02s", b"}", text("a"), b"K\x01sb",
        thing, b")", b"}\x92", b")R", thing, b"\x87"
    )  # fmt: skip
    first, second, third = load_official_pickle(written(data))
    assert first.state == {"a": 1} and first.name == "timm.models.Thing"
    assert type(second) is InertModule and third.name == "timm.models.Thing"


# Execution.


@pytest.fixture
def target(tmp_path) -> Path:
    """A file that appears if a hostile pickle gets to run its command."""
    return tmp_path / "executed"


def storage(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def hostile(command: str) -> dict[str, object]:
    call = Call(os.system, command)
    module = torch.nn.Linear(2, 2)
    module.__dict__["note"] = call
    keyed = collections.OrderedDict([("a", call)])
    code = compile(f"import os; os.system({command!r})", "x", "exec")
    return {
        "top": call,
        "in G_ema": {"G_ema": call},
        "in the attributes of a module": {"G_ema": torch.nn.Linear(2, 2), "D": module},
        "in a container": {"G_ema": [({"x": {"y": (call,)}},)]},
        "in an ordered dict": keyed,
        "as a state": {"G_ema": Call(torch.nn.Module, state={"x": call})},
        "in a storage": {"G_ema": Call(torch.storage._load_from_bytes, storage(call))},
        "in a storage in a storage": Call(
            torch.storage._load_from_bytes, storage(Call(torch.storage._load_from_bytes, storage(call)))
        ),
        "in a storage, as a zip": Call(torch.storage._load_from_bytes, zip_storage(call)),
        "as arguments of getattr": {"G_ema": Call(getattr, Call(getattr, call, "x"), "y")},
        "exec": {"G_ema": Call(exec, f"import os; os.system({command!r})")},
        "marshalled code": {"G_ema": Call(types.FunctionType, Call(types.CodeType, code.co_code), {})},
        "in __setstate__": {"G_ema": Call(types.SimpleNamespace, state={"__setstate__": call})},
        "partial": {"G_ema": Call(Call, call)},
    }


def zip_storage(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", hostile("true"))
def test_nothing_is_executed(target, name, protocol, written, refused):
    try:
        data = pickle.dumps(hostile(f"touch {target}")[name], protocol=protocol)
    except (pickle.PicklingError, AttributeError):
        pytest.skip("Python itself cannot write this one")
    refused(written(data))
    assert not target.exists()


def test_the_hostile_command_would_work_elsewhere(target):
    """Else the test above proves nothing."""
    pickle.loads(pickle.dumps(hostile(f"touch {target}")["in a container"]))
    assert target.exists()


def test_dill_code_objects_are_not_made(tmp_path, target, written, refused):
    """As dill writes a function: code object, its globals, and a call of the result."""
    source = f"import os; os.system('touch {target}')"
    code = compile(source, "x", "exec")
    create_code = (
        named("dill._dill", "_create_code") + b"(" + b"K\x00" * 6 + b"C" + bytes([len(code.co_code)])
    )
    create_code += code.co_code + b"tR"
    function = named("dill._dill", "_create_function") + b"(" + create_code + b"}Nt" + b"R"
    data = body(b"}", text("G_ema"), function, b")R", b"s")
    content = load_official_pickle(written(data))
    assert content["G_ema"].name == "result"
    refused(tmp_path / "net.pkl")
    assert not target.exists()


def test_the_golden_file_names_no_class_of_this_process(monkeypatch):
    """Reading imports nothing and calls no constructor, even of classes that are there."""
    imported = []
    monkeypatch.setattr(
        "builtins.__import__",
        lambda name, *a, _old=__import__, **k: imported.append(name) or _old(name, *a, **k),
    )
    monkeypatch.setattr(
        torch.nn.Embedding, "__setstate__", lambda *a: pytest.fail("a real module was touched"), raising=False
    )
    load_official_pickle(SNAPSHOT)
    assert not [
        name for name in imported if name.partition(".")[0] in ("dill", "timm", "pg_modules", "training")
    ]


@pytest.mark.parametrize("value", [b"]", b")", b"K\x01", b"C\x01a", text("a"), b"N"])
def test_only_stand_ins_take_a_state(value, written, refused):
    message = refused(written(body(value, b"}b")))
    assert "tries to alter a" in message


def test_the_reader_cannot_be_altered(written, refused):
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        data = body(named("torch._utils", name), b"N}", text("rebuild"), b"K\x01s\x86b")
        assert "alter a function of the reader" in refused(written(data))


def test_what_a_real_snapshot_names_is_known():
    """Seen in a dump of a full-size discriminator; they must stay stand-ins."""
    for module, name in [
        ("builtins", "getattr"),
        ("builtins", "setattr"),
        ("builtins", "__dict__"),
        ("dill._dill", "_create_function"),
        ("dill._dill", "_load_type"),
        ("feature_networks.vit", "forward_flex"),
        ("functools", "partial"),
        ("timm.models.layers.patch_embed", "PatchEmbed"),
        ("torch", "Size"),
        ("torch.nn.modules.container", "ModuleDict"),
        ("torch.nn.utils.spectral_norm", "SpectralNorm"),
        ("types", "MethodType"),
    ]:
        assert is_known(module, name), (module, name)
