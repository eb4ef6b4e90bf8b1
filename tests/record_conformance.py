"""Records generated games through the official ALFWorld engine; the traces are what our engine is held to.

    pip install 'dreamgym[alfworld]'
    python tests/record_conformance.py tests/data/household_conformance.jsonl.xz

Each line is one game: id, task, its PDDL problem, and two traces (`rand`: random commands, some impossible; `walk`:
the exploring expert's). A row of a trace is [command, observation, admissible commands, reward, done, won]. It takes
about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
import time
from pathlib import Path

from dreamgym.environments.alfworld import OfficialEngine
from dreamgym.environments.household_files import Game
from dreamgym.environments.household_games import (
    MAX_TURNS,
    ROOM_BASE,
    TASK_TYPES,
    export_game,
    generate_game,
    problem_text,
    solve,
)

IMPOSSIBLE = ("fly", "go to moon 1", "take apple 1 from nowhere 1", "open", "Look", "go to  fridge 1", "use desklamp 9")


def row(engine: OfficialEngine, command: str | None, answer: tuple[str, float, bool]) -> list:
    """One recorded state."""
    observation, reward, done = answer
    return [command, observation, engine.admissible_commands(), reward, done, engine.won]


def random_command(rng: random.Random, possible: list[str]) -> str:
    """Mostly commands that change something; one in eight impossible."""
    if rng.random() < 0.125:
        return rng.choice(IMPOSSIBLE)
    doing = [c for c in possible if not c.startswith(("go to", "help", "look", "inventory", "close"))]
    return rng.choice(doing) if doing and rng.random() < 0.65 else rng.choice(possible)


def record(game: Game, size: str, rng: random.Random, turns: int) -> dict:
    """A random trace and an expert trace of one game."""
    engine = OfficialEngine(export_game(game))
    rand = [row(engine, None, (engine.reset(), 0.0, False))]
    for _ in range(turns):
        command = random_command(rng, engine.admissible_commands())
        rand.append(row(engine, command, engine.step(command)))
    walk = [row(engine, None, (engine.reset(), 0.0, False))]
    for command in solve(game, MAX_TURNS[size], explore=True) or game.walkthrough:
        walk.append(row(engine, command, engine.step(command)))
    assert engine.won, f"{game.id}: the expert's commands do not win in the official engine"
    return {"game": game.id, "task": game.task, "problem": problem_text(game), "rand": rand, "walk": walk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--games", type=int, default=108, help="half small, half full, all task types in turn")
    parser.add_argument("--turns", type=int, default=16, help="commands of a random trace")
    args = parser.parse_args()
    start, lines, splits = time.process_time(), [], list(ROOM_BASE)
    for n in range(args.games):
        size = ("small", "full")[n % 2]
        task_type = TASK_TYPES[n // 2 % len(TASK_TYPES)]
        game = generate_game(n, splits[n // 12 % len(splits)], size, task_type)
        lines.append(json.dumps(record(game, size, random.Random(n), args.turns)))
        print(f"{n + 1}/{args.games} {time.process_time() - start:.0f} CPU-s {game.id}", file=sys.stderr, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
