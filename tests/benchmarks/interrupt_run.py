"""Interrupt the notebook in the middle of RL, run the same command again, compare with an uninterrupted run.

    python tests/benchmarks/interrupt_run.py
    python tests/benchmarks/interrupt_run.py --after 1 --arm real --set training.parallel_control=true

The interrupt is what Ctrl-C sends: SIGINT to papermill's process group. Equal means: metrics of every arm but for times,
episodes, weights and optimiser of the last checkpoint, and the closing table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import outcome

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "environment.data_dir": "generated",
    "environment.num_train_worlds": 6,
    "training.batch_size": 8,
    "training.eval_episodes": 6,
    "training.validation_episodes": 4,
    "training.gap_episodes": 4,
    "reasoning_model.train_steps": 10,
    "training.use_tensorboard": "false",
}


def start(folder: Path, iterations: int, settings: dict[str, object]) -> subprocess.Popen:
    """Runs the notebook in a session of its own; its words go to `<folder>.log`."""
    parameters = {"preset": "smoke", "num_iterations": iterations, "out_dir": folder}
    parameters["overrides"] = " ".join(f"{key}={value}" for key, value in settings.items())
    command = [sys.executable, "-m", "papermill", "nbs/run_experiment.ipynb", f"{folder}.ipynb", "--log-output"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)


def wait_for_iteration(process: subprocess.Popen, metrics: Path, iteration: int) -> None:
    """Returns when a row of that iteration is written. Raises RuntimeError if the process ends before."""
    while not metrics.is_file() or metrics.read_text().count("\n") <= iteration:
        if process.poll() is not None:
            raise RuntimeError(f"the notebook ended with status {process.returncode} before iteration {iteration}")
        time.sleep(0.05)


def said(notebook: Path) -> str:
    """All that the cells of a stored notebook printed."""
    cells = json.loads(notebook.read_text())["cells"]
    return "".join("".join(output.get("text", [])) for cell in cells for output in cell.get("outputs", []))


def results(folder: Path) -> dict[str, object]:
    """What must not depend on an interruption."""
    arms = {f"{arm}: {key}": value for arm in ("dream", "real") for key, value in outcome(folder, arm).items()}
    return arms | json.loads((folder / "result.json").read_text())


def compare(after: int, arm: str, iterations: int, settings: dict[str, object], place: Path) -> list[str]:
    """Runs, interrupts, runs again. Returns the names of what differs from an uninterrupted run."""
    whole, stopped = place / "whole", place / "stopped"
    began = time.monotonic()
    assert start(whole, iterations, settings).wait() == 0, Path(f"{whole}.log").read_text()[-3000:]
    print(f"uninterrupted: {time.monotonic() - began:.0f} s", flush=True)
    process = start(stopped, iterations, settings)
    wait_for_iteration(process, stopped / arm / "metrics.jsonl", after)
    os.killpg(process.pid, signal.SIGINT)
    began, status = time.monotonic(), process.wait(timeout=60)
    rows = (stopped / arm / "metrics.jsonl").read_text().count("\n") - 1
    print(
        f"SIGINT in {arm} after {rows} of {iterations} iterations; ended with status {status} "
        f"in {time.monotonic() - began:.1f} s"
    )
    words = [line for line in said(Path(f"{stopped}.ipynb")).splitlines() if "stopped" in line]
    print(*words, sep="\n", flush=True)
    assert status != 0 and rows < iterations and any("the same command continues it" in line for line in words)
    assert start(stopped, iterations, settings).wait() == 0, Path(f"{stopped}.log").read_text()[-3000:]
    expected, found = results(whole), results(stopped)
    return [name for name in expected if found[name] != expected[name]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--after", type=int, default=2, help="iterations before the interrupt")
    parser.add_argument("--arm", default="dream", choices=["dream", "real"], help="that is interrupted")
    parser.add_argument("--iterations", type=int, default=5, help="of each arm")
    parser.add_argument("--set", nargs="*", default=[], help="more settings, such as training.parallel_control=true")
    arguments = parser.parse_args()
    changes = SMALL | dict(text.split("=", 1) for text in arguments.set)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would ignore it, and so its children
    with tempfile.TemporaryDirectory() as folder:
        different = compare(arguments.after, arguments.arm, arguments.iterations, changes, Path(folder))
    print("different:", ", ".join(different) if different else "nothing")
    sys.exit(bool(different))
