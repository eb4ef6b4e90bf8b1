"""How fast are rollouts? Agent tokens per CPU-second on one thread, the same tokens to sample, one run, as ratios.

    python tests/benchmarks/bench_rollout.py --sizes small medium
    python tests/benchmarks/bench_rollout.py --sizes --dreams 32

Conversations: 16 episodes of 10 turns, each of 16 agent and 40 environment tokens, random weights of Llama's shape, sampled
at temperature 1, nothing ends early. `one at a time` is transformers' `generate`, one prompt per call, as most agent loops
do; `ours, one at a time` is the same with this project's generator. Dreams: the experience model's predictions for different
games in one batch and one by one, default model with random weights, the default number of tokens.
"""

from __future__ import annotations

import argparse
import time

import torch

from dreamgym.core.config import load_config
from dreamgym.core.generators import SamplingParams, TransformersGenerator, derive_seed
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.offline import Behaviour, record
from dreamgym.models.reasoning_model import Query
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training.preparation import environment_texts, experience_model, make_language_model

SIZES = {"tiny": (64, 2), "small": (128, 5), "medium": (256, 6)}  # width, layers
TURNS, AGENT, ENV = 10, 16, 40


def timed(work) -> tuple[float, object]:
    """CPU-seconds and the result of a function."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def play(generate, batch: int, vocab: int) -> list[list[int]]:
    """All turns of all episodes; `generate(prompts, turn)` gives the responses."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(6, vocab, (batch, ENV), generator=random).tolist()
    for turn in range(TURNS):
        replies = generate(prompts, turn)
        assert all(len(reply) == AGENT for reply in replies)
        seen = torch.randint(6, vocab, (batch, ENV), generator=random).tolist()
        prompts = [[*p, *r, *s] for p, r, s in zip(prompts, replies, seen, strict=True)]
    return prompts


def ours(language_model: LanguageModel, batch: int, sessions: bool, chunk: int = 128):
    """Our generator, with or without the cache carried on."""
    generator = TransformersGenerator(language_model, chunk)
    generator.end_ids = []  # nothing ends early

    def generate(prompts, turn):
        sampling = SamplingParams(AGENT, 1.0, [derive_seed(0, i, turn) for i in range(batch)])
        replies = generator.generate(prompts, sampling, range(batch) if sessions else None)
        return [reply.ids for reply in replies]

    return generate


def stock(language_model: LanguageModel, together: bool):
    """transformers' `generate`, on all prompts at once (they have equal lengths) or on one after the other."""
    model = language_model.model
    options = dict(max_new_tokens=AGENT, min_new_tokens=AGENT, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts, turn):
        parts = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = [model.generate(torch.tensor(part), **options)[:, len(part[0]) :] for part in parts]
        return torch.cat(outputs).tolist()

    return generate


def conversations(size: str, family: str, batch: int, vocab: int) -> None:
    """Prints tokens per CPU-second of each way to roll out, and the ratios beside their targets."""
    words = [f"w{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}{chr(97 + i // 676)}" for i in range(vocab - 6)]
    tokenizer, (width, layers) = train_tokenizer([" ".join(words)]), SIZES[size]
    model = build_model(tokenizer, family, hidden_size=width, layers=layers, heads=4)
    model.generation_config.eos_token_id = None
    language_model = LanguageModel(model, tokenizer)
    arms = {
        "carried cache": ours(language_model, batch, True),
        "batched re-prefill": ours(language_model, batch, False),
        "ours, one at a time": ours(language_model, batch, False, chunk=1),
    }
    if family != "SmallLM":  # its fast path is ours; `generate` would recompute everything for each token
        arms |= {"transformers, batched": stock(language_model, True), "one at a time": stock(language_model, False)}
    tokens, speed, said = batch * TURNS * AGENT, {}, {}
    for name, arm in arms.items():
        seconds, said[name] = timed(lambda arm=arm: play(arm, batch, len(tokenizer)))
        speed[name] = tokens / seconds
    same = sum(a == b for a, b in zip(said["carried cache"], said["batched re-prefill"], strict=True))
    print(f"{family} {size}: {language_model.parameters / 1e6:.2f} M parameters, {tokens} agent tokens, n = 1 run each")
    for name, value in speed.items():
        print(f"  {name:22} {value:7.0f} tokens per CPU-second")
    for name, target in (("batched re-prefill", 2.5), ("one at a time", 4.0)):
        if name in speed:
            ratio = speed["carried cache"] / speed[name]
            print(f"  carried / {name:20} {ratio:5.2f}  target >= {target}  {'met' if ratio >= target else 'MISSED'}")
    print(f"  {same} of {batch} episodes token by token the same with the cache carried and read again", flush=True)


def dreams(count: int, repeats: int) -> None:
    """Prints predictions per CPU-second of the experience model in one batch and one by one."""
    config = load_config(overrides={"environment.data_dir": "generated", "environment.num_train_worlds": 60})
    env = make_environment("alfworld", config.environment)
    episodes = record(env, env.tasks("train")[: 2 * count], Behaviour("noisy", 0.3))
    rows = [row for episode in episodes for row in episode]
    buffer = ExperienceReplayBuffer(config.buffer, dedup=False)
    buffer.add_many(rows)
    language_model = make_language_model(config.reasoning_model, environment_texts(rows, env), seed=0)
    model = experience_model(language_model, buffer, env, config)
    tasks = {task.id: task for task in env.tasks("train")}
    chosen = [episode[len(episode) // 2] for episode in episodes[:count]]
    queries = [Query(row.state, row.action, tasks[row.task_id]) for row in chosen]
    model.predict(queries[:2])
    together = min(timed(lambda: model.predict(queries))[0] for _ in range(repeats))
    apart = min(timed(lambda: [model.predict([query]) for query in queries])[0] for _ in range(repeats))
    ratio, met = apart / together, "met" if apart / together >= 4.5 else "MISSED"
    print(f"{count} dreams, {language_model.parameters / 1e6:.2f} M parameters, best of {repeats}:")
    print(f"  in one batch {count / together:.1f}, one by one {count / apart:.1f} predictions per CPU-second")
    print(f"  in one batch / one by one {ratio:.2f}  target >= 4.5  {met}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["small"], choices=[*SIZES], help="of the policy")
    parser.add_argument("--family", default="Llama", help="SmallLM, or a transformers family")
    parser.add_argument("--batch", type=int, default=16, help="episodes")
    parser.add_argument("--vocab", type=int, default=500)
    parser.add_argument("--dreams", type=int, default=0, help="predictions of the experience model; 0: none")
    parser.add_argument("--repeats", type=int, default=2, help="of the dreams, the best counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        conversations(size, arguments.family, arguments.batch, arguments.vocab)
    if arguments.dreams:
        dreams(arguments.dreams, arguments.repeats)


if __name__ == "__main__":
    main()
