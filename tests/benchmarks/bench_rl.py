"""How fast are estimators and updates? Ratios of CPU time on one thread, measured in one run, beside their targets.

    python tests/benchmarks/bench_rl.py --repeats 5

Contestants take turns, step by step, so that a busy machine slows all of them; the ratio is that of the medians. All of them
train the same weights on the same tokens: one AdamW step over `--rows` rows.

* ours: one step of `ppo_update` (policy, critic, KL to a reference, entropy, metrics);
* TRL: one step of `GRPOTrainer`'s loss, which has no critic, with KL to a reference;
* bare: the PPO loss in plain torch on logits of all positions, nothing else;
* lean: the same with logits at agent positions only, the least that PPO can do.

The last two lines are about our small models on a CPU: a PPO update in forward passes that fill a GPU against passes that stay
in the core's cache, and a training step whose elementwise parts autograd differentiates against the backward pass by hand.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from rl_toys import as_trl_sees_it  # noqa: E402

from dreamgym.core import small_lm  # noqa: E402
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer  # noqa: E402
from dreamgym.models.experience_sft import example_loss  # noqa: E402
from dreamgym.training.advantages import two_level_gae  # noqa: E402
from dreamgym.training.policy import Policy  # noqa: E402
from dreamgym.training.ppo import PPOSettings, TokenBatch, TokenRow, ppo_update, score_rows  # noqa: E402


def cpu_seconds(contestants: dict, repeats: int) -> dict[str, float]:
    """Median CPU-seconds of each; they take turns, after one round that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, function in contestants.items():
            start = time.process_time()
            function()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def naive_gae(rewards, values, ends, gamma=0.97, decay=0.9):
    """One row after the other, in plain Python numbers."""
    rows = []
    for reward, value, end in zip(rewards.tolist(), values.tolist(), ends.tolist(), strict=True):
        running, following, advantages = 0.0, 0.0, [0.0] * len(reward)
        for t in reversed(range(len(reward))):
            g, c = (gamma, gamma * decay) if end[t] else (1.0, 1.0)
            running = reward[t] + g * following - value[t] + (c * running if t < len(reward) - 1 else 0.0)
            advantages[t], following = running, value[t]
        rows.append(advantages)
    return torch.tensor(rows)


def gae_ratio(repeats: int) -> float:
    torch.manual_seed(0)
    rewards, values, ends = torch.randn(64, 1024), torch.randn(64, 1024), torch.rand(64, 1024) < 0.1
    mask, bootstrap = torch.ones(64, 1024).bool(), torch.zeros(64)
    contestants = {
        "loop": lambda: naive_gae(rewards, values, ends),
        "vectorised": lambda: two_level_gae(rewards, values, ends, mask, bootstrap),
    }
    assert torch.allclose(contestants["loop"](), contestants["vectorised"](), atol=1e-3)
    seconds = cpu_seconds(contestants, max(repeats, 9))
    return seconds["loop"] / seconds["vectorised"]


def new_policy(vocab: int, hidden: int, layers: int, family: str = "Llama") -> Policy:
    tokenizer = train_tokenizer(["a b c" if family == "Llama" else " ".join(f"w{i}" for i in range(vocab))], "split")
    size = {"vocab_size": vocab} if family == "Llama" else {}  # our own has as many as its tokenizer
    model = build_model(tokenizer, family, hidden_size=hidden, layers=layers, **size)
    return Policy(LanguageModel(model, tokenizer))


def some_batch(policy: Policy, reference: Policy, rows: int, prompt: int, response: int) -> TokenBatch:
    """Rows with prompts of half to full length and responses likewise."""
    vocab, lines = policy.model.config.vocab_size, []
    for _ in range(rows):
        p, r = (int(torch.randint(n // 2, n + 1, ())) for n in (prompt, response))
        lines.append(TokenRow(torch.randint(6, vocab, (p + r,)).tolist(), [(p, p + r)]))
    counts = torch.tensor([row.tokens for row in lines])
    old, values = score_rows(policy, lines)
    advantages = torch.randn(rows).repeat_interleave(counts)
    ref = score_rows(reference, lines)[0]
    return TokenBatch(lines, counts, old, counts.repeat_interleave(counts), advantages, ref, advantages, values)


def trl_step(policy: Policy, batch: TokenBatch):
    """One step of GRPOTrainer's loss and AdamW."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=0.0,  # a reference would be loaded by name; its log-probabilities are handed over instead
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=512,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(policy.model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=policy.tokenizer,
    )
    trainer.beta, trainer.current_gradient_accumulation_steps = 0.005, 1
    optimizer, inputs = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5), as_trl_sees_it(batch)

    def step() -> None:
        trainer._compute_loss(trainer.model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_step(policy: Policy, batch: TokenBatch, everywhere: bool):
    """One PPO step in plain torch: logits of all or of agent positions, clipped losses, AdamW."""
    policy = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    width = max(len(row.ids) for row in batch.rows)
    ids = torch.tensor([list(row.ids) + [0] * (width - len(row.ids)) for row in batch.rows])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for line, row in zip(mask, batch.rows, strict=True):
        line[row.spans[0][0] : row.spans[0][1]] = True
    at = torch.ones_like(mask[:, 1:]) if everywhere else mask[:, 1:]
    agent = mask[:, 1:][at]

    def step() -> None:
        hidden = policy.model.model(input_ids=ids).last_hidden_state[:, :-1][at]
        logits, token = policy.model.lm_head(hidden), ids[:, 1:][at]
        logprobs = -torch.nn.functional.cross_entropy(logits, token, reduction="none")[agent]
        ratio = (logprobs - batch.old_logprobs).exp()
        surrogate = -torch.min(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
        values = policy.value(hidden)[:, 0][agent]
        (surrogate.mean() + 0.25 * (values - batch.targets).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def update_seconds(vocab: int, arguments: argparse.Namespace, with_trl: bool) -> dict[str, float]:
    torch.manual_seed(0)
    policy = new_policy(vocab, arguments.hidden, arguments.layers)
    batch = some_batch(policy, copy.deepcopy(policy), arguments.rows, arguments.prompt, arguments.response)
    settings = PPOSettings(epochs=1, minibatch=arguments.rows, kl_stop=1e9, token_budget=10**6)
    ours = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-5)
    contestants = {"ours": lambda: ppo_update(ours, optimizer, batch, settings)}
    contestants |= {"bare": bare_step(policy, batch, True), "lean": bare_step(policy, batch, False)}
    if with_trl:
        contestants["trl"] = trl_step(policy, batch)
    seconds = cpu_seconds(contestants, arguments.repeats)
    tokens = int(batch.counts.sum())
    line = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    print(f"vocab {vocab}: {policy.language_model.parameters:,} parameters, {tokens} agent tokens; CPU-seconds: {line}")
    return seconds


def passes_ratio(repeats: int) -> float:
    """Large over small forward passes: 2,048 turns of the household's lengths, eight steps."""
    torch.manual_seed(0)
    policy = new_policy(300, 64, 3, "SmallLM")
    batch = some_batch(policy, copy.deepcopy(policy), 2048, 70, 6)

    def update(token_budget: int | None):
        mine = copy.deepcopy(policy)
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-5)
        settings = PPOSettings(epochs=1, minibatch=256, kl_stop=1e9, token_budget=token_budget)
        return lambda: ppo_update(mine, optimizer, batch, settings)

    seconds = cpu_seconds({"large": update(32_768), "small": update(None)}, repeats)
    return seconds["large"] / seconds["small"]


def causal_conv(x, weight):
    """What `CausalConv` computes, for autograd to differentiate."""
    padded = torch.nn.functional.pad(x, (0, 0, len(weight) - 1, 0))
    return x + sum(w * padded[:, len(weight) - 1 - j : padded.shape[1] - j] for j, w in enumerate(weight))


def backward_ratio(repeats: int) -> float:
    """Autograd's over our own backward pass: training steps of an experience model on 32 rows."""
    torch.manual_seed(0)
    policy = new_policy(300, 64, 2, "SmallLM")
    examples = [(torch.randint(6, 300, (54,)).tolist(), torch.randint(6, 300, (18,)).tolist()) for _ in range(32)]
    by_hand = (small_lm.CausalConv.apply, small_lm.SquaredReLU.apply)

    def steps(conv, square):
        def run() -> torch.Tensor:
            small_lm.CausalConv.apply, small_lm.SquaredReLU.apply = conv, square
            for _ in range(10):
                policy.zero_grad()
                example_loss(policy.model, examples).backward()
            return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

        return run

    contestants = {"autograd": steps(causal_conv, lambda x: x.relu().square()), "by hand": steps(*by_hand)}
    assert torch.allclose(contestants["autograd"](), contestants["by hand"](), atol=1e-5)
    seconds = cpu_seconds(contestants, repeats)
    return seconds["autograd"] / seconds["by hand"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="steps that count, per contestant")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=160, help="longest prompt (tokens)")
    parser.add_argument("--response", type=int, default=48, help="longest response (tokens)")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [("two-level GAE 64x1024: loop / vectorised", gae_ratio(arguments.repeats), ">= 10")]
    small = update_seconds(2_000, arguments, not arguments.no_trl)
    large = update_seconds(16_000, arguments, not arguments.no_trl)
    if not arguments.no_trl:
        results.append(("PPO step / TRL GRPO step, vocab 2k", small["ours"] / small["trl"], "<= 1.0"))
    results.append(("PPO step / bare torch loop, vocab 2k", small["ours"] / small["bare"], "<= 1.2"))
    results.append(("PPO step / lean torch loop, vocab 2k", small["ours"] / small["lean"], "no target"))
    if not arguments.no_trl:
        results.append(("PPO step / TRL GRPO step, vocab 16k", large["ours"] / large["trl"], "<= 0.6"))
    results.append(("PPO step / bare torch loop, vocab 16k", large["ours"] / large["bare"], "no target"))
    results.append(("PPO step / lean torch loop, vocab 16k", large["ours"] / large["lean"], "no target"))
    results.append(("PPO update: GPU-sized / own passes, 0.17M", passes_ratio(arguments.repeats), "no target"))
    results.append(("SmallLM step: autograd / by hand", backward_ratio(arguments.repeats), "no target"))
    print(f"\n{'what':42} {'ratio':>7}  target")
    for name, ratio, target in results:
        bound = float(target.split()[1]) if target[0] in "<>" else None
        met = "" if bound is None else "met" if (ratio >= bound if target[0] == ">" else ratio <= bound) else "MISSED"
        print(f"{name:42} {ratio:7.2f}  {target:9} {met}")


if __name__ == "__main__":
    main()
