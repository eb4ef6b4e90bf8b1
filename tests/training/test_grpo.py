"""GRPO: groups, aggregations, and what they must not depend on."""

from dataclasses import replace

import pytest
import torch
from rl_toys import DOORS, LONG, conversation, episode, gradient, new_policy, turn, weights

from dreamgym.core.errors import ConfigError
from dreamgym.training.advantages import grpo_advantages
from dreamgym.training.grpo import GRPOSettings, grpo_loss, grpo_share, grpo_update, make_group_batch
from dreamgym.training.ppo import accumulate

AGGREGATIONS = ("token-mean", "sequence-mean", "dr-grpo")


@pytest.fixture
def policy():
    return new_policy()


def groups_of(policy, shift=0.0):
    """Two tasks of two episodes: conversations of different lengths, one of which was cut off."""
    one = conversation(policy, DOORS, [*DOORS[1:], LONG], 1.0, shift=shift)
    two = conversation(policy, DOORS[:1], DOORS[1:2], 0.0, shift=-shift)
    three = [turn(policy, "door 1", "door 2 door 2", 0.5, 0.1), turn(policy, LONG, "door 3", shift=shift)]
    four = conversation(policy, [LONG, "door 2"], ["door 1", "door 2"], 0.2)
    first = [episode(policy, one, task="a"), episode(policy, two, task="a")]
    return first + [episode(policy, three, False, True, task="b"), episode(policy, four, task="b")]


def step(policy, batch, settings):
    metrics = accumulate(policy, batch, grpo_loss, grpo_share, settings)
    return metrics, gradient(policy)


def test_group_statistics_count_each_episode_once_however_many_tokens_it_has(policy):
    batch = make_group_batch(groups_of(policy), policy)
    expected = grpo_advantages(torch.tensor([1.0, 0.0, 0.4, 0.2]), torch.tensor([0, 0, 1, 1]))
    tokens = [sum(len(t.response_ids) for t in e.turns) for e in groups_of(policy)]
    assert len(set(tokens)) > 2 and torch.allclose(batch.advantages, expected.repeat_interleave(torch.tensor(tokens)))
    assert batch.metrics["policy/flat_groups"] == 0 and batch.old_values is None


def test_equal_returns_teach_nothing_and_are_counted(policy):
    episodes = [episode(policy, [turn(policy, "door 1", d, 0.3)]) for d in DOORS]
    batch = make_group_batch(episodes, policy)
    assert (batch.advantages == 0).all() and batch.metrics["policy/flat_groups"] == 1


def test_an_episode_without_siblings_gets_nothing_and_a_batch_of_such_is_refused(policy):
    episodes = [
        episode(policy, [turn(policy, "door 1", "door 1", r)], task=t) for r, t in ((1, "a"), (0, "a"), (1, "b"))
    ]
    assert make_group_batch(episodes, policy, estimator="rloo").advantages.tolist() == [1, 1, -1, -1, 0, 0]
    with pytest.raises(ConfigError, match="task 'a': group has 1 rollout"):
        make_group_batch(episodes[1:], policy)


def test_dreams_and_real_episodes_of_a_task_are_different_groups(policy):
    real, other = groups_of(policy)[:2]
    dreams = [replace(real, source="dream"), replace(other, source="dream", turns=other.turns)]
    batch = make_group_batch([real, other, *dreams], policy)
    alone = make_group_batch([real, other], policy)
    assert torch.allclose(batch.advantages, alone.advantages.repeat(2))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_and_unpacked_turns_give_equal_loss(policy, aggregation):
    settings = GRPOSettings(aggregation=aggregation, kl_coef=0.1)
    results = []
    for pack in (True, False):
        batch = make_group_batch(groups_of(policy, 0.2), policy, new_policy(5), "gigpo", pack=pack)
        results.append((len(batch.rows), batch.advantages, *step(policy, batch, settings)))
    (rows, a, found, ours), (more_rows, b, also, theirs) = results
    assert rows < more_rows and torch.equal(a, b) and torch.allclose(ours, theirs, atol=1e-5)
    assert all(abs(found[name] - also[name]) < 1e-5 for name in found) and ours.abs().sum() > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_does_not_depend_on_micro_batches(policy, aggregation):
    batch = make_group_batch(groups_of(policy, 0.2), policy, pack=False)  # an episode's rows fall into different ones
    settings = GRPOSettings(aggregation=aggregation)
    _, at_once = step(policy, batch, settings)
    _, one_by_one = step(policy, batch, replace(settings, token_budget=1))
    assert torch.allclose(at_once, one_by_one, atol=1e-6) and at_once.abs().sum() > 0


def test_aggregations_by_hand(policy):
    """A long good episode and a short bad one at ratio 1: ℓ = -A."""
    long, short = turn(policy, "door 1", "door 1 door 1 door 1", 1.0), turn(policy, "door 1", "door 2")
    batch = make_group_batch([episode(policy, [t]) for t in (long, short)], policy)
    expected = {"token-mean": (-4 + 2) / 6, "sequence-mean": 0.0, "dr-grpo": (-4 + 2) / 8 / 2}
    for name, value in expected.items():
        settings = GRPOSettings(aggregation=name, max_tokens=8)
        totals = []

        def loss(scores, tokens, settings, totals=totals):
            total, columns = grpo_loss(scores, tokens, settings)
            totals.append(float(total.detach()) / grpo_share(tokens, settings))
            return total, columns

        accumulate(policy, batch, loss, grpo_share, settings)
        assert abs(totals[0] - value) < 1e-5


def test_the_critic_is_not_needed_and_does_not_move(policy):
    with torch.no_grad():
        policy.value.bias.fill_(float(7))
    batch = make_group_batch(groups_of(policy), policy)
    head, before = policy.value.weight.clone(), weights(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    metrics = grpo_update(policy, optimizer, batch, GRPOSettings(epochs=2, kl_stop=1e9))
    assert torch.equal(head, policy.value.weight) and not torch.equal(before, weights(policy))
    assert metrics["policy/updates"] == 2 and metrics["policy/mismatch_max"] < 1e-5
    assert not any(name.startswith("value/") for name in metrics)


def test_penalties_count_in_the_return_that_is_compared(policy):
    episodes = [episode(policy, [turn(policy, "door 1", "door 1", 0.0, penalty)]) for penalty in (0.0, 0.1)]
    assert make_group_batch(episodes, policy).advantages.tolist() == pytest.approx([1, 1, -1, -1], abs=1e-4)
