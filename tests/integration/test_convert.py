# SPDX-License-Identifier: MIT
"""python -m training.convert: what is written equals what was read, and bad arguments leave everything as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from training.convert import main
from training.network_io import load_network, read_network

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
STEM, SUPERRES = DATA / "g_snapshot_xl_stem.pkl", DATA / "g_snapshot_san_superres.pkl"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_line(tmp_path):
    out = tmp_path / "net.safetensors"
    command = [sys.executable, "-m", "training.convert", str(SUPERRES), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    for part in (
        "official StyleSAN-XL pickle",
        "32x32, 3 channels",
        "16 pixels, 8 layers -> 32 pixels, head of 5 layers",
        "10: L0_36_24, L1_36_24, L2_36_18, L3_36_14, L4_36_11, L6_36_11",
        "G_ema and G",
        "left out: D",
        "cur_nimg 850000, best_fid 9.25",
        f"Written:       {out}",
    ):
        assert part in result.stdout, part
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr == f"Error: {out} exists; give another name, or --force to replace it\n"


@pytest.mark.parametrize("source", [STEM, SUPERRES], ids=["stem", "superres"])
def test_what_is_written_is_what_was_read(tmp_path, source):
    out = tmp_path / "net.safetensors"
    assert run(source, out)[0] == 0
    before, after = read_network(source), read_network(out)
    assert after.generator_config == before.generator_config
    assert after.info == before.info
    for old, new in ((before.G, after.G), (before.G_ema, after.G_ema)):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    z, labels = torch.randn(2, 64), torch.tensor([3, 9])
    with torch.no_grad():
        assert torch.equal(load_network(source)(z, labels), load_network(out)(z, labels))


def test_half_precision(tmp_path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    assert run(STEM, whole)[0] == run(STEM, half, "--fp16")[0] == 0
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    z, labels = torch.randn(2, 64), torch.tensor([3, 9])
    with torch.no_grad():
        images, expected = load_network(half)(z, labels), load_network(whole)(z, labels)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    out = tmp_path / "net.safetensors"
    out.write_text("precious")
    code, message = run(STEM, out)
    assert code == 1 and "--force" in message and out.read_text() == "precious"
    assert run(STEM, out, "--force")[0] == 0
    assert read_network(out).info["cur_nimg"] == 1500032


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.pkl", "out.safetensors"), "absent.pkl does not exist"),
        ((STEM, "out.pkl"), "does not end with .safetensors"),
        ((STEM, "blocker/out.safetensors"), "cannot be written"),
        (("http://example.org/net.pkl", "out.safetensors"), "only https addresses are fetched"),
        (("https://example.org/net.pkl", "out.safetensors", "--offline"), "downloads are off"),
        ((DATA / "d_blur.npz", "out.safetensors"), "is not a .safetensors file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "blocker").write_text("a file where a folder is wanted")
    code, output = run(*arguments)
    assert code == 1 and message in output
    assert output.startswith("Error: ") and "\n" not in output.strip()
    assert not list(tmp_path.glob("out*"))
