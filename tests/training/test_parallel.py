"""One rank against two: the same episodes, spread over processes by DDP or FSDP2, train the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rl_toys import DOORS, LONG, conversation, episode, mixed, new_policy, turn

from dreamgym.training.grpo import GRPOSettings, grpo_update, make_group_batch
from dreamgym.training.ppo import PPOSettings, make_batch, ppo_update

KINDS = ("ddp ppo", "ddp grpo", "fsdp ppo")
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
    """Six AdamW updates. Returns its metrics."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    if kind.startswith("ddp") and accelerator:
        policy, optimizer = accelerator.prepare(policy, optimizer)
    torch.manual_seed(0)
    if kind.endswith("grpo"):
        batch = make_group_batch(mine, policy, accelerator=accelerator)
        return grpo_update(policy, optimizer, batch, GRPO, accelerator)
    batch = make_batch(mine, policy, new_policy(5), accelerator=accelerator)
    return ppo_update(policy, optimizer, batch, PPO, accelerator)


def full(policy):
    tensors = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in policy.parameters()]
    return torch.cat([t.flatten() for t in tensors])


def worker(out):
    """One of two ranks: its half of the episodes, under each kind of sharding."""
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    accelerator, results = Accelerator(cpu=True), {}
    assert accelerator.num_processes == 2
    for kind in KINDS:
        policy = new_policy()
        mine = episodes(policy)[4 * accelerator.process_index :][:4]
        if kind.startswith("fsdp"):
            fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
            assert all(p.to_local().numel() < p.numel() for p in policy.parameters() if p.shape[0] > 1)
        metrics = train(kind, policy, mine, accelerator)
        results[kind] = {"weights": full(policy), "metrics": metrics}
    if accelerator.is_main_process:
        torch.save(results, out)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "two.pt"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_two_ranks_after_6_adamw_updates(two_ranks, kind):
    policy = new_policy()
    before = full(policy)
    metrics = train(kind, policy, episodes(policy))
    theirs = two_ranks[kind]
    assert metrics["policy/updates"] == theirs["metrics"]["policy/updates"] == 6
    assert (full(policy) - theirs["weights"]).abs().max() <= 1e-5, kind
    assert (full(policy) - before).abs().max() > 1e-4
    local = {"policy/rows", "policy/row_breaks", "policy/flat_groups"}  # what a rank says of its own episodes
    for name in metrics.keys() - local:
        assert abs(metrics[name] - theirs["metrics"][name]) < 1e-4, name


if __name__ == "__main__":
    worker(sys.argv[1])
