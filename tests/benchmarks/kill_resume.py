"""Kill -9 a training process at random points, resume until done, compare with an uninterrupted run bit by bit.

    python tests/benchmarks/kill_resume.py --points 50 --seed 0

The life that is cut short begins with the empty run folder: offline data, cloning and the experience model are hit too. Imports
are paid once: every attempt is a forked process of its own, killed with SIGKILL and waited for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "environment.data_dir": "generated",
    "environment.num_train_worlds": 4,
    "training.batch_size": 4,
    "training.num_iterations": 3,
    "training.validation_episodes": 2,
    "training.gap_episodes": 2,
    "reasoning_model.train_steps": 6,
    "training.use_tensorboard": False,
}


def live(folder: Path, settings: dict) -> None:
    """One life of a training process, from wherever the folder stands to the end."""
    from dreamgym.core.config import load_config
    from dreamgym.training.trainer import DreamGymTrainer

    trainer = DreamGymTrainer(load_config(None, "alfworld", "smoke", TINY | settings), folder, lambda line: None)
    trainer.fit(trainer.prepare(), "dream")


def attempt(folder: Path, settings: dict, kill_after: float | None) -> bool:
    """Forks a process that trains; kills it after so many seconds. Whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(folder, settings)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return ended(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return ended(os.waitpid(pid, 0)[1])


def ended(status: int) -> bool:
    """True at the end, False if killed. Raises RuntimeError for a process that failed by itself."""
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return True
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    raise RuntimeError(f"the training process failed by itself (status {status})")


def outcome(folder: Path, arm: str = "dream") -> dict[str, str]:
    """What a run is: its metrics but for times, its episodes, and the weights and optimiser of its last checkpoint."""
    home = folder / arm
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    last = max((home / "checkpoints").glob("policy_iter_*.json"))
    facts = json.loads(last.read_text())
    found = {"metrics": json.dumps(rows, sort_keys=True), "best": json.dumps(facts["best"])}
    found["episodes"] = hashlib.sha256((home / "episodes.jsonl").read_bytes()).hexdigest()
    names = ("model.safetensors", "value_head.safetensors", "optimizer.safetensors")
    return found | {name: facts["files"][name] for name in names}


def where(folder: Path) -> str:
    """How far a killed run had come."""
    metrics = folder / "dream" / "metrics.jsonl"
    if not (folder / "prepared" / "counts.json").is_file():
        return "preparing"
    if not metrics.is_file():
        return "experience model"
    return f"after {max(len(metrics.read_text().splitlines()) - 1, 0)} iterations"


def compare(points: int, seed: int, place: Path, settings: dict, say=print) -> int:
    """Kills and resumes `points` runs. Returns how many differ from the uninterrupted one."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers

    import dreamgym.training.trainer  # noqa: F401, paid once

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()
    assert attempt(place / "whole", settings, None)
    life, expected = time.monotonic() - began, outcome(place / "whole")
    say(f"uninterrupted: {life:.1f} s")
    chance, wrong, kills = random.Random(seed), 0, 0
    for point in range(points):
        folder, at, stops = place / f"run{point}", chance.uniform(0, life), []
        while not attempt(folder, settings, at):
            stops.append(where(folder))
            at = chance.uniform(0, life) if len(stops) < 3 else None  # a resumed run may be killed again
        found, kills = outcome(folder), kills + len(stops)
        different = [name for name in expected if found[name] != expected[name]]
        wrong += bool(different)
        say(f"{point + 1}: killed {', '.join(stops) or 'never (it was faster)'}; {different or 'equal'}")
    say(f"{points} runs, {kills} kills, {wrong} different")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--set", nargs="*", default=[], help="more settings, such as rl.algorithm=grpo")
    arguments = parser.parse_args()
    changes = dict(text.split("=", 1) for text in arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare(arguments.points, arguments.seed, Path(folder), changes) > 0)
