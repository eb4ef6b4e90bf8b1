"""It learns: a task of memory over two turns from random weights, and a task that needs credit for single turns."""

import time
from functools import partial

import pytest
import torch

from dreamgym.core.data_structures import Task, Trajectory, Turn
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.training.grpo import GRPOSettings, grpo_update, make_group_batch
from dreamgym.training.policy import Policy
from dreamgym.training.ppo import PPOSettings, make_batch, ppo_update

SYMBOLS, ASK = ["red", "green", "blue"], "which"
CPU_SECONDS = 10.0
COMMON = {"kl_coef": 0.0, "minibatch": 48, "kl_stop": 0.2}


def new_policy(seed):
    tokenizer = train_tokenizer([*SYMBOLS, ASK])
    model = build_model(tokenizer, hidden_size=32, layers=1, seed=seed, conv_kernel=1)
    return Policy(LanguageModel(model, tokenizer))


def remember(policy, n, seed, temperature=1.0):
    """Turn 1 shows a symbol, turn 2 asks for it; its prompt is everything before. Groups of 16 see the same symbol."""
    generator, codec = TransformersGenerator(policy.language_model), policy.codec
    shown = [SYMBOLS[(i // 16) % len(SYMBOLS)] for i in range(n)]
    (ask,), first = codec.prompts([ASK]), codec.prompts(shown)
    one = generator.generate(first, SamplingParams(1, temperature, 2 * seed))
    second = [[*p, *r.ids, *ask] for p, r in zip(first, one, strict=True)]
    two = generator.generate(second, SamplingParams(1, temperature, 2 * seed + 1))
    trajectories = []
    for i, (symbol, p, q, a, b) in enumerate(zip(shown, first, second, one, two, strict=True)):
        right = float(codec.action(b.ids) == symbol)
        turns = [Turn(p, a.ids, a.logprobs, 0.0, symbol, "", ""), Turn(q, b.ids, b.logprobs, right, symbol, "", "")]
        trajectories.append(Trajectory(turns, Task(str(i // 16), symbol), i // 16, "real", seed, True, False))
    return trajectories


def updates(algorithm):
    """Batch and update of an algorithm."""
    if algorithm == "ppo":
        return make_batch, partial(ppo_update, settings=PPOSettings(entropy_coef=0.01, **COMMON))
    settings = GRPOSettings(entropy_coef=0.03, **COMMON)
    return partial(make_group_batch, estimator=algorithm), partial(grpo_update, settings=settings)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gigpo"])
def test_memory_over_two_turns_is_learned_from_random_weights(algorithm, seed):
    """At least .95 of 240 fresh greedy episodes within 10 CPU-seconds; nothing but the whole conversation tells."""
    policy = new_policy(seed)
    make, update = updates(algorithm)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    start, success, rounds = time.process_time(), 0.0, 0
    torch.manual_seed(seed)
    while success < 0.95 and time.process_time() - start < CPU_SECONDS:
        played = remember(policy, 96, 1000 * seed + rounds)
        update(policy, optimizer, make(played, policy))
        rounds += 1
        if sum(t.episode_return for t in played) > 0.8 * len(played):
            greedy = remember(policy, 240, 7, temperature=0.0)
            success = sum(t.episode_return for t in greedy) / len(greedy)
    spent = time.process_time() - start
    print(f"{algorithm} seed {seed}: {success:.2f} after {rounds} rounds, {spent:.1f} CPU-seconds")
    assert success >= 0.95 and spent <= CPU_SECONDS, (success, rounds, spent)


def lend(policy, n, seed, turns=6):
    """Each turn shows a symbol and pays 1 for repeating it; the last one claims everything back: all returns are 0."""
    generator, codec = TransformersGenerator(policy.language_model), policy.codec
    random = torch.Generator().manual_seed(seed)
    played = [[] for _ in range(n)]
    for t in range(turns):
        last = t == turns - 1
        shown = [ASK if last else SYMBOLS[i] for i in torch.randint(len(SYMBOLS), (n,), generator=random)]
        prompts = codec.prompts(shown)
        replies = generator.generate(prompts, SamplingParams(1, 1.0, 100 * seed + t))
        for own, symbol, prompt, reply in zip(played, shown, prompts, replies, strict=True):
            reward = -sum(turn.reward for turn in own) if last else float(codec.action(reply.ids) == symbol)
            own.append(Turn(prompt, reply.ids, reply.logprobs, reward, symbol, "", ""))
    return [Trajectory(own, Task("loan", ""), 0, "real", seed, True, False) for own in played]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_level_gae_learns_where_only_credit_for_turns_helps(seed):
    """A discount per turn prefers money now; one number per episode sees nothing at all. Same tasks and settings."""
    results = {}
    for credit in ("turns", "episode"):
        policy, scores = new_policy(seed), []
        optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
        make, update = make_group_batch, partial(grpo_update, settings=GRPOSettings(**COMMON))
        if credit == "turns":
            make, update = partial(make_batch, gamma=0.8), partial(ppo_update, settings=PPOSettings(**COMMON))
        torch.manual_seed(seed)
        for i in range(25):
            played = lend(policy, 48, i)
            update(policy, optimizer, make(played, policy))
            earned = [turn.reward for trajectory in played for turn in trajectory.turns[:-1]]
            scores.append(sum(earned) / len(earned))
        results[credit] = sum(scores[-5:]) / 5
    print({name: round(value, 2) for name, value in results.items()})
    assert results["turns"] > 0.8 and results["episode"] < 0.3, results
