"""Hazard of the dream on small, full and official games: the cloned policy's own dreams, at equal training steps.

    python tests/benchmarks/bench_hazard.py --worlds 150 --steps 1500 --kinds small full --data-dir /path/to/games.tar.xz

Prints first violations per step at risk with standard errors, for worlds in the buffer and for worlds absent from it. On full and
official games the checker leaves open what hidden facts could decide, so the hazard there is a lower bound.
"""

from __future__ import annotations

import argparse
import tempfile

from dreamgym.core.config import load_config
from dreamgym.core.generators import TransformersGenerator
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.training.fidelity import on_policy
from dreamgym.training.play import dreamable
from dreamgym.training.rollout import RolloutConfig, rollout
from dreamgym.training.trainer import DreamGymTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=150)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--dreams", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=["small", "full"], choices=["small", "full", "official"])
    parser.add_argument("--data-dir", default="", help="official games, folder or archive (for official)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        settings = {
            "environment.data_dir": arguments.data_dir if kind == "official" else "generated",
            "environment.size": "small" if kind == "small" else "full",
            "environment.num_train_worlds": arguments.worlds,
            "reasoning_model.train_steps": arguments.steps,
            "reasoning_model.max_new_tokens": 64 if kind == "small" else 128,
            "policy_model.bc_demonstrations": 2 * arguments.worlds,
            "policy_model.bc_epochs": 6,
            "training.use_tensorboard": False,
            "training.seed": arguments.seed,
        }
        config = load_config(None, "alfworld", "cpu", settings)
        with tempfile.TemporaryDirectory() as folder:
            trainer = DreamGymTrainer(config, folder, progress=lambda line: None)
            ready = trainer.prepare()
            absent = dreamable(trainer.env, trainer.env.tasks("valid")[: arguments.dreams])
            for where, tasks in (("in the buffer", ready.tasks[: arguments.dreams]), ("absent", absent)):
                slots = min(64, len(tasks))
                dream = DreamEnv(ready.model, slots, trainer.env.max_turns)
                generator = TransformersGenerator(ready.policy.language_model)
                found = rollout(
                    generator, dream, tasks, ready.policy.codec, RolloutConfig(slots, source="dream"), seed=1
                )
                result = on_policy(found, trainer.env.verify)
                h = result.hazard
                print(
                    f"{trainer.env.name} {kind:8} worlds {where:13} hazard {h.value:.4f} (SE {h.se:.4f}),"
                    f" {h.violations} of {h.steps} steps, {h.dreams} dreams; real transitions {ready.real_transitions};"
                    f" {dict(result.kinds)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
