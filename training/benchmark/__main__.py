# SPDX-License-Identifier: MIT
"""Measure this code beside a naive form of the official one: `python -m training.benchmark`, docs/performance.md."""

from __future__ import annotations

import json
import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

# Read once, when torch loads its OpenMP library; see train.py. The processes that are measured inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import click
import torch
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from torch_utils.ops.choice import BACKENDS
from training.benchmark.floor import iteration_work, measure_ceilings
from training.benchmark.growth import run_growth
from training.benchmark.measure import Comparison, Machine, compare, start_process
from training.benchmark.phases import measure_phases
from training.benchmark.recipes import DEFAULT_RECIPES, HOST_WIDTHS, benchmark_config, default_batch
from training.benchmark.subjects import Row
from training.benchmark.tables import (
    comparison_table,
    describe_machine,
    describe_row,
    phase_table,
    to_json_value,
)
from training.config import FeaturePrecision, Precision, TrainConfig
from training.precision import check_precision
from training.presets import PRESETS
from training.sampling import pick_device

ROWS = (*get_args(Row), "phases")
SAMPLES_PER_BATCH = 2  # batches of "sampling"
GPU_SAMPLES = 256  # images of "sampling" on a GPU


def parse_list(allowed: tuple[str, ...]) -> Any:
    """A click callback for names divided by commas."""

    def parse(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if odd := [name for name in names if name not in allowed]:
            raise click.BadParameter(f"{odd[0]!r} is not one of {', '.join(allowed)}")
        if not names:
            raise click.BadParameter(f"name at least one of {', '.join(allowed)}")
        return names

    return parse


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--rows", default=",".join(ROWS), metavar="LIST", callback=parse_list(ROWS),
              help="What to measure")  # fmt: skip
@click.option("--recipes", default=",".join(DEFAULT_RECIPES), metavar="LIST", callback=parse_list(tuple(PRESETS)),
              help="Presets whose networks are measured")  # fmt: skip
@click.option("--quick", is_flag=True, help="Tiny networks: whether everything works, in seconds")
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Images in one pass  [default: 4, on a CPU 2 for imagenet-256, on a GPU 8]",
)
@click.option("--width", type=click.FloatRange(0, 4, min_open=True), metavar="FACTOR",
              help="Factor on G's channels  [default: 1; on a CPU 0.125 for imagenet-256]")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=2, help="Timed runs of each side, in turn")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="Of torch; 0 = as many as it takes by itself"
)
@click.option(
    "--ops", type=click.Choice(BACKENDS), default="auto", help="Implementation of the fused ops, on our side"
)
@click.option("--precision", type=click.Choice(get_args(Precision)), default="paper",
              help="Of our G, but for sampling; as train.py has it")  # fmt: skip
@click.option("--feature-precision", type=click.Choice(get_args(FeaturePrecision)), default="paper",
              help="Of our D's frozen networks; as train.py has it")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write everything here")  # fmt: skip
@click.option("--profile", "trace_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write a trace of one iteration of the first recipe, for chrome://tracing")  # fmt: skip
@click.option("--growth", "growth_dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Measure instead how cost grows with batch, resolution, classes, processes; plots")  # fmt: skip
def main(
    rows: tuple[str, ...],
    recipes: tuple[str, ...],
    quick: bool,
    batch: int | None,
    width: float | None,
    repeats: int,
    device: str,
    threads: int,
    ops: str,
    precision: Precision,
    feature_precision: FeaturePrecision,
    json_path: Path | None,
    trace_path: Path | None,
    growth_dir: Path | None,
) -> None:
    """Time this code beside a naive form of the official formulas, with the same weights and the same results.

    Both run in turn, each in a process of its own; feature networks have random weights, so nothing is downloaded.
    """
    try:
        machine = Machine(device=pick_device(device).type, threads=threads, ops=ops)
        if machine.device not in ("cpu", "cuda"):
            raise UserError(f"--device {machine.device} is not measured; use cpu or cuda")
        if trace_path is not None and "phases" not in rows:
            raise UserError("--profile traces what the phases are measured on; add phases to --rows")
        for option, path in (("--json", json_path), ("--profile", trace_path), ("--growth", growth_dir)):
            check_writable(option, path)
        report: dict[str, Any] = {"machine": describe_machine(machine)}
        click.echo(
            ", ".join(f"{key} {value}" for key, value in report["machine"].items() if value is not None)
        )
        if growth_dir is not None:
            report["growth"] = run_growth(growth_dir, machine, quick)
        else:
            defaults = HOST_WIDTHS if machine.device == "cpu" and not quick else {}
            widths = {name: width or defaults.get(name, 1.0) for name in recipes}
            batches = {name: batch or default_batch(name, machine.device, quick) for name in recipes}
            configs = {
                name: replace(
                    benchmark_config(name, batches[name], widths[name], quick),
                    precision=precision,
                    feature_precision=feature_precision,
                )
                for name in recipes
            }
            for config in configs.values():
                check_precision(config, torch.device(machine.device))
            report["table"] = run_table(configs, widths, rows, machine, repeats)
            report["phases"] = run_phases(configs, rows, machine, repeats, trace_path)
        if json_path is not None:
            with atomic_write(json_path) as temporary:
                temporary.write_text(json.dumps(to_json_value(report), indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        raise click.ClickException(str(error)) from error


def check_writable(option: str, path: Path | None) -> None:
    """Raise UserError, before anything is measured, if nothing can be written at a path; make its folder."""
    if path is None:
        return
    folder = path if option == "--growth" else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; choose another place") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: {folder} cannot be written to; choose another place")


def run_table(
    configs: dict[str, TrainConfig],
    widths: dict[str, float],
    rows: tuple[str, ...],
    machine: Machine,
    repeats: int,
) -> list[Comparison]:
    """Measure and print the table; each row also when it is there, as the next may take long."""
    cases = [(name, row) for name in configs for row in rows if row != "phases"]
    found = []
    for name, row in (progress := tqdm(cases, unit="row", disable=None if cases else True)):
        progress.set_description(f"{name} {row}")
        config = configs[name]
        num_samples = GPU_SAMPLES if machine.device == "cuda" else SAMPLES_PER_BATCH * config.batch_size
        found.append(compare(name, row, config, widths[name], machine, repeats, num_samples))
        progress.write(describe_row(found[-1]))
    if found:
        click.echo("\n" + comparison_table(found))
    return found


def run_phases(
    configs: dict[str, TrainConfig],
    rows: tuple[str, ...],
    machine: Machine,
    repeats: int,
    trace_path: Path | None,
) -> dict[str, Any]:
    """Measure and print the phases of our iteration, and its floor."""
    found: dict[str, Any] = {}
    for name, config in configs.items() if "phases" in rows else ():
        try:
            with start_process() as process:
                trace = None if found else trace_path
                phases = process.submit(measure_phases, config, machine, repeats, trace).result()
        except BrokenProcessPool:  # killed by the system
            click.echo(f"\n{name}: the phases were not measured, as memory ran out")
            continue
        with start_process() as process:
            ceilings = process.submit(measure_ceilings, config, machine).result()
        works = iteration_work(config, machine.device)
        found[name] = {"phases": phases, "floor": works, "ceilings": ceilings}
        click.echo(
            f"\n{name}: our iteration of {config.batch_size} images\n{phase_table(phases, works, ceilings)}"
        )
    if found and trace_path is not None:
        click.echo(f"\nWrote {trace_path}")
    return found


if __name__ == "__main__":
    main()
