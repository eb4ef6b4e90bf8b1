"""Which small model makes the best experience model? Equal CPU-seconds, equal batch, one thread, same data and retrieval.

    python tests/benchmarks/bench_small_models.py --cpu-seconds 120 --families SmallLM Lfm2 Llama

Each family trains once per learning rate; its best one is what counts. Scores are teacher-forced on held-out games in worlds
that the buffer knows (`seen` split), greedy. `violating` is the share of predictions that contradict known facts or rules.
"""

from __future__ import annotations

import argparse
import time

import torch

from dreamgym.core.config import load_config
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.offline import Behaviour, record
from dreamgym.models.experience_sft import encode_examples, train_on_examples
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training.preparation import environment_texts, experience_model, record_offline, training_tasks
from dreamgym.training.teacher_forced import teacher_forced

OPTIONS = {"Lfm2": {"layer_types": ["conv", "full_attention", "full_attention"], "block_auto_adjust_ff_dim": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=120)
    parser.add_argument("--worlds", type=int, default=600)
    parser.add_argument("--games", type=int, default=120, help="held-out games")
    parser.add_argument("--families", nargs="+", default=["SmallLM", "Lfm2", "Llama"])
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-3, 9e-3])
    parser.add_argument("--layers", type=int, default=0, help="0: 2 for SmallLM, 3 for stock families")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides = {
        "environment.data_dir": "generated",
        "environment.num_train_worlds": arguments.worlds,
        "reasoning_model.temperature": 0.0,
        "reasoning_model.history": 0,
        "reasoning_model.max_new_tokens": 64,
    }
    config = load_config(None, overrides=overrides)
    env = make_environment("alfworld", config.environment)
    data = record_offline(env, training_tasks(env, config))
    buffer = ExperienceReplayBuffer(config.buffer, dedup=False)
    buffer.add_many(data)
    games = record(env, env.tasks("seen")[: arguments.games], Behaviour("noisy", 0.3), seed=1)
    steps_real = [e for episode in games for e in episode]
    print(
        f"{len(data)} transitions to train on, {len(steps_real)} to test on, {arguments.cpu_seconds:g} CPU-seconds each"
    )
    print("family   lr      params  steps  loss    exact  determined  violating  reward P/R")
    for family in arguments.families:
        tokenizer = train_tokenizer(environment_texts(data, env), "merged" if family == "SmallLM" else "split")
        layers = arguments.layers or (2 if family == "SmallLM" else 3)
        for lr in arguments.lr:
            model = build_model(tokenizer, family, layers=layers, **OPTIONS.get(family, {}))
            language_model = LanguageModel(model, tokenizer)
            dreamer = experience_model(language_model, buffer, env, config)
            examples = encode_examples(data, dreamer, tokenizer)
            trial = build_model(tokenizer, family, layers=layers, **OPTIONS.get(family, {}))
            start = time.process_time()
            train_on_examples(LanguageModel(trial, tokenizer), examples, 30)
            steps = int(arguments.cpu_seconds / ((time.process_time() - start) / 30))
            losses = train_on_examples(language_model, examples, steps, lr=lr)
            score = teacher_forced(dreamer, steps_real, env.verify, env.determined)
            reward = f"{score.reward.precision.value:.2f}/{score.reward.recall.value:.2f}"
            print(
                f"{family:8} {lr:<7g} {language_model.parameters:>6} {steps:>6}  {sum(losses[-50:]) / 50:.4f}"
                f"  {score.exact.value:.3f}  {score.determined.value:.3f}       {score.violating.value:.4f}     {reward}",
                flush=True,
            )


if __name__ == "__main__":
    main()
