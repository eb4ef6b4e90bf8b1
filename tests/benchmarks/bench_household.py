"""Steps per CPU-second of the household engine and of its batch environment, and the ratio to the official engine.

    python tests/benchmarks/bench_household.py [--seconds 3] [--official 1]

64 games at once in one process, random and expert actions. A step of the engine is the observation and the list of
admissible commands; a step of the batch environment adds the mapper's state and the `StepResult`. Expert actions are
planned beforehand, so that the expert's own time does not count; resets do count. The official engine is measured in
the same run, on one game of each size, where the extra `dreamgym[alfworld]` is installed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable

from dreamgym.core.errors import MissingExtra
from dreamgym.environments.alfworld import HouseholdEnv, OfficialEngine, engine_maker
from dreamgym.environments.household import HouseholdEngine
from dreamgym.environments.household_games import MAX_TURNS, export_game, game_of, household_tasks, solve
from dreamgym.environments.household_state import HouseholdMapper

SLOTS, ENGINE_TARGET, ENV_TARGET = 64, 40_000, 10_000


def rate(round_of_steps: Callable[[], int], seconds: float) -> float:
    """Steps per CPU-second; the first round warms up and is not counted."""
    round_of_steps()
    start, steps = time.process_time(), 0
    while time.process_time() - start < seconds:
        steps += round_of_steps()
    return steps / (time.process_time() - start)


def engine_random(engines: list, turns: int, rng: random.Random) -> int:
    """Every game from its start, `turns` random admissible commands; games start over when they are won."""
    lists = [(engine.reset(), engine.admissible_commands())[1] for engine in engines]
    for _ in range(turns):
        for i, engine in enumerate(engines):
            _, _, done = engine.step(lists[i][int(rng.random() * len(lists[i]))])
            if done:
                engine.reset()
            lists[i] = engine.admissible_commands()
    return turns * len(engines)


def engine_expert(engines: list, plans: list[tuple[str, ...]]) -> int:
    """Every game from its start by the expert's commands."""
    for engine, plan in zip(engines, plans, strict=True):
        engine.reset()
        for command in plan:
            engine.step(command)
            engine.admissible_commands()
    return sum(map(len, plans))


def env_round(
    env: HouseholdEnv, tasks: list, turns: int, plans: list[tuple[str, ...]] | None, rng: random.Random
) -> int:
    """All slots in lockstep, random actions or each slot's plan; finished slots are reset."""
    slots = list(range(SLOTS))
    results, at = env.reset(slots, tasks), [0] * SLOTS
    for _ in range(turns):
        if plans is None:
            actions = [rng.choice(r.admissible_actions or ["look"]) for r in results]
        else:
            actions = [plans[slot][at[slot]] for slot in slots]
        results = env.step(slots, actions)
        for slot in slots:
            at[slot] += 1
            if results[slot].done:
                results[slot], at[slot] = env.reset([slot], [tasks[slot]])[0], 0
    return turns * SLOTS


def show(what: str, value: float, target: int | None) -> bool:
    """One line of the table."""
    verdict = "" if target is None else f"   target {target:>7,}   {'ok' if value >= target else 'BELOW TARGET'}"
    sys.stdout.write(f"{what:<44} {value:>10,.0f} steps/CPU-s{verdict}\n")
    return target is None or value >= target


def official_rate(game, plan: tuple[str, ...], repeats: int) -> float:
    """Steps per CPU-second of the official engine on one game, loading not counted."""
    engine = OfficialEngine(export_game(game))
    start, steps = 0.0, 0
    for _ in range(repeats):
        engine.reset()
        start -= time.process_time()
        for command in plan:
            engine.step(command)
            engine.admissible_commands()
        start += time.process_time()
        steps += len(plan)
    return steps / start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU-seconds of each measurement")
    parser.add_argument("--official", type=int, default=2, help="episodes on the official engine")
    args = parser.parse_args()
    good, rng, rates = True, random.Random(0), {}
    for size in ("small", "full"):
        tasks = household_tasks("train", SLOTS, size)
        games = [game_of(task) for task in tasks]
        engines, plans = [HouseholdEngine(game) for game in games], [solve(game, 99, explore=True) for game in games]
        turns = MAX_TURNS[size]
        for policy in ("random", "expert"):

            def run(policy=policy, engines=engines, plans=plans, turns=turns):
                return engine_random(engines, turns, rng) if policy == "random" else engine_expert(engines, plans)

            rates[size, policy] = rate(run, args.seconds)
            good &= show(f"{size:<5} engine + admissible list, {policy}", rates[size, policy], ENGINE_TARGET)
        for mapper in (None, HouseholdMapper()):
            for policy in ("random", "expert"):
                env = HouseholdEnv(SLOTS, engine_maker(None), turns, mapper)
                commands = plans if policy == "expert" else None
                value = rate(lambda: env_round(env, tasks, turns, commands, rng), args.seconds)
                with_mapper = "with mapper" if mapper else "no mapper"
                good &= show(f"{size:<5} BatchEnv, {with_mapper}, {policy}", value, ENV_TARGET)
    try:
        sizes = {size: game_of(household_tasks("train", 2, size)[1]) for size in ("small", "full")}
        for size, game in sizes.items():
            value = official_rate(game, solve(game, 99, explore=True), args.official)
            show(f"{size:<5} official engine, expert", value, None)
            sys.stdout.write(f"{'':<6}ratio {rates[size, 'expert'] / value:,.0f}\n")
    except MissingExtra as error:
        sys.stdout.write(f"official engine: skipped ({error})\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
