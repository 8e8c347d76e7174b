# SPDX-License-Identifier: MIT
"""What the benchmark prints, and what it writes as JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from training.benchmark.floor import Ceilings, PhaseWork
from training.benchmark.measure import Comparison, Machine
from training.benchmark.phases import PHASES, PhaseReport
from training.text_table import align_columns

TITLES = {
    "forward": "G forward",
    "backward": "G forward + backward",
    "step": "training iteration",
    "sampling": "sampling for a metric",
}
METRIC_IMAGES = 50_000  # of the usual metrics


def describe_machine(machine: Machine) -> dict[str, Any]:
    """What numbers depend on beside the code: JSON values."""
    on_gpu = machine.device == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "threads": machine.threads or torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "ops": machine.ops,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def processor_name() -> str:
    """Of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def comparison_table(rows: Sequence[Comparison]) -> str:
    """A line for each row; a side that ran out of memory has dashes."""
    lines = [
        ["recipe", "work", "batch", "width", "s/image ours", "naive", "ratio", "images/s", "GiB ours", "naive",
         "ratio", "difference", ""]
    ]  # fmt: skip
    for row in rows:
        ours, naive = row.timings.get("ours"), row.timings.get("naive")
        cells = [row.recipe, TITLES[row.row], str(row.batch_size), f"{row.width:g}"]
        cells += [f"{side.median:.4g}" if side else "-" for side in (ours, naive)]
        cells.append(f"{naive.median / ours.median:.2f}x" if ours and naive else "-")
        cells.append(f"{1 / ours.median:.4g}" if ours else "-")
        cells += [f"{side.peak_bytes / 2**30:.2f}" if side else "-" for side in (ours, naive)]
        cells.append(f"{ours.peak_bytes / naive.peak_bytes:.2f}x" if ours and naive else "-")
        cells.append(f"{max(row.differences.values()):.1g}" if row.differences else "-")
        cells.append("same" if row.agrees else "DIFFERENT" if row.differences else "out of memory")
        lines.append(cells)
    notes = [
        f"{row.recipe}: {METRIC_IMAGES} images take ours {row.timings['ours'].median * METRIC_IMAGES / 3600:.2f} h"
        for row in rows
        if row.row == "sampling" and "ours" in row.timings
    ]
    notes += [
        f"{row.recipe}, {TITLES[row.row]}: {describe_differences(row)}" for row in rows if not row.agrees
    ]
    return "\n".join([align_columns(lines, num_left=2), *notes])


def describe_row(row: Comparison) -> str:
    """One line: what ran, the median of each side in seconds per image, and all repetitions behind it."""
    sides = [
        f"{side} {timing.median:.4g} s/image ({', '.join(f'{s:.4g}' for s in timing.seconds)})"
        for side, timing in row.timings.items()
    ]
    return f"{row.recipe}, {TITLES[row.row]}: {', '.join(sides) or 'out of memory'}"


def describe_differences(row: Comparison) -> str:
    """Each kind of result, how far it is off, and how far it may be."""
    if not row.differences:
        return "no results to compare"
    return ", ".join(f"{k} {d:.2g} (at most {row.tolerances[k]:g})" for k, d in row.differences.items())


def phase_table(report: PhaseReport, works: dict[str, PhaseWork], ceilings: Ceilings) -> str:
    """Milliseconds and share of each phase of an iteration, with the least that each could take."""
    total = sum(report.seconds.values())
    lines = [["phase", "ms", "share", "GFLOP", "MB", "floor ms", "of the time"]]
    floors = {name: work.seconds(ceilings) for name, work in works.items()}
    for name in PHASES:
        seconds, work = report.seconds[name], works.get(name)
        cells = [name, f"{1000 * seconds:.1f}", f"{seconds / total:.1%}"]
        if work is not None:
            cells += [
                f"{(work.full.flops + work.half.flops) / 1e9:.3g}",
                f"{(work.full.bytes + work.half.bytes) / 1e6:.3g}",
                f"{1000 * floors[name]:.1f}",
                f"{floors[name] / seconds:.0%}" if seconds else "-",
            ]
        lines.append(cells + ["-"] * (len(lines[0]) - len(cells)))
    floor = sum(floors.values())
    lines.append(
        ["iteration", f"{1000 * total:.1f}", "", "", "", f"{1000 * floor:.1f}", f"{floor / total:.0%}"]
    )
    return "\n".join(
        [
            align_columns(lines),
            f"Ceilings: {ceilings.flops_per_s / 1e9:.0f} GFLOP/s (float32), {ceilings.half_flops_per_s / 1e9:.0f} "
            f"(half), {ceilings.bytes_per_s / 1e9:.1f} GB/s copied.",
            f"The data loader alone delivers {report.loader_images_per_s:.0f} images/s; "
            f"an iteration takes {report.batch_size / total:.3g}.",
        ]
    )


def to_json_value(value: Any) -> Any:
    """Dataclasses as dictionaries, whatever they are in; derived values that readers want are added."""
    if isinstance(value, Comparison):
        return dataclasses.asdict(value) | {"agrees": value.agrees}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    return value
