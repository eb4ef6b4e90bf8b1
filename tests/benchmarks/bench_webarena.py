"""Steps per second in real browsers and in the dream, with the same policy on the same tasks; and what the tasks pay for.

    python tests/benchmarks/bench_webarena.py runs/webarena-ppo-cpu-seed0 --episodes 24
    python tests/benchmarks/bench_webarena.py --gold 72

The first takes a run of `run_experiment -p env webarena`, because a dream needs its trained experience model. Wall and CPU
seconds of all processes; browsers are started before the clock. The second plays held-out generated tasks: with the
scripted solution, with actions that do nothing, and with an answer that is never right.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil

from dreamgym.core.config import load_config
from dreamgym.core.generators import TransformersGenerator
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.offline import record
from dreamgym.training.play import evaluate_policy, play_settings
from dreamgym.training.rollout import rollout
from dreamgym.training.trainer import DreamGymTrainer


def cpu_seconds() -> float:
    """Of this process and its children."""
    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True)) if p.is_running()]
    return sum(t.user + t.system for t in times)


def measured(play) -> dict[str, float]:
    """Turns per second of what `play()` returns."""
    wall, cpu = time.monotonic(), cpu_seconds()
    trajectories = play()
    wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
    turns = sum(len(t.turns) for t in trajectories)
    aborted = sum(t.aborted is not None for t in trajectories)
    row = {
        "episodes": len(trajectories),
        "turns": turns,
        "aborted": aborted,
        "seconds": round(wall, 1),
        "cpu": round(cpu, 1),
    }
    return row | {"turns_per_second": round(turns / wall, 2), "turns_per_cpu_second": round(turns / cpu, 2)}


def speeds(run: Path, episodes: int) -> None:
    """Browser and dream, one after the other."""
    config = load_config(run / "config.yaml")
    trainer = DreamGymTrainer(config, run)
    ready, section = trainer.prepare(), config.policy_model
    tasks = ready.tasks[:episodes]
    evaluate_policy(ready.policy, ready.env, tasks[:2], section=section)
    real = measured(lambda: evaluate_policy(ready.policy, ready.env, tasks, section=section).trajectories)
    slots = min(128, len(tasks) * 5)
    dream = DreamEnv(ready.model, slots, ready.env.max_turns)
    settings = play_settings(section, slots, source="dream")
    generator = TransformersGenerator(ready.policy.language_model)
    dreamt = measured(lambda: rollout(generator, dream, tasks * 5, ready.policy.codec, settings, seed=0))
    rows = {"browser": real | {"browsers": config.environment.browsers}, "dream": dreamt | {"slots": slots}}
    print(json.dumps(rows, indent=1))
    for unit in ("turns_per_second", "turns_per_cpu_second"):
        print(f"dream / browser, {unit}: {dreamt[unit] / real[unit]:.1f}")


def payments(count: int, idle_turns: int = 4) -> None:
    """What held-out tasks pay for the right way, for nothing, and for a wrong answer."""
    config = load_config(env="webarena", overrides=["environment.data_dir=generated"]).environment
    world = make_environment("webarena", config)
    brief = make_environment("webarena", config.model_copy(update={"max_episode_steps": idle_turns}))
    idle, wrong = ((lambda batch, slot, seed, act=act: act) for act in ("noop(0)", "answer done"))
    ways = {"gold": world, "no-op": replace(brief, expert=idle), "wrong answer": replace(brief, expert=wrong)}
    tasks = world.tasks("unseen")[:count]
    print(
        f"{len(tasks)} tasks of {len({t.task_type for t in tasks})} kinds:", Counter(t.metadata["site"] for t in tasks)
    )
    for name, env in ways.items():
        start = time.monotonic()
        episodes = record(env, tasks)
        rows = [row for episode in episodes for row in episode]
        won, paid = sum(bool(episode[-1].success) for episode in episodes), sum(row.reward for row in rows)
        seconds = time.monotonic() - start
        print(f"{name}: {won} of {len(episodes)} won, reward {paid:g}, {len(rows)} transitions, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--gold", type=int, default=0, help="held-out tasks; 0: none")
    asked = parser.parse_args()
    if asked.run:
        speeds(asked.run, asked.episodes)
    if asked.gold:
        payments(asked.gold)
    if not asked.run and not asked.gold:
        parser.error("name the folder of a run, or a number of tasks with --gold")


if __name__ == "__main__":
    main()
