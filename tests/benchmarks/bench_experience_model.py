"""What the experience model of the household is worth, beside copying the nearest neighbour and without its parts.

    python tests/benchmarks/bench_experience_model.py --folder /tmp/arms --worlds 600 --steps 5500 --short 800

Prepares data and the cloned policy once (preset cpu), trains the arms that are not on disk yet, and prints: the speed of 32
dreams in one batch; the model of `--steps` updates and the baseline on recorded steps and on the policy's own dreams, in rooms
that were never seen; and one table of arms of `--short` updates.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dreamgym.core.config import Config, load_config
from dreamgym.core.generators import TransformersGenerator
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.offline import Behaviour, record
from dreamgym.models.experience_sft import training_queries
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training.arm_loop import Prepared
from dreamgym.training.fidelity import on_policy
from dreamgym.training.rollout import RolloutConfig, rollout
from dreamgym.training.teacher_forced import CopyNearest, teacher_forced
from dreamgym.training.trainer import DreamGymTrainer, make_experience_model

ARMS: dict[str, dict[str, Any]] = {
    "preset": {},
    "without reasoning": {"reasoning_model.reasoning": False},
    "without retrieval": {"buffer.top_k": 0},
    "retrieval from all worlds": {"buffer.same_world": False},
    "with history": {"reasoning_model.history": 2},
}


def config_of(changes: dict[str, Any], steps: int, worlds: int) -> Config:
    """The cpu preset with some changes."""
    base = {"environment.data_dir": "generated", "training.use_tensorboard": False, "training.threads": 1}
    base |= {"reasoning_model.train_steps": steps, "environment.num_train_worlds": worlds}
    return load_config(None, "alfworld", "cpu", base | changes)


def trained(trainer: DreamGymTrainer, ready: Prepared, config: Config, home: Path) -> Any:
    """The experience model of a config, trained or read back, with a buffer of its own."""
    say = lambda line: print(f"  {home.name}: {line}", flush=True)  # noqa: E731
    place: Any = SimpleNamespace(config=config, env=trainer.env, device="cpu", say=say, client=None)
    buffer = ExperienceReplayBuffer(config.buffer, trainer.folder / "prepared" / "experience.db", dedup=False)
    return make_experience_model(place, replace(ready, buffer=buffer), home)


def batch_speed(model: Any, steps: list, n: int = 32, rounds: int = 4) -> float:
    """Time of n predictions one by one over that of one batch; medians of some rounds."""
    queries = training_queries(steps, model.config.history)
    ratios = []
    for i in range(rounds):
        chunk = queries[i * n : (i + 1) * n]
        began = time.perf_counter()
        model.predict(chunk)
        batched = time.perf_counter() - began
        began = time.perf_counter()
        for query in chunk:
            model.predict([query])
        ratios.append((time.perf_counter() - began) / batched)
    return sorted(ratios)[rounds // 2]


def measure(name: str, model: Any, env: Any, steps: list, policy: Any, tasks: list) -> None:
    """One line: recorded steps, then dreams."""
    s = teacher_forced(model, steps, env.verify, env.determined, name=name)
    dream = DreamEnv(model, min(64, len(tasks)), env.max_turns)
    settings = RolloutConfig(min(64, len(tasks)), source="dream")
    played = rollout(TransformersGenerator(policy.language_model), dream, tasks, policy.codec, settings, seed=1)
    h = on_policy(played, env.verify).hazard
    print(
        f"| {name} | {s.determined} | {s.facts} | {s.reward.precision} | {s.reward.recall} | {s.violating} | "
        f"{h.estimate.value:.4f} [{h.estimate.low:.4f}, {h.estimate.high:.4f}], {h.steps} steps |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="data and models, kept")
    parser.add_argument("--worlds", type=int, default=600)
    parser.add_argument("--steps", type=int, default=5500, help="updates of the model that meets the baseline; 0: none")
    parser.add_argument("--short", type=int, default=800, help="updates of the arms of the table; 0: no table")
    parser.add_argument("--games", type=int, default=300, help="recorded games in unseen rooms")
    parser.add_argument("--dreams", type=int, default=128)
    parser.add_argument("--base", type=int, default=2200, help="updates named in the run's own config")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    a = parser.parse_args()
    trainer = DreamGymTrainer(config_of({}, a.base, a.worlds), a.folder / "run", progress=print)
    ready, env = trainer.prepare(dream=False), trainer.env
    tasks = list(env.tasks("unseen")[: a.games])
    steps = [e for episode in record(env, tasks, Behaviour("noisy", 0.3), 1) for e in episode]
    firsts = {e.task_id: e.state for e in steps if e.turn == 0}
    dreamt = [replace(task, initial_state=firsts[task.id]) for task in tasks[: a.dreams]]
    print(
        f"{len(steps):,} recorded steps of {len(tasks)} games in rooms never seen; {ready.real_transitions:,} for training"
    )
    print(
        "| model | determined | changed facts F1 | reward precision | recall | violating | hazard |\n"
        + "|---" * 7
        + "|"
    )
    if a.steps:
        best = trained(trainer, ready, config_of({}, a.steps, a.worlds), a.folder / "models" / "preset-long")
        print(f"32 dreams in one batch: {batch_speed(best, steps):.1f} times the speed of one by one")
        measure(f"{a.steps} updates", best, env, steps, ready.policy, dreamt)
        measure("copy nearest", CopyNearest(best.buffer, env.mapper), env, steps, ready.policy, dreamt)
    for arm in a.arms if a.short else []:
        home = a.folder / "models" / arm.replace(" ", "-")
        model = trained(trainer, ready, config_of(ARMS[arm], a.short, a.worlds), home)
        measure(f"{arm}, {a.short} updates", model, env, steps[:1500], ready.policy, dreamt)


if __name__ == "__main__":
    main()
