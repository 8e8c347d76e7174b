# SPDX-License-Identifier: MIT
"""One pass over images by one process and by two (gloo): equal results, in order; a thread that loads ahead.

This file is also the program that the two processes run.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from metrics import evaluate, feature_set
from metrics.evaluate import ImageSet, Options, Sources
from metrics.feature_set import Request, Selection, collect, first_items, random_items
from metrics.feature_stats import FeatureStats
from torch_utils.distributed import gather_to_main, rank
from torch_utils.errors import UserError

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2
NUM_IMAGES = 131  # two batches and a rest; odd
METRICS = ("fid50k_full", "kid50k_full", "pr50k3_full", "dc5_lite0", "is50k", "fid50k_per_class")
OTHERS = ("ppl2_wend", "eqt50k_int", "eqt50k_frac", "eqr50k")


class TinyOutputs(NamedTuple):
    features: torch.Tensor
    sfid: torch.Tensor
    probabilities: torch.Tensor


class TinyDetector:
    """Some pixels as features."""

    name = "tiny"
    fingerprint = "1"

    def __call__(self, images):
        return self.outputs(images).features

    def outputs(self, images):
        features = images.float()[:, :, ::9, ::7].flatten(1) / 255
        return TinyOutputs(features, features, (5 * features).softmax(dim=1))


class TinyLpips:
    fingerprint = "2"

    def distance(self, a, b):
        return (a - b).square().mean((1, 2, 3))


def image(item: int, kind: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * kind + int(item))
    return torch.randint(0, 256 - 40 * kind, (3, 32, 32), generator=generator, dtype=torch.uint8)


def real_images(items):
    return torch.stack([image(item, 0) for item in items])


def fake_images(items):
    return torch.stack([image(item, 1) for item in items])


def paths(items, epsilon):
    x = fake_images(items).float() / 127.5 - 1
    return x, x + epsilon * (1 + torch.from_numpy(items)[:, None, None, None])


def draw_moved(items, motion):
    return fake_images(items).float() / 127.5 - 1 + float(motion[0, 2])


def run_process(folder: Path) -> dict:
    """All metrics, as numbers; what one process sees."""
    evaluate.get_detector = lambda name, device, path: TinyDetector()
    evaluate.get_lpips = lambda device, path: TinyLpips()
    labels = np.arange(NUM_IMAGES) % 2
    reference = ImageSet(NUM_IMAGES, "abc", real_images, labels)
    sources = Sources(fake_images, lambda items: items % 2, paths, draw_moved)
    arguments = (reference, sources, "cpu", folder / "cache", Options(max_fakes=99))
    found = evaluate.evaluate([*METRICS, *OTHERS], *arguments)
    cached = evaluate.evaluate(METRICS, *arguments)
    assert all(cached[name] == found[name] for name in METRICS)
    numbers = {key: value for result in found.values() for key, value in result.results.items()}
    numbers |= found["fid50k_per_class"].details
    requests = [
        Request("tiny", "features", "rows", s) for s in (first_items(5), random_items(3, 100), first_items(1))
    ]
    rows = collect(requests, {"tiny": TinyDetector()}, real_images, "images")
    gathered = gather_to_main(torch.full((rank(), 3), rank()))
    try:
        evaluate.evaluate(["pr50k3_full"], *arguments[:4], Options(max_fakes=2))
    except UserError as error:
        refusal = str(error)
    return {
        "numbers": numbers,
        "rows": [rows.get(request) for request in requests],
        "gathered": [tuple(part.shape) for part in gathered],
        "refusal": refusal,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_detector", "get_lpips"):
            patch.setattr(evaluate, name, None)  # put back afterwards
        return run_process(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(r), str(folder)], env=environment)
        for r in range(NUM_PROCESSES)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * NUM_PROCESSES
    return [torch.load(folder / f"{r}.pt") for r in range(NUM_PROCESSES)]


def test_two_processes_give_the_numbers_of_one(alone, together):
    assert len(alone["numbers"]) == len(METRICS) + 3 + 1 + len(OTHERS) + 2
    for result in together:
        assert result["numbers"] == pytest.approx(alone["numbers"], rel=1e-9)


def test_rows_come_in_the_order_of_items_on_the_main_process(alone, together):
    expected = [
        TinyDetector()(real_images(s.items)) for s in (first_items(5), random_items(3, 100), first_items(1))
    ]
    for rows in (alone["rows"], together[0]["rows"]):
        for found, wanted in zip(rows, expected, strict=True):
            assert torch.equal(found, wanted)
    assert together[1]["rows"] == [None] * 3


def test_gathering_tensors_of_different_sizes(alone, together):
    assert alone["gathered"] == [(0, 3)]
    assert [r["gathered"] for r in together] == [[(0, 3), (1, 3)], []]


def test_an_error_of_the_main_process_is_raised_by_all(alone, together):
    assert "2 images have no 3 neighbours" in alone["refusal"]
    assert [r["refusal"] for r in together] == [alone["refusal"]] * 2


def test_moments_and_rows_agree_and_every_image_is_loaded_once():
    seen = []

    def load(items):
        seen.extend(items.tolist())
        return real_images(items)

    selection = random_items(40, NUM_IMAGES)
    moments = Request("tiny", "features", "moments", selection)
    rows = Request("tiny", "sfid", "rows", first_items(70))
    found = collect([moments, rows, moments], {"tiny": TinyDetector()}, load, "images")
    assert seen == sorted({*range(70), *selection.items.tolist()})
    stats = FeatureStats()
    stats.append(TinyDetector()(real_images(selection.items)))
    assert found[moments].num_items == 40
    torch.testing.assert_close(found[moments].covariance(), stats.covariance())
    assert torch.equal(found[rows], TinyDetector()(real_images(range(70))))


def test_loading_ahead_is_done_by_one_thread_and_bounded(monkeypatch):
    monkeypatch.setattr(feature_set, "BATCH_SIZE", 2)
    loaded, taken, threads = [], [], set()

    class Watcher(TinyDetector):
        def __call__(self, images):
            taken.append(len(images))
            assert len(loaded) - len(taken) <= feature_set.PREFETCHED + 1
            return super().__call__(images)

    def load(items):
        threads.add(threading.current_thread())
        loaded.append(items)
        return real_images(items)

    request = Request("tiny", "features", "rows", first_items(41))
    found = collect([request], {"tiny": Watcher()}, load, "images", is_threaded=True)[request]
    assert torch.equal(found, TinyDetector()(real_images(range(41))))
    assert len(threads) == 1 and threading.main_thread() not in threads and len(taken) == 21


def test_what_a_selection_holds():
    selection = random_items(20, 100)
    items = np.array([99, 0, *selection.items[[3, 0, 19]], 1000, 57])
    np.testing.assert_array_equal(selection.holds(items), np.isin(items, selection.items))
    assert selection.holds(selection.items).all() and not Selection("none", np.zeros(0)).holds(items).any()


def test_selections():
    assert random_items(5, 5) == first_items(5) and len(random_items(9, 5)) == 5
    chosen = random_items(20, 100)
    assert len(np.unique(chosen.items)) == 20 and (np.diff(chosen.items) > 0).all()
    assert chosen == Selection(chosen.name, np.zeros(0)) and chosen != random_items(20, 100, seed=1)
    assert collect([], {}, real_images, "images") == {}


if __name__ == "__main__":
    process_rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process_rank, world_size=NUM_PROCESSES
    )
    torch.save(run_process(folder), folder / f"{process_rank}.pt")
    dist.destroy_process_group()
