"""One rank against two: the same episodes, spread over processes by DDP, FSDP2 or DeepSpeed, train the same weights."""

import sys
from dataclasses import replace

import pytest
import torch
from rl_toys import DOORS, LONG, ZERO, conversation, end_rank, episode, mixed, new_policy, run_two_ranks, turn

from dreamgym.core.config import TrainingConfig
from dreamgym.training.grpo import GRPOSettings, grpo_update, make_group_batch
from dreamgym.training.ppo import PPOSettings, make_batch, ppo_update
from dreamgym.training.scale import is_zero, make_accelerator

KINDS = ("ddp ppo", "ddp grpo", "ddp guards", "fsdp ppo")
ZERO_KINDS = tuple(f"zero{stage} {what}" for stage in (1, 2) for what in ("ppo", "grpo", "guards"))
PPO = PPOSettings(epochs=6, token_budget=40, kl_coef=0.1, kl_stop=1e9)
GRPO = GRPOSettings(epochs=6, token_budget=40, aggregation="sequence-mean", kl_stop=1e9)


def episodes(policy):
    """Eight episodes, two of each task; the halves differ much in rows and tokens."""
    first = mixed(policy, shift=0.2) + [episode(policy, conversation(policy, DOORS, [*DOORS[1:], LONG], shift=0.1))]
    second = [episode(policy, [turn(policy, s, "door 1", float(s == "door 1"))]) for s in (*DOORS, "door 1")]
    both = [*first, *second]
    return [
        type(e)(
            e.turns,
            e.task,
            i // 2,
            *[getattr(e, n) for n in ("source", "version", "terminated", "truncated")],
            final_prompt_ids=e.final_prompt_ids,
        )
        for i, e in enumerate(both)
    ]


def train(kind, policy, mine, accelerator=None):
    """Six AdamW updates, or one of each kind that does not step as usual. Returns metrics."""
    groups = [{"params": list(policy.model.parameters())}, {"params": list(policy.value.parameters()), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4)
    if accelerator and not kind.startswith("fsdp"):
        policy, optimizer = accelerator.prepare(policy, optimizer)
    torch.manual_seed(0)
    if kind.endswith("grpo"):
        batch = make_group_batch(mine, policy, accelerator=accelerator)
        return grpo_update(policy, optimizer, batch, GRPO, accelerator)
    batch = make_batch(mine, policy, new_policy(5), accelerator=accelerator)
    if kind.endswith("ppo"):
        return ppo_update(policy, optimizer, batch, PPO, accelerator)
    found = [ppo_update(policy, optimizer, *how, accelerator) for how in guarded(batch)]
    return {f"{i} {name}": value for i, row in enumerate(found) for name, value in row.items()}


def guarded(batch):
    """The critic alone, a stop on KL, a loss and a gradient that are not finite; then as usual."""
    few = replace(PPO, epochs=2)
    yield batch, replace(few, values_only=True)
    yield batch, replace(few, kl_stop=0.0)
    yield replace(batch, advantages=batch.advantages * torch.nan), few
    yield replace(batch, advantages=batch.advantages * 1e30), few
    yield batch, few


def full(policy):
    tensors = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in policy.parameters()]
    return torch.cat([t.flatten() for t in tensors])


def worker(out):
    """One of two ranks: its half of the episodes, under each kind of sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    accelerator, results = make_accelerator(TrainingConfig(device="cpu")), {}
    assert accelerator.num_processes == 2
    for kind in ZERO_KINDS if is_zero(accelerator) else KINDS:
        policy = new_policy()
        mine = episodes(policy)[4 * accelerator.process_index :][:4]
        if kind.startswith("fsdp"):
            fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
            assert all(p.to_local().numel() < p.numel() for p in policy.parameters() if p.shape[0] > 1)
        if kind.startswith("zero"):
            accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = int(kind[4])
        metrics = train(kind, policy, mine, accelerator)
        results[kind] = {"weights": full(policy), "metrics": metrics}
    if accelerator.is_main_process:
        torch.save(results, out)
    end_rank(accelerator)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "two.pt"
    run_two_ranks(__file__, out)
    return torch.load(out)


@pytest.fixture(scope="module")
def two_zero_ranks(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'dreamgym[deepspeed]'")
    out = tmp_path_factory.mktemp("ranks") / "zero.pt"
    run_two_ranks(__file__, out, **ZERO)
    return torch.load(out)


def check(kind, theirs):
    """The same on one rank."""
    policy = new_policy()
    before = full(policy)
    metrics = train(kind, policy, episodes(policy))
    assert (full(policy) - theirs["weights"]).abs().max() <= 1e-5, kind
    assert (full(policy) - before).abs().max() > 1e-4
    local = ("policy/rows", "policy/row_breaks", "policy/flat_groups")  # what a rank says of its own episodes
    for name in (name for name in metrics if not name.endswith(local)):
        assert metrics[name] == pytest.approx(theirs["metrics"][name], rel=1e-4, abs=1e-4, nan_ok=True), name
    return metrics


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_two_ranks_after_6_adamw_updates(two_ranks, kind):
    metrics = check(kind, two_ranks[kind])
    assert kind.endswith("guards") or metrics["policy/updates"] == 6


@pytest.mark.parametrize("kind", ZERO_KINDS)
def test_one_rank_equals_two_zero_ranks_after_6_adamw_updates(two_zero_ranks, kind):
    metrics = check(kind, two_zero_ranks[kind])
    assert kind.endswith("guards") or metrics["policy/updates"] == 6


def test_guards_take_the_steps_they_should(two_ranks):
    found = two_ranks["ddp guards"]["metrics"]
    assert [found[f"{i} policy/updates"] for i in range(5)] == [2, 0, 0, 0, 2]
    assert [found[f"{i} policy/skipped_updates"] for i in range(5)] == [0, 0, 2, 2, 0] and found[
        "1 policy/kl_stops"
    ] == 1


if __name__ == "__main__":
    worker(sys.argv[1])
