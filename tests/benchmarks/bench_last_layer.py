"""What it saves that the last layer computes only the columns that are asked for, on the household's own texts.

    python tests/benchmarks/bench_last_layer.py --seconds 5

Milliseconds of one training step of the experience model (32 transitions), one of the policy (256 turns), and of reading 128
prompts before the first sampled token, of the cpu preset's models, one thread. Whole and asked-only steps take turns. The
losses of both are printed: they must agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch

from dreamgym.core import language_model as lm
from dreamgym.core.config import load_config
from dreamgym.core.generators import left_padded
from dreamgym.environments.base_env import make_environment
from dreamgym.models.experience_sft import encode_examples, example_loss
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training.policy import TurnCodec
from dreamgym.training.preparation import environment_texts, experience_model, record_offline, training_tasks

Example = tuple[list[int], list[int]]


def every_column(at: torch.Tensor, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(at.shape[1]).expand(at.shape), at


def step(model, examples: Sequence[Example]) -> float:  # loss
    model.zero_grad()
    loss = example_loss(model, examples)
    loss.backward()
    return loss.item()


@torch.inference_mode()
def read(model, ids: torch.Tensor, mask: torch.Tensor, asked: bool) -> float:  # mean logit
    if asked:
        return model(ids, mask, logits_to_keep=1).logits.mean().item()
    hidden, table = model.hidden_states(ids, mask)
    return (hidden[:, -1:] @ table.T).mean().item()


def in_turns(
    whole: Callable[[], float], asked: Callable[[], float], seconds: float
) -> list[tuple[float, float]]:  # milliseconds and result of each
    spent, results, calls = [0.0, 0.0], [0.0, 0.0], 0
    while calls < 3 or sum(spent) < seconds:
        for i, run in enumerate((whole, asked)):
            start = time.perf_counter()
            results[i] = run()
            spent[i] += (time.perf_counter() - start) * (calls > 0)  # the first call warms up
        calls += 1
    return [(1000 * s / (calls - 1), result) for s, result in zip(spent, results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of each comparison")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    config = load_config(None, "alfworld", "cpu", {"environment.num_train_worlds": 60})
    env = make_environment("alfworld", config.environment)
    data = record_offline(env, training_tasks(env, config))
    buffer = ExperienceReplayBuffer(config.buffer, dedup=False)
    buffer.add_many(data)
    tokenizer = lm.train_tokenizer(environment_texts(data, env))
    model = lm.build_model(tokenizer, layers=config.reasoning_model.layers)
    for p in model.parameters():  # as if trained: closing projections start at zero
        torch.nn.init.normal_(p, std=0.1)
    dream = experience_model(lm.LanguageModel(model, tokenizer), buffer, env, config)
    codec = TurnCodec(tokenizer)
    turns = list(zip(codec.prompts([e.state for e in data]), [codec.response(e.action) for e in data], strict=True))
    transitions = encode_examples(data[:: len(data) // 400], dream, tokenizer)
    similar = sorted(transitions, key=lambda pair: sum(map(len, pair)))[200:232]  # batches hold rows of similar length
    turns = sorted(turns, key=lambda pair: sum(map(len, pair)))[len(turns) // 2 :][:256]
    print("work                        prompt  answer  whole ms  asked ms  whole / asked  results")
    for name, examples in ("experience model, a step", similar), ("policy, a step", turns):

        def whole(examples: Sequence[Example] = examples) -> float:
            with patch.object(lm, "asked_columns", every_column):
                return step(model, examples)

        found = in_turns(whole, lambda examples=examples: step(model, examples), seconds)
        report(name, examples, found)
    ids, mask = left_padded([prompt for prompt, _ in turns[:128]])
    found = in_turns(lambda: read(model, ids, mask, False), lambda: read(model, ids, mask, True), seconds)
    report("policy, reading of prompts", turns[:128], found)


def report(name: str, examples: Sequence[Example], found: Sequence[tuple[float, float]]) -> None:
    (slow, a), (fast, b) = found
    prompt, answer = (sum(map(len, part)) / len(examples) for part in zip(*examples, strict=True))
    print(
        f"{name:27} {prompt:6.0f} {answer:7.1f} {slow:9.1f} {fast:9.1f} {slow / fast:14.2f}  {a:.6f} {b:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
