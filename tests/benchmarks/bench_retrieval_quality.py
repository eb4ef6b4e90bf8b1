"""How often retrieved transitions have the same kind of outcome: P@8 of next-observation templates on official games.

Run: DREAMGYM_TEST_DATA=<folder with alfworld/conformance.jsonl.xz> python tests/benchmarks/bench_retrieval_quality.py

State is the previous observation, action the command. The template of an observation is its text with every entity
replaced by X and every list by LIST. Rows of the query's own trace are left out.
"""

import argparse
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np

from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience
from dreamgym.models.encoders import HashingEncoder
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, RetrievalQuery


def template(observation: str) -> str:
    text = re.sub(r"\b[a-z]+ \d+\b", "X", observation)
    return re.sub(r"(a X(, (and )?| and )?)+", "LIST", text)


def recorded_rows(path: Path) -> list[Experience]:
    rows = []
    with lzma.open(path, "rt") as file:
        for number, game in enumerate(map(json.loads, file)):
            for kind in ("rand", "walk"):
                for (_, state, *_), (action, after, *_) in zip(game[kind], game[kind][1:]):
                    rows.append(Experience(state, action, 0.0, after, False, episode_id=f"{kind} {number}"))
    return rows


def precision(rows: list[Experience], weight: float, dim: int, joined: bool = False, k: int = 8) -> tuple[float, int]:
    texts = [(f"{e.state}\n{e.action}" if joined else e.state, "x" if joined else e.action) for e in rows]
    buffer = ExperienceReplayBuffer(BufferConfig(same_world=False), encoder=HashingEncoder(dim), dedup=False)
    stored = [
        Experience(s, a, 0.0, e.next_state, False, episode_id=e.episode_id) for (s, a), e in zip(texts, rows) if s and a
    ]
    buffer.add_many(stored)
    queries = [RetrievalQuery(e.state, e.action, exclude_episode=e.episode_id) for e in stored]
    found = buffer.retrieve(queries, k, action_weight=0.0 if joined else weight)
    hits = [
        np.mean([template(d.next_state) == template(e.next_state) for d in demos]) for e, demos in zip(stored, found)
    ]
    return float(np.mean(hits)), len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("DREAMGYM_TEST_DATA", ""), help="folder of the test data")
    folder = parser.parse_args().data
    if not folder:
        parser.error("no test data: set $DREAMGYM_TEST_DATA or give --data")
    rows = recorded_rows(Path(folder) / "alfworld" / "conformance.jsonl.xz")
    for dim in (256, 1024):
        for name, weight in (("state only", 0.0), ("half and half", 0.5), ("action only", 1.0)):
            value, n = precision(rows, weight, dim)
            print(f"{dim:5} bins, {name:14} P@8 = {value:.3f} (n={n})")
        print(f"{dim:5} bins, one joined text P@8 = {precision(rows, 0.0, dim, joined=True)[0]:.3f}")


if __name__ == "__main__":
    main()
