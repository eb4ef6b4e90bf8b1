"""Kills a process that writes to a replay buffer, again and again: nothing acknowledged may be lost.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/kill_buffer.py [--kills 50]

One store lives through all kills. A writer appends batches of 64 rows and acknowledges each on its standard output; it
is killed with SIGKILL after a random time. Then: every acknowledged row is there, in order and whole; a batch is there
as a whole or not at all; SQLite finds no damage; and what was retrieved before the kill is retrieved after it, from the
rows that were there before.
"""

import argparse
import os
import random
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, RetrievalQuery

BATCH = 64
CONFIG = BufferConfig(capacity=1_000_000, top_k=4)


def row(number: int) -> Experience:
    """The row with this number; every writer would write the same."""
    state, place = f"state {number} at shelf {number % 97}", f"drawer {number % 13}"
    return Experience(state, f"open {place}", 0.0, f"{state} | {place}: pen {number % 7}", False, iteration=number)


def write(path: Path, pipe: int) -> None:
    """Appends for ever and says after each batch how many rows there are."""
    buffer = ExperienceReplayBuffer(CONFIG, path)
    while True:
        buffer.add_many([row(i) for i in range(len(buffer), len(buffer) + BATCH)])
        os.write(pipe, b"%d\n" % len(buffer))


def kill_once(path: Path, rng: random.Random) -> int:
    """Starts a writer, kills it, returns the rows it has acknowledged."""
    receiver, sender = os.pipe()
    if (writer := os.fork()) == 0:
        try:
            write(path, sender)
        finally:
            os._exit(1)
    os.close(sender)
    first = os.read(receiver, 4096)  # at least one batch
    time.sleep(rng.uniform(0, 0.1))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    said = first + b"".join(iter(lambda: os.read(receiver, 65536), b""))
    os.close(receiver)
    return int(said.split(b"\n")[-2])


def check(path: Path, acknowledged: int) -> int:
    """Asserts that the store is whole; returns its rows."""
    buffer = ExperienceReplayBuffer(CONFIG, path)
    n = len(buffer)
    assert n >= acknowledged and n % BATCH == 0, (n, acknowledged)
    assert buffer.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    states = [state for (state,) in buffer.db.execute("SELECT state FROM experiences ORDER BY id")]
    assert states == [row(i).state for i in range(n)]
    return n


def answers(path: Path, n: int, asked: list[int], copy: Path) -> list[list[Experience]]:
    """What a fresh copy of the store, stepped back to its first n rows, retrieves from the newest 1,000 of them."""
    copy.unlink(missing_ok=True)
    source, target = sqlite3.connect(path), sqlite3.connect(copy)
    source.backup(target)
    target.close()
    source.close()
    buffer = ExperienceReplayBuffer(CONFIG.model_copy(update={"capacity": 1000}), copy)
    buffer.rewind(n - 1)  # rows carry their number as iteration
    assert len(buffer) == n
    found = buffer.retrieve([RetrievalQuery(e.state, e.action) for e in map(row, asked)])
    buffer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    kills, rng, extra, n = parser.parse_args().kills, random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path, copy = Path(folder) / "experience.db", Path(folder) / "copy.db"
        for _ in range(kills):
            asked = [rng.randrange(n) for _ in range(8)] if n else []
            old, before = n, answers(path, n, asked, copy) if n else []
            acknowledged = kill_once(path, rng)
            n = check(path, acknowledged)
            extra += n - acknowledged
            assert n > old and (not old or answers(path, old, asked, copy) == before)
        print(f"{kills} kills, {n} rows at the end, 0 of the acknowledged lost, {extra} rows more than acknowledged")


if __name__ == "__main__":
    main()
