"""What another busy program does to training on two threads, with OpenMP's default wait and with the one that dreamgym sets.

    python tests/benchmarks/bench_threads.py --seconds 3

Milliseconds of one training step of a small policy, each number from a process of its own (OpenMP reads its settings once).
`busy` runs endless loops on all cores but one beside it, in sessions of their own, as programs of other terminals are: Linux
then shares the cores between sessions, which makes it worse.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

SIZES = {"large": (32, 200), "small": (16, 60)}  # sequences, tokens
SPINS = {"default": "300000", "dreamgym's": "1000"}  # turns of a waiting thread before it sleeps; libgomp's own default


def time_step(threads: int, shape: tuple[int, int], seconds: float) -> float:  # milliseconds
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = torch.nn.Sequential(torch.nn.Embedding(500, 64), encoder, torch.nn.Linear(64, 500))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(0, 500, shape)
    steps, start = -3, 0.0  # three to warm up
    while steps < 1 or time.perf_counter() - start < seconds:
        start = start if steps else time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return (time.perf_counter() - start) / steps * 1000


def in_process(threads: int, size: str, spins: str, seconds: float) -> float:  # milliseconds
    command = [sys.executable, __file__, "--seconds", str(seconds), "--step", str(threads), size]
    environment = os.environ | {"GOMP_SPINCOUNT": spins}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--step", nargs=2, metavar=("THREADS", "SIZE"), help="only one of them, in this process")
    arguments = parser.parse_args()
    if arguments.step:
        print(time_step(int(arguments.step[0]), SIZES[arguments.step[1]], arguments.seconds))
        return
    print("machine  size   1 thread  2 threads, default  2 threads, dreamgym's  default / dreamgym's")
    for machine in "idle", "busy":
        loops = (os.cpu_count() or 2) - 1 if machine == "busy" else 0
        beside = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(loops)
        ]
        try:
            for size in SIZES:
                one = in_process(1, size, SPINS["default"], arguments.seconds)
                default, ours = (in_process(2, size, spins, arguments.seconds) for spins in SPINS.values())
                print(
                    f"{machine:8} {size:6} {one:8.1f}  {default:18.1f}  {ours:21.1f}  {default / ours:20.2f}",
                    flush=True,
                )
        finally:
            for process in beside:
                process.kill()


if __name__ == "__main__":
    main()
