# SPDX-License-Identifier: MIT
"""Ladders: the stages of a recipe from the stem up, and what the folders of their runs say about each.

`ladder_run.py` walks them, `ladder_table.py` prints them. Every stage trains in `<outdir>/<ladder>/<stage>`, on
best_model.safetensors of the stage below.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.config import ConfigError, TrainConfig
from training.config_changes import compare_configs
from training.continuation import BEST_MODEL, read_progress
from training.presets import PRESETS


@dataclass(frozen=True)
class Ladder:
    """Presets that stand on each other, the stem first."""

    name: str
    stages: tuple[str, ...]  # names in PRESETS

    def up_to(self, stage: str) -> Ladder:
        """The same ladder, ending at a stage."""
        return dataclasses.replace(self, stages=self.stages[: self.stages.index(stage) + 1])

    def above(self, resolution: int) -> Ladder:
        """The same ladder, without the stages whose images are at most so large."""
        return dataclasses.replace(
            self, stages=tuple(stage for stage in self.stages if stage_resolution(stage) > resolution)
        )


LADDERS = (
    Ladder("digits", ("digits-8", "digits-16")),
    Ladder("cifar10", ("cifar10-16", "cifar10-32")),
    Ladder("ffhq", tuple(f"ffhq-{side}" for side in (16, 32, 64, 128, 256, 512, 1024))),
    Ladder("imagenet", tuple(f"imagenet-{side}" for side in (16, 32, 64, 128, 256, 512, 1024))),
)
LADDER_NAMES = tuple(name for ladder in LADDERS for name in (ladder.name, *ladder.stages[1:]))


def find_ladder(name: str) -> Ladder:
    """The ladder of that name, or the part of one that ends at the stage of that name."""
    for ladder in LADDERS:
        if name == ladder.name:
            return ladder
        if name in ladder.stages:
            return ladder.up_to(name)
    raise ConfigError(f"--ladder {name} is not one of {', '.join(LADDER_NAMES)}")


def stage_resolution(stage: str) -> int:
    """Side of a stage's images, pixels."""
    return PRESETS[stage]().generator.img_resolution


@dataclass(frozen=True)
class StageState:
    """What the folder of a stage says."""

    kind: Literal["to do", "half done", "finished", "not needed"]  # not needed: a stage above it has finished
    cur_nimg: int = 0  # real images seen

    @property
    def is_over(self) -> bool:
        """True when there is nothing left to train."""
        return self.kind in ("finished", "not needed")

    def describe(self) -> str:
        """For people."""
        return f"half done, {self.cur_nimg / 1000:g} kimg" if self.kind == "half done" else self.kind


def stage_folder(outdir: str, ladder: Ladder, stage: str) -> Path:
    """Where a stage trains."""
    return Path(outdir) / ladder.name / stage


def read_states(outdir: str, ladder: Ladder) -> dict[str, StageState]:
    """State of every stage, from its folder. NetworkFileError for a damaged snapshot."""
    states = {}
    for stage in ladder.stages:
        total_kimg = PRESETS[stage]().total_kimg
        states[stage] = read_state(stage_folder(outdir, ladder, stage), total_kimg)
    finished = [index for index, state in enumerate(states.values()) if state.kind == "finished"]
    for stage in ladder.stages[: max(finished, default=0)]:
        if not states[stage].is_over:
            states[stage] = StageState("not needed", states[stage].cur_nimg)
    return states


def read_state(folder: Path, total_kimg: float) -> StageState:
    """State of one stage. A stage that has saved nothing has yet to start, whatever else its folder holds."""
    cur_nimg = read_progress(folder)
    if cur_nimg == 0:
        return StageState("to do")
    has_ended = cur_nimg >= total_kimg * 1000 and (folder / BEST_MODEL).exists()
    return StageState("finished" if has_ended else "half done", cur_nimg)


def check_unchanged(folder: Path, config: TrainConfig) -> None:
    """Raise ConfigError naming the first field that is not free and differs from the run in the folder, if any."""
    path = folder / "training_options.json"
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it, or move the folder away") from error
    for change in compare_configs(stored, config):
        if change.effect != "free":
            raise ConfigError(
                f"{folder} was trained with {change.name}={change.before}, and this command asks for {change.after}; "
                "use the same settings, or another --outdir"
            )
