# SPDX-License-Identifier: MIT
"""What the heartbeats of all ranks say: who is silent, who is behind, who is slow. Pure: no clock, no network.

A heartbeat is a short record that each rank replaces every second, see `watchdog.py`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

SLOW_RATIO = 1.5  # a rank is slow from so many times the median of the others


@dataclass(frozen=True)
class Limits:
    """When silence and standstill are spoken of, in seconds."""

    interval_s: float = 1.0  # between two heartbeats
    warn_silence_s: float = 10.0  # silent for so long: said once
    fail_silence_s: float = 60.0  # silent for so long: the run ends
    suspect_silence_s: float = 5.0  # the same once a connection between ranks has broken
    warn_stall_s: float = 300.0  # no iteration for so long, though nobody says why: who is behind is said


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself."""

    host: str  # name of its machine
    pid: int  # its process there
    count: int = 0  # heartbeats so far: a new value is a sign of life
    iteration: int = 0  # training iterations finished
    activity: str = "starting"  # what it does outside the iterations, which may take long; "" = training
    is_waiting: bool = False  # whether it is inside a collective operation
    where: str = ""  # innermost place in this project's code where its main thread is
    is_leaving: bool = False  # its end is orderly: no more heartbeats will come

    def to_text(self) -> str:
        """As it stands in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Beat | None:
        """The beat, or None before the first one."""
        return cls(**json.loads(text)) if text and text[:1] in ("{", b"{") else None


@dataclass
class Listener:
    """Counts how long each rank has been silent and the whole run at a standstill, in time that the listener saw pass.

    A listener that was paused itself must not take its own pause for the others' silence: hence no clock.
    """

    ranks: Sequence[int]  # those it listens to
    limits: Limits  # see there
    beats: dict[int, Beat] = field(default_factory=dict)  # the last one of each rank
    silence_s: dict[int, float] = field(default_factory=dict)  # since the last change
    stall_s: float = 0.0  # since the last progress of anybody
    warned: set[int] = field(default_factory=set)  # ranks whose silence has been spoken of

    def hear(self, beats: dict[int, Beat | None], elapsed_s: float) -> None:
        """Take in the beats as they are now, `elapsed_s` after the last ones."""
        has_progressed = False
        for rank in self.ranks:
            beat, last = beats.get(rank), self.beats.get(rank)
            if beat is not None and beat != last:
                has_progressed |= last is None or (beat.iteration, beat.activity) != (
                    last.iteration,
                    last.activity,
                )
                self.beats[rank], self.silence_s[rank] = beat, 0.0
            elif beat is not None:
                self.silence_s[rank] += elapsed_s
        is_explained = any(beat.activity for beat in self.beats.values())
        self.stall_s = 0.0 if has_progressed or is_explained else self.stall_s + elapsed_s

    def silent_ranks(self, seconds: float) -> list[int]:
        """Ranks that have not been heard for so long, apart from those that said they leave."""
        return [r for r, s in sorted(self.silence_s.items()) if s >= seconds and not self.beats[r].is_leaving]

    def describe_silence(self, rank: int) -> str:
        """ "rank 1 (host b, process 17) has not been heard for 12 s"."""
        beat = self.beats[rank]
        return f"rank {rank} (host {beat.host}, process {beat.pid}) has not been heard for {self.silence_s[rank]:.0f} s"

    def new_warnings(self) -> list[str]:
        """What is worth telling now and has not been told: silence, and its end."""
        lines = []
        for rank in self.silent_ranks(self.limits.warn_silence_s):
            if rank not in self.warned:
                self.warned.add(rank)
                lines.append(
                    f"{self.describe_silence(rank)}: paused, or its machine is overloaded or cut off; "
                    f"the run ends if this lasts {self.limits.fail_silence_s:g} s"
                )
        for rank in sorted(self.warned):
            if self.silence_s[rank] == 0:
                self.warned.discard(rank)
                lines.append(f"rank {rank} (host {self.beats[rank].host}) is heard again")
        return lines

    def stall_warning(self) -> str | None:
        """Who keeps the others waiting, each time a standstill has lasted warn_stall_s more; else None."""
        if self.stall_s < self.limits.warn_stall_s:
            return None
        self.stall_s = 0.0
        minutes = self.limits.warn_stall_s / 60
        return f"no progress for {minutes:.3g} min. {describe_standstill(self.beats)}"


def describe_standstill(beats: dict[int, Beat]) -> str:
    """Which ranks the others wait for: those at an earlier iteration, else those outside a collective operation."""
    first = min(beat.iteration for beat in beats.values())
    behind = [rank for rank, beat in sorted(beats.items()) if beat.iteration == first]
    if len(behind) == len(beats):
        behind = [rank for rank, beat in sorted(beats.items()) if not beat.is_waiting]
    if not behind or len(behind) == len(beats):
        return f"All ranks are at iteration {first}: " + _places(beats, list(beats))
    return "The others wait for " + _places(beats, behind)


def _places(beats: dict[int, Beat], ranks: list[int]) -> str:
    return "; ".join(
        f"rank {r} (host {beats[r].host}), iteration {beats[r].iteration}, in {beats[r].where or 'other code'}"
        for r in sorted(ranks)
    )


def slow_rank_message(busy_s: Sequence[float], hosts: Sequence[str]) -> str | None:
    """ "rank 3 (host b) takes 2.1 times as long as the median of the others", or None if nobody stands out.

    busy_s: seconds that each rank worked since the last call, waiting for others left out.
    """
    if len(busy_s) < 2:
        return None
    slowest = max(range(len(busy_s)), key=lambda r: busy_s[r])
    usual = statistics.median(s for r, s in enumerate(busy_s) if r != slowest)
    if usual <= 0 or busy_s[slowest] <= SLOW_RATIO * usual:
        return None
    return (
        f"rank {slowest} (host {hosts[slowest]}) takes {busy_s[slowest] / usual:.1f} times as long as the median of "
        "the others, which wait for it"
    )
