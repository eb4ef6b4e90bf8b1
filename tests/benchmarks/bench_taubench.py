"""Steps per CPU-second, floors and gold rewards of Tau-Bench's desks.

    python tests/benchmarks/bench_taubench.py [--seconds 3] [--tasks 400] [--domains desk telecom retail airline]

The embedded desk always; official domains where the extra `dreamgym[taubench]` is installed, with a scripted customer who
stops after the agent's second message, and a judge who agrees. `gold` sends the gold calls that work and says what has to be
communicated; `no-op` says once that it cannot help; `gold - 1` leaves the last gold call out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence

from dreamgym.core.errors import MissingExtra
from dreamgym.core.llm import Reply
from dreamgym.environments.service_desk import gold_actions
from dreamgym.environments.service_session import ENDS, ServiceEnv
from dreamgym.environments.tau2_domains import PackagedDesk, gold_messages, gold_replay
from dreamgym.environments.taubench import build
from dreamgym.environments.tool_calls import write_call

DONE, WORDS = write_call(ENDS), "I cannot help you with that."


class Customer:
    """Wants something, then stops."""

    def complete(self, requests):
        return [Reply("###STOP###" if r.prompt.count("Agent:") > 1 else "Hello.") for r in requests]


class Agreeable:
    """A judge who finds every assertion met."""

    def complete(self, requests):
        asked = [json.loads(r.prompt.rpartition("<expected>\n")[2].removesuffix("\n</expected>")) for r in requests]
        return [Reply(json.dumps({"results": [{"reasoning": "", "met": True} for _ in a]})) for a in asked]


def show(what: str, text: str) -> None:
    sys.stdout.write(f"{what:<40} {text}\n")
    sys.stdout.flush()


def reward_table(env: ServiceEnv, tasks: Sequence, plans: dict[str, Callable]) -> None:
    """How many tasks each plan solves, and what resets and steps cost."""
    for name, plan in plans.items():
        won, steps, spent = 0, 0, [0.0, 0.0]
        for task in tasks:
            messages = list(plan(task))
            start = time.process_time()
            result = env.reset([0], [task])[0]
            spent[0] += time.process_time() - start
            start = time.process_time()
            while not result.done:
                result = env.step([0], [messages.pop(0) if messages else DONE])[0]
                steps += 1
            spent[1] += time.process_time() - start
            won += bool(result.success)
        times = f"reset {spent[0] / len(tasks) * 1e3:.1f} ms, step {spent[1] / max(1, steps) * 1e3:.2f} ms"
        show(f"  {name}", f"{won}/{len(tasks)}   {times} (CPU)")


def desk(seconds: float, count: int) -> None:
    """The embedded desk: floors, gold, and speed of 64 conversations at once."""
    env, rng = build(), random.Random(0)
    tasks = list(env.tasks("unseen")[:count])
    show("desk (embedded)", f"{len(tasks)} held-out tasks")
    plans = {"gold": gold_actions, "no-op": lambda t: [DONE], "gold - 1": lambda t: [*gold_actions(t)[:-2], DONE]}
    reward_table(env.make(1), tasks, plans)
    batch, slots = env.make(64), list(range(64))
    won, ended, steps, start = 0, 0, 0, time.process_time()
    results = batch.reset(slots, tasks[:64])
    while time.process_time() - start < seconds or ended < count:
        results = batch.step(slots, [rng.choice(r.admissible_actions or [DONE]) for r in results])
        steps += len(slots)
        for slot in [slot for slot in slots if results[slot].done]:
            won, ended = won + bool(results[slot].success), ended + 1
            results[slot] = batch.reset([slot], [tasks[ended % len(tasks)]])[0]
    show("  random possible calls", f"{won}/{ended}")
    show("  speed, 64 slots, random", f"{steps / (time.process_time() - start):,.0f} steps/CPU-s, resets included")


def official(domain: str, count: int) -> None:
    """An official domain, all tasks of its base split."""
    source = PackagedDesk(domain, Agreeable())
    env = ServiceEnv(1, source.service, 100, None, Customer(), source.guidelines)
    tasks = source.tasks("base")[:count]
    replays = {task.id: gold_replay(domain, task.metadata["tau2_id"]) for task in tasks}
    failing = [replay[2] for replay in replays.values() if replay[2]]
    show(domain, f"{len(tasks)} tasks; {sum(failing)} gold calls fail, in {len(failing)} tasks")
    calls = {name: list(replay[1]) for name, replay in replays.items()}
    plans = {
        "gold": lambda t: gold_messages(source.data, t),
        "gold, calls only": lambda t: [*calls[t.id], DONE],
        "no-op": lambda t: [WORDS],
        "gold - 1": lambda t: [*calls[t.id][:-1], *gold_messages(source.data, t)[len(calls[t.id]) :]],
        "gold - 1, calls only": lambda t: [*calls[t.id][:-1], DONE],
    }
    reward_table(env, tasks, plans)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU-seconds of the measurement of speed")
    parser.add_argument("--tasks", type=int, default=400, help="most tasks of a domain")
    parser.add_argument("--domains", nargs="+", default=["desk", "telecom", "retail", "airline"])
    args = parser.parse_args()
    for domain in args.domains:
        try:
            desk(args.seconds, args.tasks) if domain == "desk" else official(domain, args.tasks)
        except MissingExtra as error:
            show(domain, f"skipped ({error})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
