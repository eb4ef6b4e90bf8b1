"""Rollout and update: ours against TRL's GRPOTrainer with our `trl_rollout_func`, on the same toy. One thread, CPU-seconds.

    python tests/benchmarks/bench_trl.py                 one iteration each, by turns; the ratio beside its target
    python tests/benchmarks/bench_trl.py --agents        SFT and DPO agents: pairs in the offline data, games won in new worlds

The toy runs every episode for six turns. Both sides roll out the same number of episodes with the same model, code and
sampling settings and take one optimiser step on all of them; times are per agent token, since each side samples its own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections import Counter
from typing import Any

import torch

from dreamgym.core.config import load_config
from dreamgym.core.data_structures import StepResult, Task
from dreamgym.core.generators import TransformersGenerator
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.environments.base_env import make_environment
from dreamgym.training import preparation as prep
from dreamgym.training import trl_baselines as tb
from dreamgym.training.baselines import demonstrations
from dreamgym.training.grpo import GRPOSettings, grpo_update, make_group_batch
from dreamgym.training.policy import Policy, TurnCodec
from dreamgym.training.rollout import RolloutConfig, rollout
from dreamgym.training.trainer import evaluate_policy

TARGET = 1.0
WORDS = [f"{kind} {number}" for kind in ("mug", "drawer", "shelf", "lamp") for number in range(1, 9)]


class SixTurns:
    """Six turns whatever is said; pays for letters, so that returns differ within a group."""

    def __init__(self, slots: int):
        self.turn = [0] * slots

    def reset(self, slots, tasks, seeds=None):
        for slot in slots:
            self.turn[slot] = 0
        return [StepResult(self._text(slot)) for slot in slots]

    def step(self, slots, actions):
        for slot in slots:
            self.turn[slot] += 1
        pay = [0.01 * len(action) for action in actions]
        return [self._result(slot, p) for slot, p in zip(slots, pay, strict=True)]

    def close(self): ...

    def _text(self, slot: int) -> str:
        return " ".join(WORDS[(self.turn[slot] + i) % len(WORDS)] for i in range(24))

    def _result(self, slot: int, pay: float) -> StepResult:
        over = self.turn[slot] == 6
        return StepResult(self._text(slot), reward=pay, terminated=over, success=over or None)


def new_policy(hidden: int, layers: int) -> Policy:
    tokenizer = train_tokenizer(WORDS)
    model = build_model(tokenizer, hidden_size=hidden, layers=layers, seed=0)
    return Policy(LanguageModel(model, tokenizer), TurnCodec(tokenizer, context="conversation"))


def ours(policy: Policy, tasks: list[Task], group: int, tokens: int, steps: int) -> list[float]:
    """CPU-seconds per agent token of each iteration."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    settings = GRPOSettings(epochs=1, minibatch=10_000, kl_coef=0.0)
    times, repeated = [], [task for task in tasks for _ in range(group)]
    for _ in range(steps):
        start = time.process_time()
        generator = TransformersGenerator(policy.language_model)
        config = RolloutConfig(len(repeated), tokens)
        played = rollout(generator, SixTurns(len(repeated)), repeated, policy.codec, config)
        policy.train()
        grpo_update(policy, optimizer, make_group_batch(played, policy), settings)
        policy.eval()
        said = sum(len(turn.response_ids) for t in played for turn in t.turns)
        times.append((time.process_time() - start) / said)
    return times


def theirs(policy: Policy, tasks: list[Task], group: int, tokens: int, steps: int) -> list[float]:
    """The same for `GRPOTrainer`."""
    from transformers import TrainerCallback

    trl, datasets = tb.require_trl()
    times: list[float] = []
    said: list[int] = []
    roll = tb.trl_rollout_func(SixTurns, tasks, policy.codec, tokens)

    def counted(prompts: list[Any], trainer: Any) -> dict[str, list]:
        out = roll(prompts, trainer)
        said.append(sum(map(sum, out["env_mask"])))
        return out

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.process_time()

        def on_step_end(self, args, state, control, **_):
            times.append(time.process_time() - self.start)

    episodes = len(tasks) * group
    sizes = {"per_device_train_batch_size": episodes, "num_generations": group, "max_steps": steps, "beta": 0.0}
    sizes |= {"max_completion_length": 4096, "learning_rate": 1e-4, "logging_steps": steps}
    sizes |= {"lr_scheduler_type": "constant"}
    with tempfile.TemporaryDirectory() as folder, tb.lent_to_trl(policy.model) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(**tb.trainer_settings(folder, policy.model.device, sizes))
        data = datasets.Dataset.from_list(tb.trl_rows(tasks))
        trainer = trl.GRPOTrainer(
            model, tb.episode_reward, args, data, processing_class=policy.tokenizer, rollout_func=counted
        )
        trainer.add_callback(Clock())
        tb.run_trainer(trainer, None)
    return [seconds / n for seconds, n in zip(times, said, strict=True)]


def speed(arguments: argparse.Namespace) -> None:
    tasks = [Task(str(i), "say something") for i in range(arguments.tasks)]
    sizes = (tasks, arguments.group, arguments.tokens, arguments.steps + 1)
    ratios = []
    for trial in range(arguments.trials):
        sides = [ours, theirs] if trial % 2 else [theirs, ours]
        found = {side.__name__: side(new_policy(arguments.hidden, arguments.layers), *sizes)[1:] for side in sides}
        mine, other = statistics.median(found["ours"]), statistics.median(found["theirs"])
        ratios.append(mine / other)
        print(
            f"trial {trial}: ours {mine * 1e6:.0f}, TRL {other * 1e6:.0f} µs a token, ratio {mine / other:.2f}",
            flush=True,
        )
    episodes = arguments.tasks * arguments.group
    parameters = sum(p.numel() for p in new_policy(arguments.hidden, arguments.layers).model.parameters())
    print(
        f"{episodes} episodes of 6 turns, {parameters:,} parameters, {arguments.steps} iterations a trial after one warm-up"
    )
    verdict = "met" if statistics.median(ratios) <= TARGET else "MISSED"
    print(
        f"rollout + update against TRL rollout_func: {statistics.median(ratios):.2f}x, target <= {TARGET}x: {verdict}"
    )


def agents(arguments: argparse.Namespace) -> None:
    start = time.process_time()
    worlds = {"environment.data_dir": "generated", "environment.num_train_worlds": arguments.worlds}
    config = load_config(None, "alfworld", "cpu", worlds)
    env = make_environment("alfworld", config.environment)
    tasks = prep.training_tasks(env, config)
    data = prep.offline_data(env, config, tasks)
    texts = prep.environment_texts(data, env)
    clone = Policy(prep.make_language_model(config.policy_model, texts, 0))
    prep.clone_policy(clone, data, config)
    rows = data + prep.cloned_rollouts(clone, env, tasks, config)[0]
    print(f"{len(tasks)} worlds, rows by behaviour: {dict(Counter(row.policy for row in rows))}")
    for effective in (False, True):
        pairs = tb.dpo_pairs(rows, effective)
        print(f"pairs, effective={effective}: {len(pairs)}, {dict(Counter(pair['behaviour'] for pair in pairs))}")
    pairs, games = tb.dpo_pairs(rows), env.tasks("valid")[: arguments.games]

    def score(name: str, policy: Policy) -> None:
        found = [evaluate_policy(policy, env, games, temperature).row() for temperature in (1.0, 0.0)]
        shown = [f"{row['success']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in found]
        spent = time.process_time() - start
        print(f"{spent:5.0f} s  {name:30} {shown[0]}, greedy {shown[1]}, n={found[0]['n']}", flush=True)

    score("clone", clone)
    for lr, weight in ((1e-4, 0.0), (1e-4, 1.0), (1e-3, 1.0)):
        agent = tb.dpo_agent(copy.deepcopy(clone), pairs, sft_weight=weight, lr=lr)
        score(f"clone, DPO {lr:g}, sft_weight {weight:g}", agent)
    fresh = Policy(prep.make_language_model(config.policy_model, texts, 0))
    examples = demonstrations(data, fresh)
    score(f"SFT on {len(examples)} actions", tb.sft_agent(fresh, examples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", action="store_true")
    parser.add_argument("--worlds", type=int, default=600)
    parser.add_argument("--games", type=int, default=300)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12, help="of one turn, at most")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trials", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    agents(arguments) if arguments.agents else speed(arguments)


if __name__ == "__main__":
    main()
