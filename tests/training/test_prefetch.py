# SPDX-License-Identifier: MIT
"""What prefetch fetches for which flags, and what it says of each; stand-ins for hub and servers on this machine."""

import http.server
import shutil
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

import training.discriminator.feature_network
from torch_utils.errors import UserError
from training import prefetch
from training.loss import GuidanceClassifier
from training.network_io import BUILTIN_NETWORKS
from training.prefetch import Item, fetch_item, main


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches, and a hub that has every network but two."""
    for name in ("STYLESAN_CACHE", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "STYLESAN_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def build(name: str, *_: object) -> None:
        if name == "absent":
            raise UserError("no pretrained weights for 'absent'; check the name")
        file = tmp_path / "HF_HOME" / "hub" / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(3 << 20))

    monkeypatch.setattr(training.discriminator.feature_network, "build_feature_network", build)
    monkeypatch.setattr(GuidanceClassifier, "pretrained", classmethod(lambda cls: build("guidance")))
    monkeypatch.setattr(prefetch, "load_detector", lambda name: build(f"detector-{name}"))
    return tmp_path


@pytest.fixture
def server(tmp_path):
    """Address of a folder with one network."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(BUILTIN_NETWORKS["digits"], folder / "stem.safetensors")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()


def outcomes(*arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code, and the line of each item by its first words."""
    result = CliRunner().invoke(main, arguments)
    lines = [
        line for line in result.stdout.splitlines() if line.split()[0] in ("there", "fetched", "missing")
    ]
    return result.exit_code, {line[9:].partition(":")[0]: line for line in lines}


def test_preset_twice(caches):
    code, lines = outcomes("--preset", "imagenet-128")
    assert code == 0
    assert lines["feature network deit_base_distilled_patch16_224"].endswith(": 3.0 MB")
    assert {line.split()[0] for line in lines.values()} == {"fetched"}
    assert any("guidance" in name for name in lines) and any("detector" in name for name in lines)
    code, again = outcomes("--preset", "imagenet-128")
    assert code == 0 and again.keys() == lines.keys()
    assert {line.split()[0] for line in again.values()} == {"there"}


def test_flags_change_what_is_needed(caches):
    _, lines = outcomes(
        "--preset", "imagenet-128", "--cls_weight", "0", "--metrics", "none", "--backbones", "one,two"
    )
    wanted = {f"feature network {name}" for name in ("one", "two")}
    assert wanted <= lines.keys() and not any("guidance" in name or "detector" in name for name in lines)


def test_missing_is_said_with_the_reason(caches):
    code, lines = outcomes("--preset", "imagenet-16", "--backbones", "absent,other")
    assert code == 1
    assert (
        lines["feature network absent"].startswith("missing")
        and "check the name" in lines["feature network absent"]
    )
    assert lines["feature network other"].startswith("fetched")  # the rest is fetched all the same


def test_networks_from_addresses(caches, server):
    good, bad = f"{server}/stem.safetensors", f"{server}/gone.pkl"
    code, lines = outcomes("--preset", "imagenet-32", "--path_stem", good, "--resume", bad)
    assert code == 1
    by_flag = {name.split()[0]: line for name, line in lines.items()}
    assert by_flag["--path_stem"].startswith("fetched") and by_flag["--resume"].startswith("missing")
    assert "404" in by_flag["--resume"]
    _, again = outcomes("--preset", "imagenet-32", "--path_stem", good)
    assert any(line.startswith("there") and good in line for line in again.values())


def test_ladder_needs_what_all_its_stages_need(caches):
    _, ladder = outcomes("--ladder", "imagenet")
    _, stage = outcomes("--preset", "imagenet-128")
    assert stage.keys() <= ladder.keys()


def test_settings_of_a_network_file(caches):
    code, lines = outcomes("--resume", str(BUILTIN_NETWORKS["digits"]))
    assert code == 0 and lines


def test_nothing_to_go_by(caches):
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 1 and result.output.startswith("Error: nothing says what to fetch")


def test_an_unexpected_error_is_not_called_missing(caches):
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fetch_item(Item("x", fail))
