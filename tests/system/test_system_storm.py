"""Many readers at once while sockets are cut and runners, extractors and readers killed: every row once, each time.

A run is a reader with a plan made from its seed: its connections are reset after some bytes, or it is a process that is
killed at some row and started again. Meanwhile its servers are killed, too. HEADRACE_STORM_RUNS is the number of runs
(in rounds of twelve), HEADRACE_STORM_SEED the first seed.
"""

# ruff: noqa: T201 -- the long runs are made for their figures

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from fix_relay import Relay
from fix_system import HOOKPOINT, MODEL, PATIENCE_S, SLOW, read, texts
from headrace_client import HeadraceClient
from headrace_client.values import PROVENANCE_COLUMNS, ExtractionState, Retain, Window

pytestmark = [pytest.mark.fault, pytest.mark.timeout(400)]

READERS = 12
EXTRACTIONS = 4  # The last is a WINDOW with one reader; the others are RETAIN and share the other readers.
DOCUMENTS = texts(250, seed=5, longest=8)
N_RUNS = int(os.environ.get("HEADRACE_STORM_RUNS", "24"))
FIRST_SEED = int(os.environ.get("HEADRACE_STORM_SEED", "1"))
WINDOW = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)


@dataclass(frozen=True)
class Plan:
    """The disturbances of one reader."""

    seed: int
    transport: str
    cuts: tuple[int, ...]  # Bytes after which a connection is reset.
    kills: tuple[float, ...]  # Shares of the rows at which the reader, then a process, is killed.
    pause_s: float  # Pause after each chunk.

    @classmethod
    def of(cls, seed: int) -> Plan:
        dice = random.Random(seed)
        transport = dice.choice(["inline", "inline", "auto"])
        # A mapped stream carries a few hundred bytes, an inline one half a megabyte.
        most_bytes = 300_000 if transport == "inline" else 900
        cuts = tuple(dice.randrange(10, most_bytes) for _ in range(dice.randint(1, 3)))
        kills = sorted(dice.uniform(0.05, 0.9) for _ in range(dice.randint(1, 2)))
        is_process = dice.random() < 0.25
        return cls(
            seed, transport, () if is_process else cuts, tuple(kills) if is_process else (), dice.choice([0, 0.01])
        )


@pytest.fixture(scope="module")
def quiet(fragile):
    """The digests of an undisturbed run."""
    return read(fragile.client, start(fragile, Retain()))


def start(system, retention):
    corpus = system.variant(DOCUMENTS)
    return system.client.extractions.start(MODEL, corpus, HOOKPOINT, recipe=SLOW, retention=retention)


@pytest.mark.parametrize("number", range(-(-N_RUNS // READERS)))
def test_every_reader_has_every_row_once(fragile, supervisor, quiet, tmp_path, number):
    plans = [Plan.of(FIRST_SEED + number * READERS + at) for at in range(READERS)]
    dice = random.Random(plans[0].seed)
    extractions = [start(fragile, Retain()) for _ in range(EXTRACTIONS - 1)] + [start(fragile, WINDOW)]
    readers = [
        Reader(plan, fragile.extractor.address, extractions[-1 if at == 0 else at % (EXTRACTIONS - 1)], tmp_path)
        for at, plan in enumerate(plans)
    ]
    over = threading.Event()
    n_kills = []
    killer = threading.Thread(target=lambda: n_kills.append(kill_servers(fragile, dice, over)))
    with ThreadPoolExecutor(READERS) as pool:
        reading = [pool.submit(reader.run, int(quiet["n_rows"])) for reader in readers]
        killer.start()
        try:
            found = [each.result(timeout=3 * PATIENCE_S) for each in reading]
        finally:
            over.set()
            killer.join(PATIENCE_S)
    supervisor.join()

    for reader, digests in zip(readers, found, strict=True):
        assert digests == quiet, reader.plan
        assert reader.n_disturbed >= len(reader.plan.kills), reader.plan
    n_cut = sum(reader.n_disturbed for reader in readers if not reader.plan.kills)
    print(
        f"\n{READERS} runs, {n_cut} cuts, {sum(len(plan.kills) for plan in plans)} readers killed, {n_kills[0]} servers"
    )
    states = [fragile.client.extractions.wait(each.id, deadline_s=PATIENCE_S).state for each in extractions]
    assert states == [ExtractionState.DONE] * EXTRACTIONS


def kill_servers(system, dice: random.Random, over: threading.Event) -> int:
    """Kills runner or extractor two or three times while there are readers; starts the extractor again."""
    n_killed = 0
    for _ in range(dice.randint(2, 3)):
        if over.wait(dice.uniform(0.3, 3.0)):
            break
        if dice.random() < 0.6:
            n_killed += len(system.runners())
            system.kill_runner()
        else:
            n_killed += 1
            system.kill_extractor()
            time.sleep(dice.uniform(0.1, 1.0))
            system.extractor.start()
    return n_killed


class Reader:
    """One run: a reader and its disturbances."""

    def __init__(self, plan: Plan, address: str, extraction, folder: Path) -> None:
        self.plan = plan
        self.n_disturbed = 0
        self._address = address
        self._extraction = extraction
        self._folder = folder / f"reader-{plan.seed}"

    def run(self, n_rows: int) -> dict[str, str]:
        """Reads to the end in spite of the disturbances; returns digests as `read` does."""
        return self._as_process(n_rows) if self.plan.kills else self._in_thread()

    def _in_thread(self) -> dict[str, str]:
        relay = Relay(self._address, self.plan.cuts)
        try:
            with HeadraceClient.connect(extractor=relay.address) as client:
                return read(
                    client,
                    self._extraction,
                    on_rows=lambda _: time.sleep(self.plan.pause_s),
                    transport=self.plan.transport,
                    queue_bytes=64 * 1024,
                    chunk_bytes=8192,
                    reconnect_deadline_s=2 * PATIENCE_S,
                )
        finally:
            self.n_disturbed = relay.n_cut
            relay.close()

    def _as_process(self, n_rows: int) -> dict[str, str]:
        for kill_at in (*(int(part * n_rows) for part in self.plan.kills), n_rows + 1):
            with self._process() as process:
                row = 0
                for line in process.stdout or ():
                    row = int(line)
                    if row >= kill_at:
                        process.kill()
                        self.n_disturbed += 1
                        break
                else:
                    assert process.wait(PATIENCE_S) == 0
                    assert row == n_rows
        return self._digests(n_rows)

    def _process(self) -> subprocess.Popen[str]:
        here = Path(__file__).with_name("storm_reader.py")
        arguments = [self._address, self._extraction.id, str(self._folder), self.plan.transport, str(self.plan.pause_s)]
        return subprocess.Popen([sys.executable, str(here), *arguments], stdout=subprocess.PIPE, text=True)

    def _digests(self, n_rows: int) -> dict[str, str]:
        columns = (*PROVENANCE_COLUMNS, HOOKPOINT)
        digests = {name: hashlib.sha256((self._folder / name).read_bytes()).hexdigest() for name in columns}
        return digests | {"n_rows": str(n_rows)}
