"""Steps per second in real browsers and in the dream, with the same policy on the same tasks.

    python tests/benchmarks/bench_webarena.py runs/webarena-ppo-cpu-seed0 --episodes 24

Takes a run of `run_experiment -p env webarena`, because a dream needs its trained experience model. Wall and CPU seconds
of all processes; browsers are started before the clock.
"""

import argparse
import json
import time
from pathlib import Path

import psutil

from dreamgym.core.config import load_config
from dreamgym.core.generators import TransformersGenerator
from dreamgym.environments.dream_env import DreamEnv
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--episodes", type=int, default=24)
    asked = parser.parse_args()
    config = load_config(asked.run / "config.yaml")
    trainer = DreamGymTrainer(config, asked.run)
    ready, section = trainer.prepare(), config.policy_model
    tasks = ready.tasks[: asked.episodes]
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


if __name__ == "__main__":
    main()
