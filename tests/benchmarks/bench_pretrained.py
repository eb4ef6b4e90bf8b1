"""How far a pretrained language model gets in household games without training, and what learning rates do to it.

    python tests/benchmarks/bench_pretrained.py FOLDER_OR_NAME --games 8 --turns 3 --rates 3e-3 1e-4 1e-5

As agent: what share of its greedy responses are possible actions, with and without being told what to do, and by how much
the log-probabilities of sampled tokens differ between rollout and update. As experience model: how many of its greedy
replies can be read, and how many of them tell rightly whether the action works. Then cloning at several rates: nats per
token of held-out demonstrated actions, and of English that has nothing to do with games.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from dreamgym.core.config import EnvironmentConfig, PolicyModelConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Experience, Task, Trajectory
from dreamgym.core.generators import TransformersGenerator
from dreamgym.core.language_model import LanguageModel, load_language_model, make_rows
from dreamgym.core.llm import GeneratorClient
from dreamgym.environments.base_env import Environment, make_environment
from dreamgym.environments.offline import EXPERT, record
from dreamgym.models.reasoning_model import Query, ReasoningExperienceModel
from dreamgym.training.policy import Policy, make_codec
from dreamgym.training.rollout import RolloutConfig, rollout

ENGLISH = """The quick growth of cities in the nineteenth century changed how people lived and worked. Railways carried food
and coal, newspapers spread the news of the day, and new laws slowly improved the safety of factories. Children began to
attend school, and by the end of the century most adults in these countries could read and write."""


def play(
    language_model: LanguageModel, env: Environment, tasks: Sequence[Task], told: bool, temperature: float
) -> tuple[Policy, list[Trajectory]]:
    """A few turns of each game."""
    section = PolicyModelConfig(name="named", prompted=told)
    policy = Policy(language_model, make_codec(language_model.tokenizer, section, env.mapper))
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


def as_experience_model(
    language_model: LanguageModel, env: Environment, rows: Sequence[Experience], reply: int
) -> None:
    """Prints how many of its predictions can be read and are right about the action, every second one impossible."""
    section = ReasoningModelConfig(name="named", prompted=True, temperature=0.0, reply_tokens=reply)
    model = ReasoningExperienceModel(section, GeneratorClient(language_model), None, env.mapper)
    tasks, asked = {task.id: task for task in env.tasks("train")}, list[tuple[Query, bool]]()
    for number, e in enumerate(rows):
        other = next(o.action for o in rows if o.action not in (env.mapper.admissible_actions(e.state) or ()))
        asked.append((Query(e.state, other if number % 2 else e.action, tasks[e.task_id]), bool(number % 2)))
    said = model.predict([query for query, _ in asked])
    read = [(p.next_state.rpartition("\n")[2] != "last: ok", fails) for p, (_, fails) in zip(said, asked) if p.valid]
    print(
        f"experience model: {len(read)} of {len(said)} replies readable, {sum(a == b for a, b in read)} right about the action"
    )
    print(f"  the first that is not: {next((p.error for p in said if not p.valid), '')[:160]}")


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
    parser.add_argument("--reply-tokens", type=int, default=200, help="longest prediction")
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-3, 1e-4, 1e-5])
    parser.add_argument("--updates", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated", max_episode_steps=options.turns))
    tasks, language_model = list(env.tasks("train")[: options.games]), load_language_model(options.model)
    as_agent(language_model, env, tasks)
    whole = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    rows = [e for episode in record(whole, whole.tasks("train")[: options.updates + 4], EXPERT) for e in episode]
    random.Random(0).shuffle(rows)
    as_experience_model(language_model, whole, rows[: options.games], options.reply_tokens)
    for rate in options.rates:
        clone(options.model, rows, rate, options.updates)


if __name__ == "__main__":
    main()
