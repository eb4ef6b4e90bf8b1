"""How far a pretrained language model gets in household games without training, and what learning rates do to it.

    python tests/benchmarks/bench_pretrained.py FOLDER_OR_NAME --games 8 --turns 3 --rates 3e-3 1e-4 1e-5

As agent: what share of its greedy responses are possible actions, with and without being told what to do, and by how much
the log-probabilities of sampled tokens differ between rollout and update. As experience model: how many of its greedy
replies about real steps can be read, tell rightly whether the action works, and give the real next state; it sees similar
steps of other episodes. Then cloning at several rates: nats per token of held-out demonstrated actions, and of English that
has nothing to do with games.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from dreamgym.core.config import BufferConfig, EnvironmentConfig, PolicyModelConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Experience, Task, Trajectory
from dreamgym.core.generators import TransformersGenerator
from dreamgym.core.language_model import LanguageModel, load_language_model, make_rows
from dreamgym.core.llm import GeneratorClient
from dreamgym.environments.base_env import Environment, make_environment
from dreamgym.environments.offline import EXPERT, record
from dreamgym.models.reasoning_model import Query, ReasoningExperienceModel
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training.policy import Policy, make_codec
from dreamgym.training.preparation import record_offline
from dreamgym.training.rollout import RolloutConfig, rollout

ENGLISH = """The quick growth of cities in the nineteenth century changed how people lived and worked. Railways carried food
and coal, newspapers spread the news of the day, and new laws slowly improved the safety of factories. Children began to
attend school, and by the end of the century most adults in these countries could read and write."""


def play(
    language_model: LanguageModel, env: Environment, tasks: Sequence[Task], told: bool, temperature: float
) -> tuple[Policy, list[Trajectory]]:
    """A few turns of each game."""
    section = PolicyModelConfig(name="named")
    policy = Policy(language_model, make_codec(language_model.tokenizer, section, env.mapper if told else None))
    settings = RolloutConfig(len(tasks), section.max_new_tokens, temperature)
    return policy, rollout(
        TransformersGenerator(language_model), env.make(len(tasks)), tasks, policy.codec, settings, 0
    )


def mismatch(policy: Policy, played: Sequence[Trajectory]) -> float:
    """The largest difference of a token's log-probability between rollout and update (nats)."""
    turns = [turn for game in played for turn in game.turns]
    with torch.no_grad():
        scored = [policy(make_rows([turn.prompt_ids], [turn.response_ids])).logprobs for turn in turns]
    return max(float((a - torch.tensor(t.logprobs)).abs().max()) for a, t in zip(scored, turns, strict=True))


def as_agent(language_model: LanguageModel, env: Environment, tasks: Sequence[Task]) -> None:
    """Prints how often it chooses a possible action."""
    for told in (False, True):
        turns = [turn for game in play(language_model, env, tasks, told, 0.0)[1] for turn in game.turns]
        possible, first = sum(bool(turn.admissible) for turn in turns), turns[0].response
        print(f"agent, {'' if told else 'not '}told: {possible} of {len(turns)} actions possible; the first: {first!r}")
    print(
        f"agent, rollout and update differ by at most {mismatch(*play(language_model, env, tasks, True, 1.0)):.1e} nats"
    )


def as_experience_model(language_model: LanguageModel, env: Environment, options: argparse.Namespace) -> None:
    """Prints how many of its predictions can be read, and are right; a third of the real actions had no effect."""
    tasks = {task.id: task for task in env.tasks("train")[: 3 * options.games]}
    rows, how = record_offline(env, [*tasks.values()]), BufferConfig(top_k=options.demos)
    failed = [e for e in rows if fails(e)]
    draw, third = random.Random(1), options.predictions // 3
    asked = draw.sample([e for e in rows if not fails(e)], options.predictions - third) + draw.sample(failed, third)
    buffer = ExperienceReplayBuffer(how)
    buffer.add_many(rows)
    section = ReasoningModelConfig(name="named", prompted=True, temperature=0.0, reply_tokens=options.reply_tokens)
    model = ReasoningExperienceModel(section, GeneratorClient(language_model, 24), buffer, env.mapper)
    said = model.predict([Query(e.state, e.action, tasks[e.task_id], exclude_episode=e.episode_id) for e in asked])
    for name, kind in (("work", False), ("fail", True)):
        both = [(e, p) for e, p in zip(asked, said, strict=True) if fails(e) is kind]
        right = sum(p.valid and fails(p) is kind for _, p in both)
        same = sum(p.valid and (p.next_state, p.reward) == (e.next_state, e.reward) for e, p in both)
        print(
            f"experience model, {len(both)} actions that {name}: {sum(p.valid for _, p in both)} replies readable, {right} "
            f"say that they {name}, {same} with the real next state and reward"
        )
    print(f"  the first that cannot be read: {next((p.error for p in said if not p.valid), '-')[:160]}", flush=True)


def fails(e: Experience) -> bool:
    """Whether the action has no effect."""
    return not e.next_state.endswith("\nlast: ok")


def clone(name: str, rows: Sequence[Experience], rate: float, updates: int, batch: int = 8) -> None:
    """Prints what a few updates on demonstrated actions do."""
    policy = Policy(load_language_model(name))
    ids = policy.tokenizer(ENGLISH, return_tensors="pt")["input_ids"]

    def loss(part: Sequence[Experience]) -> torch.Tensor:
        responses = [policy.codec.response(e.action) for e in part]
        return -policy(make_rows(policy.codec.prompts([e.state for e in part]), responses)).logprobs.mean()

    @torch.no_grad()
    def measured() -> str:
        return f"actions {float(loss(rows[-2 * batch :])):.2f}, English {float(policy.model(ids, labels=ids).loss):.2f}"

    before, optimizer = measured(), torch.optim.AdamW(policy.model.parameters(), lr=rate, betas=(0.9, 0.98))
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 4)
        optimizer.zero_grad()
        loss(rows[step * batch : (step + 1) * batch]).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
    print(f"{updates} updates of {batch} at {rate:g}: {before} -> {measured()} (nats per token)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hugging Face name")
    parser.add_argument("--games", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--predictions", type=int, default=24)
    parser.add_argument("--demos", type=int, default=3, help="similar steps in a prompt of the experience model")
    parser.add_argument("--reply-tokens", type=int, default=300, help="longest prediction")
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-3, 1e-4, 1e-5])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--half", action="store_true", help="bfloat16 weights where nothing is trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated", max_episode_steps=options.turns))
    language_model = load_language_model(options.model, torch.bfloat16 if options.half else torch.float32)
    as_agent(language_model, env, list(env.tasks("train")[: options.games]))
    whole = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    rows = [e for episode in record(whole, whole.tasks("train")[: options.updates + 4], EXPERT) for e in episode]
    random.Random(0).shuffle(rows)
    as_experience_model(language_model, whole, options)
    for rate in options.rates:
        clone(options.model, rows, rate, options.updates)


if __name__ == "__main__":
    main()
