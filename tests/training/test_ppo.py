"""PPO from rows to a learned task: what it must not depend on, and what it must survive."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from rl_toys import DOORS, LONG, conversation, episode, gradient, mixed, new_policy, score, turn, turn_of, weights
from torch import nn

from dreamgym.core.data_structures import Task, Turn
from dreamgym.core.errors import ConfigError, DreamGymError
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.environments.base_env import CountingEnv
from dreamgym.training import ppo
from dreamgym.training.policy import TokenScores, TurnCodec
from dreamgym.training.ppo import (
    FiniteGuard,
    PPOSettings,
    TokenBatch,
    TokenRow,
    accumulate,
    adapters_off,
    collate,
    collect,
    kl_k1,
    kl_k3,
    make_batch,
    micro_batches,
    minibatches,
    pack_turns,
    ppo_loss,
    ppo_update,
    reference_scores,
    score_rows,
    token_share,
)
from dreamgym.training.rollout import RolloutConfig, rollout

PLAIN = PPOSettings(kl_coef=0.0)


@pytest.fixture
def policy():
    return new_policy()


def step(policy, batch, settings=PLAIN):
    """Metrics and gradient of one optimiser step over a whole batch."""
    metrics = accumulate(policy, batch, ppo_loss, token_share, settings)
    return metrics, gradient(policy)


def batch_of(old, advantages, values=0.0, targets=0.0, ref=None):
    zeros = torch.zeros(len(old), dtype=old.dtype)
    return TokenBatch([], torch.tensor([len(old)]), old, zeros + 1, advantages, ref, zeros + targets, zeros + values)


# ---- rows


def test_rows_are_append_only_and_breaks_are_counted(policy):
    """A turn joins the row that its prompt extends exactly; one changed id, and it starts a row of its own."""
    turns = conversation(policy, DOORS, DOORS)
    assert [len(row.spans) for row in pack_turns(turns)] == [3]
    changed = copy.copy(turns[1])
    changed = Turn([9, *turns[1].prompt_ids[1:]], turns[1].response_ids, turns[1].logprobs, 0.0, "", "", "")
    assert [len(row.spans) for row in pack_turns([turns[0], changed, turns[2]])] == [1, 1, 1]
    assert [len(row.spans) for row in pack_turns([turns[0], turns[2]])] == [2]  # it extends, by a whole turn
    batch, _ = collect([episode(policy, turns), episode(policy, [turns[0], changed])], policy)
    assert batch.metrics == {"policy/rows": 3, "policy/row_breaks": 1}


def test_packed_rows_hold_the_ids_of_the_sampler(policy):
    """Token in, token out: every prompt and response is in its row as it was, and nothing else is trained on."""
    turns = conversation(policy, ["door 1", LONG, "door 2"], ["door 3", "door 1 door 1", "door 2"])
    (row,) = pack_turns(turns)
    for turn_, (start, end) in zip(turns, row.spans, strict=True):
        assert row.ids[:start] == list(turn_.prompt_ids) and row.ids[start:end] == list(turn_.response_ids)
    rows = collate([row])
    assert rows.ids[0][rows.action_mask[0]].tolist() == [i for t in turns for i in t.response_ids]


def test_checklist_03_loss_only_on_sampled_tokens_the_end_token_included(policy, monkeypatch):
    """Prompt tokens and environment text have no gradient at their logits; the end token has."""
    turns = conversation(policy, DOORS[:2], DOORS[:2])
    (row,) = pack_turns(turns)
    seen, real = [], torch.Tensor.log_softmax

    def spy(self, *args):
        seen.append(self.shape[0])
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "log_softmax", spy)
    score_rows(policy, [row])
    assert seen == [row.tokens] == [4]  # logits exist at agent tokens only
    assert all(row.ids[end - 1] == policy.tokenizer.eos_token_id for _, end in row.spans)


def test_checklist_04_mask_from_lengths_not_from_ids(policy):
    """The padding id inside a prompt or a response is a token like any other."""
    rows = collate([TokenRow([0, 5, 0, 6], [(2, 4)]), TokenRow([5, 0], [(1, 2)])])
    assert rows.action_mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_padding_and_company_change_no_score(policy):
    turns = [t for e in mixed(policy) for t in e.turns]
    rows = pack_turns(turns, pack=False)
    together, alone = score_rows(policy, rows), score_rows(policy, rows, token_budget=1)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(together, alone, strict=True))
    assert torch.allclose(together[0], torch.tensor([lp for t in turns for lp in t.logprobs]), atol=1e-5)


def test_checklist_16_padding_never_matters_to_the_gradient(policy):
    """The same batch beside one very long row whose advantages and targets leave nothing to learn."""
    short = make_batch(mixed(policy)[:1], policy)
    both = make_batch([*mixed(policy)[:1], episode(policy, [turn(policy, " ".join([LONG] * 4), "door 1")])], policy)
    flat = torch.cat([short.advantages, torch.zeros(2)])
    both = replace(both, advantages=flat, targets=torch.cat([short.targets, both.old_values[2:]]))
    _, ours = step(policy, short)
    _, theirs = step(policy, both)
    assert torch.allclose(ours, 2 * theirs, atol=1e-6)  # twice the tokens, half of which say nothing


def test_micro_batches_stay_within_the_token_budget():
    widths = [3, 50, 4, 4, 9, 200, 1]
    cuts = micro_batches(widths, 60)
    assert sorted(i for cut in cuts for i in cut) == list(range(7))
    assert all(len(cut) * max(widths[i] for i in cut) <= 60 or len(cut) == 1 for cut in cuts)
    assert len(cuts) < 7 and micro_batches([], 60) == []


def test_minibatches_hold_every_row_once():
    lengths = [i % 17 for i in range(103)]
    torch.manual_seed(0)
    cuts = minibatches(lengths, 8)
    assert sorted(i for cut in cuts for i in cut) == list(range(103)) and max(map(len, cuts)) == 8
    assert cuts != minibatches(lengths, 8)


# ---- batches


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_packed_and_unpacked_turns_give_equal_advantages_and_loss(family):
    policy = new_policy(family=family)
    long = conversation(policy, DOORS, [*DOORS[1:], LONG], shift=0.1)
    cut = conversation(policy, [LONG, "door 2"], ["door 1", "door 2 door 3"], 0.4, shift=0.3)
    trajectories = [episode(policy, long), episode(policy, cut, False, True, LONG), *mixed(policy)]
    packed, single = (make_batch(trajectories, policy, new_policy(7, family=family), pack=p) for p in (True, False))
    assert len(packed.rows) < len(single.rows) and packed.metrics["policy/row_breaks"] == 3
    for name in ("old_logprobs", "advantages", "targets", "old_values", "ref_logprobs", "episode_tokens"):
        assert torch.allclose(getattr(packed, name), getattr(single, name), atol=1e-5), name
    ours, theirs = step(policy, packed, PPOSettings(kl_coef=0.1)), step(policy, single, PPOSettings(kl_coef=0.1))
    assert all(abs(ours[0][name] - theirs[0][name]) < 1e-5 for name in ours[0])
    assert torch.allclose(ours[1], theirs[1], atol=1e-5) and ours[1].abs().sum() > 0


def test_checklist_15_values_are_read_where_the_token_is_predicted(policy):
    """The critic's value of a token is that of what stands before it, whatever the token is."""
    t = turn(policy, "door 2", "door 1 door 3")
    _, values = score(policy, t.prompt_ids, t.response_ids)
    for n in (0, 1):
        before = [*t.prompt_ids, *t.response_ids[:n]]
        for other in (0, t.response_ids[n], t.response_ids[n] + 1):
            assert abs(values[n].item() - score(policy, before, [other])[1].item()) < 1e-6
    assert abs(values[0].item() - values[1].item()) > 1e-4


def test_order_of_episodes_changes_no_target(policy):
    episodes = mixed(policy)
    one, other = make_batch(episodes, policy), make_batch([episodes[i] for i in (2, 0, 1)], policy)
    back = other.take([3, 4, 5, 0, 1, 2])
    assert list(back.rows) == list(one.rows)
    assert torch.allclose(one.targets, back.targets, atol=1e-5)
    assert torch.allclose(one.advantages, back.advantages, atol=1e-5)


def test_checklist_17_k1_in_the_reward_is_a_cost_of_each_token_and_k3_in_the_loss_is_not(policy):
    reference, trajectories = new_policy(5), [episode(policy, [turn(policy, "door 1", "door 2", 1.0)])]
    free, _ = collect(trajectories, policy, reference)[1], None
    paid = collect(trajectories, policy, reference, kl_reward_coef=0.5)[1]
    batch = make_batch(trajectories, policy, reference)
    expected = 0.5 * kl_k1(batch.old_logprobs, batch.ref_logprobs)
    assert torch.allclose(free.rewards - paid.rewards, expected, atol=1e-6) and expected.abs().sum() > 1e-3
    in_loss = make_batch(trajectories, policy, reference).targets
    in_reward = make_batch(trajectories, policy, reference, gae_lambda=1.0, kl_reward_coef=0.5).targets
    assert not torch.allclose(in_loss, in_reward)
    assert step(policy, batch, PPOSettings(kl_coef=1.0))[0]["policy/kl_ref"] > 0


# ---- reference


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_checklist_17_lora_off_is_the_base(family):
    peft = pytest.importorskip("peft")
    policy = new_policy(family=family)
    base = copy.deepcopy(policy)
    targets = [name for name, m in policy.model.named_modules() if isinstance(m, nn.Linear) and "head" not in name]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), policy.model)
    rows = pack_turns([t for e in mixed(base) for t in e.turns])
    expected = score_rows(base, rows)[0]
    assert not torch.allclose(score_rows(policy, rows)[0], expected, atol=1e-3)
    before = [p.requires_grad for p in policy.parameters()]
    assert torch.equal(reference_scores(policy, policy, rows), expected)
    assert [p.requires_grad for p in policy.parameters()] == before  # and on again afterwards
    assert not torch.allclose(score_rows(policy, rows)[0], expected, atol=1e-3)
    batch = make_batch(mixed(policy), policy, reference=policy)
    assert (batch.ref_logprobs - batch.old_logprobs).abs().max() > 1e-3


def test_a_policy_without_lora_is_no_reference_for_itself(policy):
    with pytest.raises(ConfigError, match="no layer has LoRA"), adapters_off(policy):
        pass


# ---- the loss


def test_ppo_gradient_at_ratio_1_is_reinforce(policy):
    """Finite differences of -Σ A log π / N along random directions, against backward of the PPO loss."""
    policy.double()
    batch = make_batch(mixed(policy), policy)
    batch = replace(
        batch, old_logprobs=score_rows(policy, batch.rows)[0].double(), advantages=batch.advantages.double()
    )
    _, analytic = step(policy, batch, PPOSettings(kl_coef=0.0, value_coef=0.0))
    named = [p for p in policy.parameters() if p.grad is not None]
    torch.manual_seed(0)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in named]

        def reinforce(size, direction=direction):
            with torch.no_grad():
                for p, d in zip(named, direction, strict=True):
                    p += size * d
            value = -(batch.advantages * score_rows(policy, batch.rows)[0]).sum() / len(batch.advantages)
            with torch.no_grad():
                for p, d in zip(named, direction, strict=True):
                    p -= size * d
            return value

        numeric = (reinforce(1e-3) - reinforce(-1e-3)) / 2e-3
        exact = torch.cat([d.flatten() for d in direction]) @ analytic
        assert abs(numeric - exact) < 2e-3 * max(1.0, abs(exact)), (numeric, exact)


def test_clipped_loss_by_hand():
    scores = TokenScores(torch.tensor([0.5, 1.0, 1.5, 9.0]).log(), torch.zeros(4), torch.zeros(4))
    up, down = (
        ppo_loss(scores, batch_of(torch.zeros(4), a), PLAIN)[1]["policy/loss"] for a in (torch.ones(4), -torch.ones(4))
    )
    assert torch.allclose(up, -torch.tensor([0.5, 1.0, 1.2, 1.2]))
    assert torch.allclose(down, torch.tensor([0.8, 1.0, 1.5, 3.0]))


def test_clipped_tokens_have_no_gradient():
    """Nor do log-probabilities so far away that their ratio would overflow."""
    logprobs = torch.cat([torch.tensor([1.5, 0.5, 1.5, 0.5, 9.0]).log(), torch.tensor([500.0, 500.0])]).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0])
    scores = TokenScores(logprobs, torch.zeros(7), torch.zeros(7))
    ppo_loss(scores, batch_of(torch.zeros(7), advantages), PLAIN)[0].backward()
    assert (logprobs.grad != 0).tolist() == [False, True, True, False, False, False, False]
    assert torch.isfinite(logprobs.grad).all()


def test_value_loss_never_rewards_running_ahead():
    values, old, targets = (torch.randn(500) * s for s in (2, 1, 1))
    scores = TokenScores(torch.zeros(500), values, torch.zeros(500))
    loss = ppo_loss(scores, batch_of(torch.zeros(500), values, old, targets), PLAIN)[1]["value/loss"]
    free = ppo_loss(scores, batch_of(torch.zeros(500), values, old, targets), replace(PLAIN, value_clip=None))[1]
    assert torch.allclose(free["value/loss"], 0.5 * (values - targets).square())
    assert (loss >= free["value/loss"] - 1e-6).all() and not torch.allclose(loss, free["value/loss"])


def test_checklist_15_value_loss_on_agent_tokens_only(policy):
    """The critic's gradient is that of its values at agent tokens, by hand from the hidden states there."""
    batch = make_batch(mixed(policy), policy)
    step(policy, batch, replace(PLAIN, values_only=True))
    error = (batch.old_values - batch.targets).sum() / len(batch.targets)
    assert torch.allclose(policy.value.bias.grad, 0.5 * error[None], atol=1e-6)


def test_kl_is_zero_for_equal_policies_and_finite_for_any():
    x, far = torch.randn(50), torch.tensor([-1e4, 0.0])
    assert (kl_k3(x, x) == 0).all() and torch.isfinite(kl_k3(far, far.flip(0))).all()


def test_entropy_bonus_raises_entropy(policy):
    batch = make_batch([episode(policy, [turn(policy, s, "door 1")]) for s in DOORS], policy)
    before, optimizer = step(policy, batch)[0]["policy/entropy"], torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ppo_update(policy, optimizer, batch, replace(PLAIN, epochs=5, entropy_coef=1.0, kl_stop=1e9))
    assert step(policy, batch)[0]["policy/entropy"] > before + 0.01


# ---- one optimiser step


def test_checklist_09_first_epoch_ratio_is_exactly_one(policy):
    """Scored by the sampling policy at the sampling temperature, nothing is clipped and nothing has moved."""
    torch.manual_seed(0)
    generator = TransformersGenerator(policy.language_model)
    prompts = policy.codec.prompts([*DOORS, LONG] * 4)
    for temperature in (1.0, 0.6):
        replies = generator.generate(prompts, SamplingParams(4, temperature))
        turns = [turn_of(policy, p, r.ids, logprobs=r.logprobs) for p, r in zip(prompts, replies, strict=True)]
        batch = make_batch([episode(policy, [t]) for t in turns], policy, temperature=temperature)
        metrics, _ = step(policy, batch, replace(PLAIN, temperature=temperature))
        assert metrics["policy/logprob_change_max"] < 1e-5 and abs(metrics["policy/ratio"] - 1) < 1e-5
        assert abs(metrics["policy/kl_old"]) < 1e-6 and metrics["policy/clip_fraction"] == 0
        other, _ = step(policy, batch, replace(PLAIN, temperature=2.0))  # the wrong temperature is noticed
        assert other["policy/logprob_change_max"] > 1e-2


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_checklist_08_what_was_sampled_is_what_is_scored(family):
    """Whole conversations with the cache carried on; the gate is 1e-5, and stale log-probabilities show in every measure."""
    policy = new_policy(family=family)
    policy.codec = TurnCodec(policy.tokenizer, context="conversation")
    tasks = [Task(str(i), str(2 + i)) for i in range(4)]
    generator, config = TransformersGenerator(policy.language_model), RolloutConfig(4, max_new_tokens=3)
    played = rollout(generator, CountingEnv(4), tasks, policy.codec, config, seed=1)
    assert all(len(turn.logprobs) == len(turn.response_ids) > 0 for t in played for turn in t.turns)
    found, _ = step(policy, make_batch(played, policy))
    assert found["policy/logprob_change_max"] <= 1e-5 and found["policy/logprob_change"] <= 1e-5
    assert abs(found["policy/kl_old"]) < 1e-6 and abs(found["policy/ratio"] - 1) < 1e-5
    fresh = make_batch(played, policy)
    stale, _ = step(policy, replace(fresh, old_logprobs=fresh.old_logprobs + 0.3))
    assert stale["policy/logprob_change"] == pytest.approx(0.3, abs=1e-4)
    assert stale["policy/ratio"] == pytest.approx(math.exp(-0.3), abs=1e-4)
    assert stale["policy/kl_old"] == pytest.approx(math.exp(-0.3) - 1 + 0.3, abs=1e-4)


def test_batch_1_accumulated_8_times_equals_batch_8():
    """Six AdamW updates at one row per forward pass and at eight; its epsilon keeps rounding from becoming a step."""
    ends = []
    for budget in (1, 10**6):
        policy = new_policy()
        episodes = [
            episode(policy, [turn(policy, s, a, float(s == a), shift=0.05)]) for s in [*DOORS, LONG] for a in DOORS
        ]
        batch, optimizer = make_batch(episodes[:8], policy), torch.optim.AdamW(policy.parameters(), lr=3e-4, eps=1e-4)
        torch.manual_seed(0)
        metrics = ppo_update(policy, optimizer, batch, replace(PLAIN, epochs=6, token_budget=budget, kl_stop=1e9))
        assert metrics["policy/updates"] == 6
        ends.append(weights(policy))
    assert (ends[0] - ends[1]).abs().max() < 1e-5 and not torch.equal(ends[0], weights(new_policy()))


def test_checklist_14_loss_is_normalised_by_the_agent_tokens_of_the_whole_step(policy):
    """Long responses weigh by their tokens, however rows fall into micro-batches; doubling every row changes nothing."""
    batch = make_batch(mixed(policy, shift=0.2), policy)
    rows = list(range(len(batch.rows)))
    at_once, gradient_at_once = step(policy, batch)
    for settings, chosen in ((replace(PLAIN, token_budget=1), rows), (PLAIN, rows * 2), (PLAIN, rows[::-1])):
        metrics, other = step(policy, batch.take(chosen), settings)
        assert torch.allclose(gradient_at_once, other, atol=1e-6)
        assert all(abs(metrics[name] - at_once[name]) < 1e-5 for name in metrics if name != "tokens")
    assert gradient_at_once.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checklist_18_dropout_is_off_in_both_passes(checkpointing):
    """A model full of dropout, in training mode: ratio 1 at the first step, and the mode is as it was."""
    policy = new_policy(family="Llama", attention_dropout=0.5)
    policy.model.lm_head = nn.Sequential(nn.Dropout(0.5), policy.model.lm_head)
    if checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.train()
    batch = make_batch(mixed(policy), policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    metrics = ppo_update(policy, optimizer, batch, replace(PLAIN, epochs=1))
    assert metrics["policy/mismatch_max"] < 1e-5 and metrics["policy/updates"] == 1
    assert all(module.training for module in policy.modules())


# ---- updates


@pytest.mark.parametrize("poison", ["reward", "logprobs", "infinite reward"])
def test_a_loss_that_is_not_finite_changes_nothing(policy, poison):
    good = turn(policy, "door 1", "door 1", 1.0)
    bad = {
        "reward": turn(policy, "door 2", "door 2", math.nan),
        "infinite reward": turn(policy, "door 2", "door 2", math.inf),
        "logprobs": turn(policy, "door 2", "door 2", 0.5, logprobs=[math.nan, 0.0]),
    }[poison]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    before = weights(policy)
    batch = make_batch([episode(policy, [good]), episode(policy, [bad])], policy)
    metrics = ppo_update(policy, optimizer, batch, PPOSettings(epochs=2, minibatch=8))
    assert torch.equal(before, weights(policy))
    assert metrics["policy/skipped_updates"] == 2 and metrics["policy/updates"] == 0
    again = ppo_update(policy, optimizer, make_batch([episode(policy, [good])], policy), PPOSettings(epochs=1))
    assert again["policy/updates"] == 1 and torch.isfinite(weights(policy)).all()
    assert not torch.equal(before, weights(policy))


def test_five_steps_in_a_row_that_are_not_finite_stop_the_run(policy):
    batch = make_batch([episode(policy, [turn(policy, "door 2", "door 2", math.nan)])], policy)
    optimizer, before = torch.optim.AdamW(policy.parameters(), lr=0.1), weights(policy)
    with pytest.raises(DreamGymError, match="5 optimiser steps in a row"):
        ppo_update(policy, optimizer, batch, PPOSettings(epochs=9))
    guard = FiniteGuard()  # one for a run counts across updates
    for _ in range(2):
        ppo_update(policy, optimizer, batch, PPOSettings(epochs=2), guard=guard)
    with pytest.raises(DreamGymError):
        ppo_update(policy, optimizer, batch, PPOSettings(epochs=2), guard=guard)
    assert torch.equal(before, weights(policy))


def test_equal_returns_move_only_the_critic(policy):
    """Without variance there is nothing to learn from for the policy."""
    with torch.no_grad():
        policy.value.weight.zero_(), policy.value.bias.zero_()
    batch = make_batch([episode(policy, [turn(policy, s, "door 1", 0.0)]) for s in DOORS], policy)
    assert (batch.advantages == 0).all() and step(policy, batch)[0]["policy/loss"] == 0


def test_a_warm_up_of_the_critic_moves_its_head_only(policy):
    batch, trunk = make_batch(mixed(policy), policy), [p.clone() for p in policy.model.parameters()]
    head, optimizer = policy.value.weight.clone(), torch.optim.AdamW(policy.parameters(), lr=0.1)
    ppo_update(policy, optimizer, batch, replace(PLAIN, values_only=True))
    assert all(torch.equal(a, b) for a, b in zip(trunk, policy.model.parameters(), strict=True))
    assert not torch.equal(head, policy.value.weight)


def test_one_minibatch_far_from_the_rest_does_not_end_an_update(policy, monkeypatch):
    """Only a mean over several steps does; a single token counts at most ten."""
    batch, optimizer = make_batch(mixed(policy), policy), torch.optim.SGD(policy.parameters(), lr=0.0)
    seen = iter([0.01, 0.15, 0.01, 0.01, 0.3, 0.3] + [0.0] * 99)
    real = ppo.accumulate
    monkeypatch.setattr(ppo, "accumulate", lambda *args: real(*args) | {"policy/kl_old": next(seen)})
    metrics = ppo_update(policy, optimizer, batch, replace(PLAIN, epochs=9, minibatch=len(batch.rows), kl_stop=0.1))
    assert metrics["policy/updates"] == 4 and metrics["policy/kl_stops"] == 1
    assert ppo.drift(torch.tensor([15.0]), 0.2)["policy/kl_old"].item() == 10


def test_kl_stop_is_checked_before_each_minibatch(policy):
    """The update ends in the middle of an epoch, before the step that would go further, and that is counted."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    episodes = [episode(policy, [turn(policy, s, d, float(s == d))]) for s in DOORS for d in DOORS] * 4
    batch = make_batch(episodes, policy)
    torch.manual_seed(0)
    metrics = ppo_update(policy, optimizer, batch, replace(PLAIN, epochs=50, minibatch=4, kl_stop=0.02))
    assert 0 < metrics["policy/updates"] < 9 and metrics["policy/kl_stops"] == 1  # an epoch has 9
    stale = make_batch([episode(policy, [turn(policy, "door 1", "door 2", 1.0, shift=2.0)])] * 2, policy)
    before = weights(policy)
    metrics = ppo_update(policy, optimizer, stale, PLAIN)
    assert metrics["policy/updates"] == 0 and torch.equal(before, weights(policy)) and metrics["policy/kl_old"] > 0.05


def test_the_kl_term_holds_the_policy_back():
    def drift(kl_coef):
        policy, reference = new_policy(), new_policy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        torch.manual_seed(0)
        for _ in range(20):
            episodes = [episode(policy, [turn(policy, s, d, float(s == d))]) for s in DOORS for d in DOORS]
            batch = make_batch(episodes, policy, reference)
            metrics = ppo_update(policy, optimizer, batch, PPOSettings(epochs=1, kl_coef=kl_coef, kl_stop=1e9))
        return metrics["policy/kl_ref"]

    free, loose, tight = drift(0.0), drift(1.0), drift(10.0)
    assert 0 < tight < 0.2 * loose < 0.1 * free, (tight, loose, free)
