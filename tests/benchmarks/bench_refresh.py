"""What a refresh does to the dream of a finished run, as it is and as it was: two in one run, on the same tasks.

    python tests/benchmarks/bench_refresh.py runs/alfworld-ppo-cpu-seed0 --dreams 384

The last policy of the dream arm plays `--games` real games; each refresh trains a copy of the experience model on them. The
policy then dreams the same tasks in each copy. Printed: first-violation hazard with its standard error, WM2Real, and ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from dreamgym.core.config import load_config
from dreamgym.core.generators import TransformersGenerator
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.offline import experiences_of
from dreamgym.training.arm_loop import Prepared
from dreamgym.training.checkpoints import load_policy, manifest_name, newest_checkpoint
from dreamgym.training.fidelity import on_policy, wm2real
from dreamgym.training.fine_tuning import own_copy, refresh
from dreamgym.training.play import evaluate_policy, play_settings
from dreamgym.training.policy import Policy
from dreamgym.training.rollout import rollout
from dreamgym.training.trainer import DreamGymTrainer

REFRESHES: dict[str, dict[str, float]] = {
    "as it is": {},
    "as it was": {"replay": 1.0, "start": 0.2},
    "calmer": {"replay": 1.0, "start": 0.05},
    "more replay": {"replay": 8.0, "start": 0.2},
}


def dreamt(model: Any, policy: Policy, ready: Prepared, section: Any, tasks: list[Any]) -> tuple[float, str]:
    """Hazard of the policy's dreams, and a line about them."""
    torch.manual_seed(0)
    env = DreamEnv(model, min(128, len(tasks)), ready.env.max_turns, seed=0)
    settings = play_settings(section, min(128, len(tasks)), temperature=1.0, source="dream")
    dreams = rollout(TransformersGenerator(policy.language_model), env, tasks, policy.codec, settings)
    assert ready.env.verify is not None
    hazard, real = on_policy(dreams, ready.env.verify).hazard, wm2real(dreams, ready.env).success
    return hazard.value, f"hazard {hazard.value:.4f} ± {hazard.se:.4f}, WM2Real {real.value:.3f} of {real.n} won dreams"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run with a dream arm")
    parser.add_argument("--games", type=int, default=32, help="real games of a refresh")
    parser.add_argument("--dreams", type=int, default=384, help="tasks to dream afterwards")
    parser.add_argument("--steps", type=int, default=200, help="updates of a refresh")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = DreamGymTrainer(load_config(options.run / "config.yaml"), options.run)
    ready, config = trainer.prepare(), trainer.config
    checkpoints = options.run / "dream" / "checkpoints"
    found = newest_checkpoint(checkpoints)
    if found is None:
        raise SystemExit(f"{checkpoints}: expected checkpoints of a dream arm, found none")
    policy = load_policy(checkpoints / manifest_name(found[1]["iteration"]), mapper=ready.env.mapper)
    order = torch.randperm(len(ready.tasks), generator=torch.Generator().manual_seed(1)).tolist()
    tasks = [ready.tasks[i] for i in order[: options.games + options.dreams]]
    section = config.policy_model
    played = evaluate_policy(policy, ready.env, tasks[: options.games], 1.0, 5, section=section).trajectories
    fresh = [e for game in played for e in experiences_of(game, ready.env, "rl", 1)]
    before, line = dreamt(ready.model, policy, ready, section, tasks[options.games :])
    print(f"{'none':12} {line}", flush=True)
    for name, how in REFRESHES.items():
        with tempfile.TemporaryDirectory() as place:
            own: Any = own_copy(ready.model, Path(place) / "experience.db")  # type: ignore[arg-type]
            steps = options.steps
            done = refresh(own, own.client.language_model, fresh, config.reasoning_model, steps, seed=1, **how)
            hazard, line = dreamt(own, policy, ready, section, tasks[options.games :])
        ratio = f"{hazard / before:.2f} of none" if before else "–"
        print(f"{name:12} {line}; {ratio}; {done.replayed} old rows, loss {done.loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
