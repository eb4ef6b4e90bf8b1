"""What policies waste their turns on in household games: turns without effect, and why, of several policies in one run.

    python tests/benchmarks/bench_wasted_turns.py clone=RUN/prepared/policy_iter_0000.json last=RUN/…/policy_iter_0008.json

Each policy plays the first `--games` games of each split at temperature 1, or those from the number after an @ on
(`train@600`: training games that the preset has not cloned); official games where they are found.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import torch

from dreamgym.core.config import load_config
from dreamgym.core.data_structures import Turn
from dreamgym.environments.base_env import make_environment
from dreamgym.training.checkpoints import load_policy
from dreamgym.training.play import evaluate_policy


def room_of(state: str) -> tuple[str, dict[str, list[str]]]:
    """Where the agent stands, and each place with what is known to be there."""
    at, places = "", dict[str, list[str]]()
    for key, _, value in (line.partition(": ") for line in state.split("\n")):
        names = [name.strip() for name in value.split(",")]
        if key == "at":
            at = value
        elif key == "unseen":
            places |= {name: [] for name in names}
        elif re.fullmatch(r"[a-z]+ \d+", key):
            places[key] = names
    return at, places


def reason(turn: Turn) -> str:
    """Why a turn had no effect."""
    at, places = room_of(turn.state)
    if went := re.fullmatch(r"go to (.+)", turn.action or ""):
        return "goes where it stands" if went[1] == at else "no such place" if went[1] not in places else "goes, other"
    if took := re.fullmatch(r"take (.+) from (.+)", turn.action or ""):
        there = places.get(took[2], [])
        kinds = {name.split()[0] for name in there if name}
        known = took[2] == at and took[1] not in there
        return ("wrong number" if took[1].split()[0] in kinds else "not there") if known else "takes, other"
    return "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help="name=manifest of a checkpoint")
    parser.add_argument("--splits", default="train,valid")
    parser.add_argument("--games", type=int, default=200)
    parser.add_argument("--overrides", default="", help="dotted keys with values, such as environment.size=full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, "alfworld", "cpu", options.overrides or None)
    env = make_environment("alfworld", config.environment)
    for name, _, manifest in (text.partition("=") for text in options.policies):
        policy = load_policy(Path(manifest), mapper=env.mapper)
        for part in options.splits.split(","):
            split, _, first = part.partition("@")
            tasks = env.tasks(split)[int(first or 0) :][: options.games]
            found = evaluate_policy(policy, env, tasks, 1.0, section=config.policy_model)
            turns = [turn for game in found.trajectories for turn in game.turns]
            wasted = Counter(reason(turn) for turn in turns if not turn.valid)
            shares = ", ".join(f"{why} {count / len(turns):.3f}" for why, count in wasted.most_common())
            row = found.row()
            print(
                f"{name}, {part}: success {row['success']:.3f} of {row['n']}, {len(turns)} turns, "
                f"without effect {row['invalid_actions']:.3f}: {shares}",
                flush=True,
            )


if __name__ == "__main__":
    main()
