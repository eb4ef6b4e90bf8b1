"""Speed of the replay buffer: appending, building the index, retrieval in one world and in all rows.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_replay_buffer.py [--rows 37000] [--worlds 600] [--dim 256]
     OMP_NUM_THREADS=1 python tests/benchmarks/bench_replay_buffer.py --many 1000000
"""

import argparse
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience
from dreamgym.models.encoders import HashingEncoder
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, RetrievalQuery

PLACES = [f"{kind} {i}" for kind in ("drawer", "cabinet", "shelf") for i in (1, 2, 3)] + ["fridge 1", "desk 1", "bed 1"]
THINGS = [f"{kind} {i}" for kind in ("mug", "pen", "book", "apple", "knife", "plate") for i in (1, 2)]


def random_rows(n: int, worlds: int, seed: int = 0) -> list[Experience]:
    """Walks over household-like states of about 40 words, spread evenly over worlds."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        world = len(rows) // 20 % worlds
        contents = {place: rng.choice(["?", "closed", "empty", rng.choice(THINGS)]) for place in PLACES}
        task = f"put {rng.choice(THINGS)} in {rng.choice(PLACES)}"
        for turn in range(20):
            place, action = rng.choice(PLACES), rng.choice(["go to", "open", "close", "take mug 1 from", "examine"])
            state = f"task {task} | at {place} | " + " | ".join(f"{p}: {c}" for p, c in contents.items())
            contents[place] = rng.choice(["empty", rng.choice(THINGS)])
            after = f"task {task} | at {place} | " + " | ".join(f"{p}: {c}" for p, c in contents.items())
            episode = f"e{len(rows) // 20}"
            row = Experience(state, f"{action} {place}", 0.0, after, False, env="bench", world_id=f"w{world}")
            rows.append(replace(row, episode_id=episode, turn=turn, instruction=task, success=rng.random() < 0.5))
    return rows[:n]


def seconds(function, *args, repeats: int = 1) -> float:
    """Seconds of this process for one call, the best of several; what else runs on the machine does not count."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function(*args)
        best = min(best, time.process_time() - start)
    return best


def batches(rows: list[Experience], size: int, n: int, seed: int) -> list[list[RetrievalQuery]]:
    """Random query batches; states are those of stored rows of the same world, actions are drawn apart."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        picked = [(rng.choice(rows), rng.choice(rows)) for _ in range(size)]
        out.append([RetrievalQuery(e.state, other.action, e.world_id, "bench", e.episode_id) for e, other in picked])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=37_000)
    parser.add_argument("--worlds", type=int, default=600)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--many", type=int, default=0, help="only open a store of so many rows, such as 1000000")
    args = parser.parse_args()
    if args.many:
        return bench_many(args.many)
    rows = random_rows(args.rows, args.worlds)
    with tempfile.TemporaryDirectory() as folder:
        config = BufferConfig(capacity=max(args.rows, 1000), top_k=args.k)
        buffer = ExperienceReplayBuffer(config, Path(folder) / "experience.db", encoder=HashingEncoder(args.dim))
        append = seconds(lambda: [buffer.add_many(rows[i : i + 64]) for i in range(0, len(rows), 64)])
        print(f"append, batches of 64        {len(rows) / append:12,.0f} rows/s   ({len(buffer)} stored)")
        first = RetrievalQuery(rows[0].state, rows[0].action, "w0", "bench")
        print(f"first retrieval (builds index) {seconds(buffer.retrieve, [first]):10.2f} s")
        for name, how in (("same world", {}), ("lookup (same world, same action)", {"lookup": True})):
            call = buffer.lookup if how else buffer.retrieve
            warm = batches(rows, 256, 20, seed=1)
            cold = seconds(lambda: [call(batch, args.k) for batch in warm])
            hot = seconds(lambda: [call(batch, args.k) for batch in warm], repeats=3)
            n = 256 * len(warm)
            print(f"{name}, 256 a batch: {n / cold:10,.0f} queries/s cold, {n / hot:10,.0f} repeated")
        batch = batches(rows, 256, 1, seed=2)[0]
        loop = seconds(lambda: [buffer.retrieve([q], args.k) for q in batch], repeats=3)
        together = seconds(buffer.retrieve, batch, args.k, repeats=3)
        print(f"same world, batch of 256 against one by one: {loop / together:.1f}x")
        batch = batch[:32]
        together = seconds(lambda: buffer.retrieve(batch, args.k, same_world=False), repeats=3)
        loop = seconds(lambda: [buffer.retrieve([q], args.k, same_world=False) for q in batch], repeats=3)
        print(f"all worlds, 32 queries: {together * 1000:.1f} ms; against one by one: {loop / together:.1f}x")
        print(f"peak memory {rss():.0f} MB")


def bench_many(n: int) -> None:
    """A store of n rows, copies of 2,000: how long it takes to open, and the first retrieval from its newest 1e5."""
    with tempfile.TemporaryDirectory() as folder:
        path, config = Path(folder) / "experience.db", BufferConfig(top_k=4)
        rows, buffer = random_rows(2000, 100), ExperienceReplayBuffer(BufferConfig(capacity=n), path, dedup=False)
        buffer.add_many(rows)
        names = [name for _, name, *_ in buffer.db.execute("PRAGMA table_info(experiences)") if name != "id"]
        values = ", ".join("id + 1000000" if name == "content" else name for name in names)
        while (have := buffer.db.execute("SELECT max(id) FROM experiences").fetchone()[0]) < n:  # doubled, and doubled
            copied = f"SELECT {values} FROM experiences WHERE id <= {n - have}"
            buffer.db.execute(f"INSERT INTO experiences ({', '.join(names)}) {copied}")
        buffer.close()
        print(f"{n:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        opened = seconds(ExperienceReplayBuffer, BufferConfig(capacity=n), path)
        again = seconds(ExperienceReplayBuffer, config, path, repeats=3)
        print(f"opening without the index {opened:.2f} s, again {again:.2f} s")
        buffer, before = ExperienceReplayBuffer(config, path), rss()
        query = RetrievalQuery(rows[0].state, rows[0].action, "w0")
        print(f"first retrieval from the newest {config.capacity:,}: {seconds(buffer.retrieve, [query]):.2f} s")
        print(f"memory {rss() - before:.0f} MB more than before it, {rss():.0f} MB in all")


def rss() -> float:
    """Largest memory of this process so far (MB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
