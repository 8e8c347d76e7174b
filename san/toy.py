# SPDX-License-Identifier: MIT
"""The paper's synthetic experiment as a program: GAN and SAN side by side on eight Gaussians on a ring.

    python -m san.toy

Writes table.md, results.json and figure.svg, and says whether the paper's claim holds in these runs: SAN covers all
modes, and its direction stays closer to the optimal one than the GAN's (SAN, arXiv:2301.12811).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from san.toy_figure import Runs, draw_figure
from san.toy_ring import Ring, sliced_wasserstein
from san.toy_training import ALL_OBJECTIVES, Settings, train

PAPER_OBJECTIVES = ("hinge", "saturating", "nonsaturating")
REQUIRED_COVERING = 0.8  # for the claim to hold, so large a share of the SANs must end with all modes, ...
# ... and the cosine be above the GANs' at this share of the measurements: the first may tie.
REQUIRED_LEADING = 0.95
SERIES = ("modes", "quality", "wasserstein", "cosine", "mean_difference", "in_order", "gap")
COLUMNS = (
    "objective",
    "",
    "modes covered",
    "all modes in",
    "high quality",
    "sliced W1",
    "mean cosine",
    "above GAN",
)


def main(args: Sequence[str] | None = None) -> None:
    """Command line: train, print the table and write the three files."""
    parser = make_parser()
    options = parser.parse_args(args)
    problem = find_problem(options)
    if problem:
        parser.error(problem)
    settings = Settings(
        ring=Ring(radius=options.radius, std=options.std),
        width=options.width,
        batch_size=options.batch,
        lr=options.lr,
        num_d_steps=options.d_steps,
        iterations=options.iterations,
        record_iterations=min(options.record_every, options.iterations),
        normalize_weights=options.weights == "normalized",
    )
    options.outdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    start = time.time()
    results: dict[str, Runs] = {}
    for name in dict.fromkeys(options.objectives):
        results[name] = run_objective(name, settings, seeds, options.device)
        write_results(options.outdir, results, settings, seeds, time.time() - start)  # what there is so far
    print((options.outdir / "table.md").read_text(encoding="utf-8"))
    print(
        f"Wrote table.md, results.json and figure.svg to {options.outdir} after {time.time() - start:.0f} s"
    )


def make_parser() -> argparse.ArgumentParser:
    """All flags, with the defaults of `Settings`."""
    parser = argparse.ArgumentParser(
        prog="python -m san.toy", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    defaults = Settings()
    add = parser.add_argument
    add(
        "--objectives",
        nargs="+",
        choices=list(ALL_OBJECTIVES),
        default=list(PAPER_OBJECTIVES),
        metavar="NAME",
        help=f"of {', '.join(ALL_OBJECTIVES)}; default: {' '.join(PAPER_OBJECTIVES)}",
    )
    add("--seeds", type=int, default=5, help="number of runs of each kind (default: %(default)s)")
    add("--first-seed", type=int, default=0, help="seed of the first of them (default: %(default)s)")
    add("--iterations", type=int, default=defaults.iterations, help="generator steps (default: %(default)s)")
    add(
        "--record-every",
        type=int,
        default=defaults.record_iterations,
        metavar="STEPS",
        help="generator steps between measurements (default: %(default)s)",
    )
    add("--radius", type=float, default=defaults.ring.radius, help="of the ring (default: %(default)s)")
    add("--std", type=float, default=defaults.ring.std, help="of each Gaussian (default: %(default)s)")
    add("--width", type=int, default=defaults.width, help="units of the hidden layers (default: %(default)s)")
    add("--batch", type=int, default=defaults.batch_size, help="samples per step (default: %(default)s)")
    add("--lr", type=float, default=defaults.lr, help="learning rate of G and D (default: %(default)s)")
    add(
        "--d-steps",
        type=int,
        default=defaults.num_d_steps,
        help="discriminator steps per generator step (default: %(default)s)",
    )
    add(
        "--weights",
        choices=("normalized", "plain"),
        default="normalized",
        help="r_J with mean 1, so that it makes probability measures, or as it is (default: %(default)s)",
    )
    add("--outdir", type=Path, default=Path("san-toy"), help="folder to write to (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    return parser


def find_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the values, in one line."""
    for name in ("seeds", "iterations", "record_every", "width", "batch", "d_steps", "threads"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1"
    for name in ("radius", "std", "lr"):
        if not 0 < getattr(options, name) < float("inf"):
            return f"--{name} {getattr(options, name)} is not a positive number"
    if not 0 <= options.first_seed < 2**63 - options.seeds:
        return f"--first-seed {options.first_seed} is negative or too large"
    if options.outdir.exists() and not options.outdir.is_dir():
        return f"--outdir {options.outdir} is a file: name a folder"
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {options.device} cannot be used: {str(error).splitlines()[0]}"
    return None


def run_objective(name: str, settings: Settings, seeds: Sequence[int], device: str) -> Runs:
    """Train one objective's runs, with the time left on standard error: {kind: measurements over time}."""
    runs: dict[str, list] = {}
    start = time.time()
    for records in train(name, settings, seeds, device):
        for kind, record in records.items():
            runs.setdefault(kind, []).append(record)
        done = record.iteration
        left = (settings.iterations - done) * (time.time() - start) / done if done else float("nan")
        end = "\n" if done == settings.iterations else ""
        print(
            f"\r{name}: {done} of {settings.iterations} steps, {left:.0f} s left   ",
            end=end,
            file=sys.stderr,
            flush=True,
        )
    return runs


def write_results(
    outdir: Path, results: Mapping[str, Runs], settings: Settings, seeds: Sequence[int], seconds: float
) -> None:
    """Write the three files."""
    numbers = {
        "settings": dataclasses.asdict(settings),
        "seeds": list(seeds),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "results": {name: make_series(runs) for name, runs in results.items()},
    }
    verdicts = "".join(f"{line}\n" for line in judge(results, settings.ring))
    write(outdir / "table.md", f"{make_table(results, settings)}\n{verdicts}")
    write(outdir / "results.json", json.dumps(numbers, indent=1) + "\n")
    write(outdir / "figure.svg", draw_figure(results, settings.ring, seeds[0]))


def make_series(runs: Runs) -> dict[str, dict[str, list]]:
    """Numbers over time for JSON: {kind: {"iteration": [...], measure: [[one per seed], ...]}}."""
    return {
        kind: {
            "iteration": [record.iteration for record in records],
            **{name: [getattr(record, name).tolist() for record in records] for name in SERIES},
        }
        for kind, records in runs.items()
    }


def mean_cosines(runs: Runs) -> dict[str, Tensor]:
    """Cosine of direction and optimal direction after the start, where all kinds agree: {kind: (times, seeds)}."""
    return {kind: torch.stack([record.cosine for record in records[1:]]) for kind, records in runs.items()}


def share_above(runs: Runs) -> tuple[int, int] | None:
    """At how many of how many times the SANs' mean cosine is above the GANs'; None without SANs."""
    if "SAN" not in runs:
        return None
    cosines = {kind: values.mean(1) for kind, values in mean_cosines(runs).items()}
    is_above = cosines["SAN"] > cosines["GAN"]
    return int(is_above.sum()), len(is_above)


def make_table(results: Mapping[str, Runs], settings: Settings) -> str:
    """Markdown: a row per objective and kind; mean and standard deviation over seeds at the end of training."""
    rows = []
    for name, runs in results.items():
        cosines, above = mean_cosines(runs), share_above(runs)
        for kind, records in runs.items():
            last = records[-1]
            covered = int((last.modes == settings.ring.num_modes).sum())
            rows.append(
                (
                    name,
                    kind,
                    spread(last.modes, 1),
                    f"{covered} of {len(last.modes)}",
                    spread(100 * last.quality, 0) + " %",
                    spread(last.wasserstein, 3),
                    spread(cosines[kind].mean(0), 2),
                    f"{above[0]} of {above[1]}" if kind == "SAN" and above else "",
                )
            )
    num = settings.num_final_samples
    same = sliced_wasserstein(*(settings.ring.sample(num, torch.Generator().manual_seed(i)) for i in (0, 1)))
    rows.append(("data", "", str(settings.ring.num_modes), "", "99 %", f"{same:.3f}", "", ""))
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    lines = [COLUMNS, tuple("-" * width for width in widths), *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def judge(results: Mapping[str, Runs], ring: Ring) -> list[str]:
    """One line per objective: whether the paper's claim holds in these runs."""
    lines = []
    for name, runs in results.items():
        above = share_above(runs)
        if above is None:
            lines.append(f"{name}: no SAN form, nothing to compare.")
            continue
        modes = runs["SAN"][-1].modes
        covered = int((modes == ring.num_modes).sum())
        covers = covered >= REQUIRED_COVERING * len(modes)
        leads = above[0] >= REQUIRED_LEADING * above[1]
        lines.append(
            f"{name}: SAN covers all {ring.num_modes} modes in {covered} of {len(modes)} seeds (claim "
            f"{'holds' if covers else 'does not hold'}); its direction is closer to the optimal one than the GAN's at "
            f"{above[0]} of {above[1]} measurements (claim {'holds' if leads else 'does not hold'})."
        )
    return lines


def spread(values: Tensor, digits: int) -> str:
    """Mean and standard deviation.

    >>> spread(torch.tensor([7.0, 8.0, 8.0]), 1)
    '7.7 ± 0.6'
    """
    deviation = values.std().item() if len(values) > 1 else 0.0
    return f"{values.mean().item():.{digits}f} ± {deviation:.{digits}f}"


def write(path: Path, text: str) -> None:
    """Write all of the file or nothing."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
