"""Estimators: golden values by hand, what they must not depend on, and that they are fast."""

import math

import pytest
import torch
from rl_toys import conversation, episode, mixed, new_policy, score, turn

from dreamgym.training.advantages import (
    flat_fraction,
    gigpo_advantages,
    group_ids,
    group_moments,
    grpo_advantages,
    pad_episodes,
    rloo_advantages,
    truncation_bootstrap,
    two_level_gae,
    whiten,
)
from dreamgym.training.ppo import bootstrap_values, collect, make_batch

BOTH = {"gamma": 0.99, "gae_lambda": 0.95, "gamma_token": 0.99, "lambda_token": 0.95}


@pytest.fixture
def policy():
    return new_policy()


def by_row(rewards, values, ends, length, bootstrap, gamma, lam, gamma_token, lambda_token):
    """GAE of one episode, as the textbook has it."""
    advantages, running = [0.0] * length, 0.0
    for t in reversed(range(length)):
        g, decay = (gamma, lam) if ends[t] else (gamma_token, lambda_token)
        last = t == length - 1
        running = rewards[t] + g * (bootstrap if last else values[t + 1]) - values[t] + (not last) * g * decay * running
        advantages[t] = running
    return advantages


# ---- two-level GAE


def test_checklist_10_golden_first_token_advantage_is_0_6509():
    """Two turns of 4 tokens, reward 1 at the end: (γλ)^7 at the first token; the γ of turns only: once."""
    rewards, values = torch.zeros(1, 8), torch.zeros(1, 8)
    rewards[0, 7] = 1.0
    ends = torch.tensor([[0, 0, 0, 1] * 2]).bool()
    advantages = two_level_gae(rewards, values, ends, torch.ones(1, 8).bool(), torch.zeros(1), **BOTH)
    assert round(float(advantages[0, 0]), 4) == 0.6509
    sparse = two_level_gae(rewards, values, ends, torch.ones(1, 8).bool(), torch.zeros(1), 0.99, 0.95)
    assert math.isclose(float(sparse[0, 0]), 0.99 * 0.95, rel_tol=1e-6)  # turn ends come from turn ids, not rewards


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("inserted", [0, 3, 40])
def test_checklist_10_inserted_environment_tokens_and_values_there_change_no_advantage(
    policy, inserted, pack, monkeypatch
):
    """The golden value again, from rows with environment tokens between the turns, under a critic that raves there."""
    monkeypatch.setattr("dreamgym.training.ppo.whiten", lambda x, _: x)
    states = ["door 1", " ".join(["nothing here"] * (1 + inserted))]
    turns = conversation(policy, states, ["door 1 door 2 door 3", "door 3 door 2 door 1"])
    real = type(policy).forward

    def raving(self, rows, temperature=1.0):  # the critic is silent at agent tokens and shouts everywhere else
        scores = real(self, rows, temperature)
        everywhere = torch.full(rows.ids.shape, 1e6)
        everywhere[:, :-1][rows.action_mask[:, 1:]] = 0.0
        return type(scores)(scores.logprobs, everywhere[:, :-1][rows.action_mask[:, 1:]], scores.entropies)

    monkeypatch.setattr(type(policy), "forward", raving)
    batch = make_batch([episode(policy, turns)], policy, pack=pack, **BOTH)
    assert len(batch.rows) == (1 if pack else 2) and len(batch.advantages) == 8
    assert round(float(batch.advantages[0]), 4) == 0.6509 and float(batch.advantages[-1]) == 1.0


def test_gae_of_ragged_episodes_equals_one_at_a_time():
    torch.manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 33])
    rewards, mask = pad_episodes(torch.randn(45), lengths)
    values, bootstrap = torch.randn(4, 33), torch.tensor([0.2, 0.0, -1.0, 0.5])
    ends = torch.rand(4, 33) < 0.3
    together = two_level_gae(rewards, values, ends, mask, bootstrap, 0.97, 0.9, 0.99, 0.8)
    for b, n in enumerate(lengths.tolist()):
        alone = by_row(rewards[b], values[b], ends[b], n, float(bootstrap[b]), 0.97, 0.9, 0.99, 0.8)
        assert torch.allclose(together[b, :n], torch.tensor([float(a) for a in alone]), atol=1e-5)
        assert (together[b, n:] == 0).all()


def test_what_stands_on_padding_changes_no_advantage():
    rewards, mask = pad_episodes(torch.randn(5), torch.tensor([2, 3]))
    ends, values = torch.zeros(2, 3).bool(), torch.randn(2, 3)
    clean = two_level_gae(rewards, values, ends, mask, torch.ones(2))
    dirty = two_level_gae(rewards + ~mask * 7.0, values + ~mask * 9.0, ends | ~mask, mask, torch.ones(2))
    assert torch.equal(clean, dirty)


def test_vectorised_gae_equals_a_loop_over_rows():
    """64 × 1024, against pure Python numbers; `tests/benchmarks/bench_rl.py` compares their speed."""
    rewards, values = torch.randn(64, 1024), torch.randn(64, 1024)
    ends, mask, bootstrap = torch.rand(64, 1024) < 0.1, torch.ones(64, 1024).bool(), torch.zeros(64)
    columns = [x.tolist() for x in (rewards, values, ends)]
    loop = torch.tensor([by_row(*row, 1024, 0.0, 0.97, 0.9, 1.0, 1.0) for row in zip(*columns, strict=True)])
    assert torch.allclose(loop, two_level_gae(rewards, values, ends, mask, bootstrap), atol=1e-3)


# ---- the end of an episode


def test_checklist_11_truncated_is_not_terminated(policy):
    """A cut-off episode keeps the value of where it stopped; both flags: terminated wins."""
    turns = [turn(policy, "door 1", "door 1"), turn(policy, "door 2", "door 3")]
    over, cut = episode(policy, turns), episode(policy, turns, False, True, final="door 3")
    both = episode(policy, turns, True, True, final="door 3")
    values = bootstrap_values([over, cut, both], policy)
    expected = score(policy, policy.codec.prompts(["door 3"])[0], policy.codec.response("door 1"))[1][0].item()
    assert values[0] == values[2] == 0 and abs(values[1].item() - expected) < 1e-6 and abs(expected) > 1e-3
    targets = [make_batch([e], policy, gamma=0.9, gae_lambda=1.0).targets[-1].item() for e in (over, cut)]
    assert abs(targets[0]) < 1e-6 and abs(targets[1] - 0.9 * expected) < 1e-6


def test_checklist_11_terminated_wins_over_truncated():
    flags = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool()
    assert truncation_bootstrap(torch.ones(4), *flags.T).tolist() == [0, 1, 0, 0]


def test_checklist_12_reward_on_the_last_token_and_penalty_as_its_own_term(policy):
    trajectories = [episode(policy, [turn(policy, "door 1", "door 2", 0.5, 0.2), turn(policy, "door 1", "door 3")])]
    _, credit = collect(trajectories, policy)
    assert torch.allclose(credit.rewards, torch.tensor([0, 0.3, 0, 0])) and credit.turn_ends.tolist() == [0, 1, 0, 1]
    assert trajectories[0].episode_return == 0.5  # what is reported stays the reward


# ---- whitening


def test_checklist_13_whitening_over_agent_tokens():
    assert whiten(torch.tensor([3.0, 3.0, 3.0])).tolist() == [0, 0, 0]
    white = whiten(torch.randn(1000) * 7 + 3)
    assert abs(white.mean()) < 1e-5 and abs(white.square().mean() - 1) < 1e-4


def test_checklist_13_whitening_is_global_over_packed_and_unpacked_rows(policy):
    advantages = make_batch(mixed(policy), policy).advantages
    assert abs(advantages.mean()) < 1e-5 and abs(advantages.square().mean() - 1) < 1e-4


# ---- groups


def test_checklist_13_group_statistics_count_each_episode_once(policy):
    """Returns 1 and 0 have mean 1/2: a member is a member (test_grpo.py has episodes of many and few tokens)."""
    mean, std, size = group_moments(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert mean.tolist() == [0.5, 0.5] and std.tolist() == [0.5, 0.5] and size.tolist() == [2, 2]


def test_checklist_13_groups_without_variance_give_zeros_and_are_counted():
    returns, groups = torch.tensor([0.1 + 0.2, 0.3, 1.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 1, 2])
    advantages = grpo_advantages(returns, groups)
    assert advantages[[0, 1, 4]].tolist() == [0, 0, 0] and torch.allclose(advantages[2:4], torch.tensor([1.0, -1.0]))
    assert abs(flat_fraction(returns, groups) - 2 / 3) < 1e-6


def test_group_order_and_numbering_change_nothing():
    torch.manual_seed(0)
    returns, groups = torch.randn(12), torch.arange(12) % 3
    order = torch.randperm(12)
    for estimator in (grpo_advantages, rloo_advantages):
        shuffled = estimator(returns[order], (2 - groups)[order])
        assert torch.allclose(shuffled, estimator(returns, groups)[order], atol=1e-6)


def test_rloo_baseline_is_the_mean_of_the_others():
    returns = torch.tensor([3.0, 1.0, 0.5, 2.0])
    expected = [r - (6.5 - r) / 3 for r in returns.tolist()]
    assert torch.allclose(rloo_advantages(returns, torch.zeros(4).long()), torch.tensor(expected))
    assert rloo_advantages(torch.tensor([4.0]), torch.tensor([0])).tolist() == [0]


def test_gigpo_by_hand():
    """Three episodes of one task; the state 's' is met by all, once twice in an episode, 'x' by one only."""
    rewards, mask = pad_episodes(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([2, 2, 1]))
    anchors, groups = ["s", "x", "s", "s", "y"], torch.tensor([0, 0, 0])
    ours = gigpo_advantages(rewards, mask, groups, anchors, gamma=0.5, step_weight=2.0)
    episodes = torch.tensor([1.0, 0.0, 0.0])
    level = (episodes - 1 / 3) / (2 / 9) ** 0.5
    at_s = torch.tensor([0.5, 0.0, 0.0])
    step = (at_s - 1 / 6) / (1 / 18) ** 0.5
    expected = torch.stack([level[0] + 2 * step[0], level[0], level[1] + 2 * step[1], level[1] + 2 * step[2], level[2]])
    assert torch.allclose(ours, expected, atol=1e-5)


def test_gigpo_steps_of_different_tasks_never_meet():
    rewards, mask = pad_episodes(torch.tensor([1.0, 0.0]), torch.tensor([1, 1]))
    assert gigpo_advantages(rewards, mask, torch.tensor([0, 1]), ["s", "s"]).tolist() == [0, 0]
    assert gigpo_advantages(rewards, mask, torch.tensor([0, 0]), ["s", "s"]).tolist() == [2, -2]


def test_gigpo_without_recurring_states_is_grpo():
    rewards, mask = pad_episodes(torch.tensor([0.0, 1.0, 0.0, 0.5]), torch.tensor([1, 2, 1]))
    groups = torch.tensor([0, 0, 0])
    expected = grpo_advantages(torch.tensor([0.0, 1.0, 0.5]), groups)[torch.tensor([0, 1, 1, 2])]
    assert torch.allclose(gigpo_advantages(rewards, mask, groups, list("abcd")), expected)


def test_group_ids_take_any_key():
    assert group_ids([("real", "t", 0), ("dream", "t", 0), ("real", "t", 0)]).tolist() == [0, 1, 0]
    assert group_ids([]).tolist() == []
