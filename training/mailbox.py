# SPDX-License-Identifier: MIT
"""What ranks write to each other about their health, in the store that torchrun or `train.py --gpus` keeps.

Each process has a connection of its own here: torch's is blocked while the main thread waits in it. Methods raise
RuntimeError when the store is out of reach.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from torch_utils.process_environment import ProcessEnvironment
from training.peer_report import Beat

CONTACT_S = 15.0  # an answer may take so long
_ABSENT = "none"


@dataclass(frozen=True)
class Failure:
    """Why the run ends."""

    rank: int  # whose fault it is
    host: str  # its machine
    message: str  # one line
    reporter: int  # who found out
    is_common: bool = False  # every rank is expected to say the same by itself, such as a wrong flag

    def describe(self) -> str:
        """One line for people."""
        return f"Error: rank {self.rank} (host {self.host}): {self.message}"


class Mailbox:
    """Heartbeats of all ranks, and the first failure of any."""

    def __init__(self, environment: ProcessEnvironment) -> None:
        self.environment = environment
        self._lock = threading.Lock()  # one request at a time: the main thread reports failures
        self.connect()

    def connect(self) -> None:
        """Connect, or connect anew."""
        environment = self.environment
        store = dist.TCPStore(
            environment.master_addr,
            environment.master_port,
            is_master=False,
            timeout=timedelta(seconds=CONTACT_S),
            wait_for_workers=False,
        )
        # What an earlier attempt of the same launch left in the store must not be found.
        self._store = dist.PrefixStore(f"watchdog/{environment.attempt}/{environment.world_size}", store)
        self._store.compare_set("failure", "", _ABSENT)

    def expect(self, ranks: Iterable[int]) -> None:
        """Make their heartbeats readable before the first: reading waits for what is not there."""
        with self._lock:
            for rank in ranks:
                self._store.compare_set(f"beat/{rank}", "", _ABSENT)

    def send_beat(self, beat: Beat) -> None:
        """Replace this rank's heartbeat."""
        with self._lock:
            self._store.set(f"beat/{self.environment.rank}", beat.to_text())

    def read_beats(self, ranks: Sequence[int]) -> dict[int, Beat | None]:
        """The heartbeats of ranks that are expected; None before the first."""
        if not ranks:
            return {}
        with self._lock:
            texts = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat.from_text(text) for rank, text in zip(ranks, texts, strict=True)}

    def publish(self, failure: Failure) -> bool:
        """Say why the run ends. True unless somebody has said so before: the first failure is the cause."""
        text = json.dumps(asdict(failure))
        with self._lock:
            return self._store.compare_set("failure", _ABSENT, text).decode() == text

    def read_failure(self) -> Failure | None:
        """Why the run ends, if it does."""
        with self._lock:
            text = self._store.get("failure").decode()
        return None if text == _ABSENT else Failure(**json.loads(text))

    def raise_flag(self, name: str) -> None:
        """Set "shown" (rank 0 has shown the failure) or "suspicion" (a connection between ranks broke)."""
        with self._lock:
            self._store.set(name, "1")

    def has_flag(self, name: str) -> bool:
        """Whether any rank has raised it."""
        with self._lock:
            return self._store.check([name])
