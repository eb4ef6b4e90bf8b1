"""Reinforcement learning for language agents in the dreams of an experience model."""

import os

# torch's OpenMP threads wait for each other by spinning: where another program takes a core, a step of two threads lasts
# up to forty times as long (tests/benchmarks/bench_threads.py). Read once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
