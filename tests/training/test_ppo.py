"""PPO from the golden advantage to a learned task: what it must not depend on, and what it must survive."""

import math

import pytest
import torch

from dreamgym.core.data_structures import Task, Trajectory, Turn
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.core.language_model import (
    LanguageModel,
    build_model,
    train_tokenizer,
)
from dreamgym.training.advantages import pad_episodes, two_level_gae, whiten
from dreamgym.training.policy import Policy
from dreamgym.training.ppo import (
    bootstrap_values,
    kl_k3,
    make_batch,
    minibatch_loss,
    minibatches,
    policy_loss,
    ppo_update,
    score_turns,
    value_loss,
)

DOORS = ["door 1", "door 2", "door 3"]
BOTH = {"gamma": 0.99, "gae_lambda": 0.95, "gamma_token": 0.99, "lambda_token": 0.95}


def new_policy(seed=1, hidden=32):
    tokenizer = train_tokenizer([*DOORS, "nothing here"])
    policy = Policy(LanguageModel(build_model(tokenizer, hidden_size=hidden, layers=1, seed=seed), tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():  # as after some training: a critic that says something, layers that do something
        for weights in policy.parameters():
            weights += 0.05 * torch.randn_like(weights)
    return policy


@pytest.fixture
def policy():
    return new_policy()


def turn(policy, state, action, reward=0.0, penalty=0.0, logprobs=None):
    (prompt,), response = policy.codec.prompts([state]), policy.codec.response(action)
    if logprobs is None:
        (scores,), _ = score_turns(policy, [prompt], [response])
        logprobs = scores.tolist()
    return Turn(prompt, response, logprobs, reward, state, action, action, penalty=penalty)


def episode(policy, turns, terminated=True, truncated=False, final="door 1"):
    (final_prompt,) = policy.codec.prompts([final])
    prompt = final_prompt if truncated else ()
    return Trajectory(turns, Task("t", "i"), 0, "real", 0, terminated, truncated, None, None, final, prompt)


# ---- advantages


def test_golden_advantage():
    """Two turns of 4 tokens, reward 1 at the end: (γλ)^7 = 0.6509 at the first token."""
    rewards, values = torch.zeros(1, 8), torch.zeros(1, 8)
    rewards[0, 7] = 1.0
    ends = torch.tensor([[0, 0, 0, 1] * 2]).bool()
    advantages = two_level_gae(rewards, values, ends, torch.ones(1, 8).bool(), torch.zeros(1), **BOTH)
    assert round(float(advantages[0, 0]), 4) == 0.6509
    sparse = two_level_gae(rewards, values, ends, torch.ones(1, 8).bool(), torch.zeros(1), 0.99, 0.95)
    assert math.isclose(float(sparse[0, 0]), 0.99 * 0.95, rel_tol=1e-6)  # discounted once, at the turn without a reward


@pytest.mark.parametrize("extra", [0, 3, 40])
def test_golden_advantage_of_real_turns(policy, extra, monkeypatch):
    """However long the prompts between the turns are, and whatever the critic says there."""
    states = ["door 1", " ".join(["nothing here"] * (1 + extra))]
    turns = [turn(policy, states[0], "door 1 door 2 door 3"), turn(policy, states[1], "door 3 door 2 door 1", 1.0)]
    assert [len(t.response_ids) for t in turns] == [4, 4]
    monkeypatch.setattr("dreamgym.training.ppo.whiten", lambda x: x)
    monkeypatch.setattr("dreamgym.training.ppo.two_level_gae", lambda *a: two_level_gae(*a[:5], **BOTH))
    with torch.no_grad():
        policy.value.weight.zero_(), policy.value.bias.zero_()
    batch = make_batch([episode(policy, turns)], policy)
    assert round(float(batch.advantages[0][0]), 4) == 0.6509 and float(batch.advantages[1][-1]) == 1.0


def test_truncated_is_not_terminated(policy):
    """A cut-off episode keeps the value of where it stopped; both flags: terminated wins."""
    turns = [turn(policy, "door 1", "door 1"), turn(policy, "door 2", "door 3")]
    over, cut = episode(policy, turns), episode(policy, turns, False, True, final="door 3")
    both = episode(policy, turns, True, True, final="door 3")
    values = bootstrap_values([over, cut, both], policy)
    expected = policy.values_at_end(policy.codec.prompts(["door 3"]))[0].item()
    assert values[0] == values[2] == 0 and abs(values[1].item() - expected) < 1e-6 and abs(expected) > 1e-3
    targets = [make_batch([e], policy, gamma=0.9, gae_lambda=1.0).targets[-1][-1].item() for e in (over, cut)]
    assert abs(targets[0]) < 1e-6 and abs(targets[1] - 0.9 * expected) < 1e-6


def test_values_are_read_where_the_token_is_predicted(policy):
    """The critic's value of the first token equals its value of the prompt alone."""
    t = turn(policy, "door 2", "door 1 door 3")
    _, (values,) = score_turns(policy, [t.prompt_ids], [t.response_ids])
    assert abs(values[0].item() - policy.values_at_end([t.prompt_ids])[0].item()) < 1e-6
    longer = policy.values_at_end([[*t.prompt_ids, *t.response_ids[:1]]])[0].item()
    assert abs(values[1].item() - longer) < 1e-6


def test_reward_and_penalty_sit_on_the_last_token(policy):
    plain, fined = (
        make_batch([episode(policy, [turn(policy, "door 1", "door 2", 0.5, p)])], policy, gae_lambda=1.0)
        for p in (0.0, 0.2)
    )
    assert torch.allclose(plain.targets[0] - fined.targets[0], torch.full((2,), 0.2), atol=1e-6)
    assert abs(plain.targets[0][-1].item() - 0.5) < 1e-6


def test_whitening_over_tokens():
    assert whiten(torch.tensor([3.0, 3.0, 3.0])).tolist() == [0, 0, 0]
    white = whiten(torch.randn(1000) * 7 + 3)
    assert abs(white.mean()) < 1e-5 and abs(white.square().mean() - 1) < 1e-4


def test_padding_of_advantages_changes_nothing():
    torch.manual_seed(0)
    rows = [torch.randn(n).tolist() for n in (7, 1, 4)]
    padded, mask = pad_episodes(rows)
    ends = torch.rand(padded.shape) < 0.5
    together = two_level_gae(padded, padded * 0.3, ends, mask, torch.tensor([0.2, 0.0, -1.0]))
    for i, row in enumerate(rows):
        alone, one = pad_episodes([row])
        part = two_level_gae(alone, alone * 0.3, ends[i : i + 1, : len(row)], one, torch.tensor([[0.2, 0.0, -1.0][i]]))
        assert torch.allclose(together[i, : len(row)], part[0], atol=1e-6)
        assert (together[i, len(row) :] == 0).all()


# ---- batches


def mixed(policy):
    """Episodes of 1 to 3 turns with prompts and responses of different lengths."""
    long = " ".join(["nothing here"] * 9)
    return [
        episode(policy, [turn(policy, "door 1", "door 2", 1.0)]),
        episode(policy, [turn(policy, long, "door 3 door 3"), turn(policy, "door 2", "door 1", 0.3, 0.1)]),
        episode(policy, [turn(policy, s, "door 1", 0.0) for s in (*DOORS[:2], long)], False, True, long),
    ]


def test_padding_and_company_change_no_score(policy):
    turns = [t for e in mixed(policy) for t in e.turns]
    prompts, responses = [t.prompt_ids for t in turns], [t.response_ids for t in turns]
    together, alone = score_turns(policy, prompts, responses), score_turns(policy, prompts, responses, rows=1)
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    for logprobs, t in zip(together[0], turns, strict=True):
        assert torch.allclose(logprobs, torch.tensor(t.logprobs), atol=1e-5)


def test_order_of_episodes_changes_no_target(policy):
    episodes = mixed(policy)
    one, other = make_batch(episodes, policy), make_batch(episodes[::-1], policy)
    by_turn = {id(p): (a, t) for p, a, t in zip(one.prompts, one.advantages, one.targets, strict=True)}
    for prompt, a, t in zip(other.prompts, other.advantages, other.targets, strict=True):
        assert torch.allclose(by_turn[id(prompt)][0], a, atol=1e-5) and torch.allclose(
            by_turn[id(prompt)][1], t, atol=1e-5
        )


def test_the_loss_is_a_mean_over_agent_tokens(policy):
    """Doubling every row leaves loss and gradient; tokens of the prompt have none."""
    batch = make_batch(mixed(policy), policy)
    rows = list(range(len(batch.prompts)))
    gradients = []
    for chosen in (rows, rows * 2, rows[::-1]):
        loss, metrics = minibatch_loss(policy, batch, chosen, 0.2, 0.5, 0.5, 0.0, 0.0, 1.0, False)
        policy.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6) and torch.allclose(
        gradients[0], gradients[2], atol=1e-6
    )
    assert gradients[0].abs().sum() > 0


def test_the_first_ratio_is_one(policy):
    """Scored by the sampling policy, nothing is clipped and nothing has moved."""
    torch.manual_seed(0)
    generator = TransformersGenerator(policy.language_model)
    prompts = policy.codec.prompts([*DOORS, " ".join(["nothing here"] * 7)] * 4)
    for temperature in (1.0, 0.6):
        replies = generator.generate(prompts, SamplingParams(4, temperature))
        turns = [Turn(p, r.ids, r.logprobs, 0.0, "", "", "") for p, r in zip(prompts, replies, strict=True)]
        batch = make_batch([episode(policy, [t]) for t in turns], policy, temperature=temperature)
        _, metrics = minibatch_loss(policy, batch, range(len(turns)), 0.2, 0.5, 0.5, 0.0, 0.0, temperature, False)
        assert abs(metrics["policy/kl_old"]) < 1e-6 and metrics["policy/clip_fraction"] == 0
        scored, _ = score_turns(policy, batch.prompts, batch.responses, temperature)
        gap = max((a - torch.tensor(r.logprobs)).abs().max().item() for a, r in zip(scored, replies, strict=True))
        assert gap < 1e-5


def test_minibatches_hold_every_row_once():
    lengths = [i % 17 for i in range(103)]
    torch.manual_seed(0)
    cuts = minibatches(lengths, 8)
    assert sorted(i for cut in cuts for i in cut) == list(range(103)) and max(map(len, cuts)) == 8
    assert cuts != minibatches(lengths, 8)


# ---- losses


def test_clipped_loss_by_hand():
    rho = torch.tensor([0.5, 1.0, 1.5, 9.0]).log()
    assert torch.allclose(policy_loss(rho, torch.zeros(4), torch.ones(4)), -torch.tensor([0.5, 1.0, 1.2, 1.2]))
    assert torch.allclose(policy_loss(rho, torch.zeros(4), -torch.ones(4)), torch.tensor([0.8, 1.0, 1.5, 3.0]))


def test_clipped_tokens_have_no_gradient():
    rho = torch.tensor([1.5, 0.5, 1.5, 0.5, 9.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    policy_loss(rho, torch.zeros(5), advantages).sum().backward()
    assert (rho.grad != 0).tolist() == [False, True, True, False, False]


def test_value_loss_never_rewards_running_ahead():
    values, old, targets = (torch.randn(500) * s for s in (2, 1, 1))
    assert (value_loss(values, old, targets) >= 0.5 * (values - targets).square() - 1e-6).all()
    assert torch.allclose(value_loss(old, old, targets), 0.5 * (old - targets).square())


def test_kl_is_zero_for_equal_policies_and_finite_for_any():
    x = torch.randn(50)
    assert (kl_k3(x, x) == 0).all() and torch.isfinite(
        kl_k3(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))
    ).all()


# ---- updates


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


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
    metrics = ppo_update(policy, optimizer, batch, epochs=2, minibatch=8)
    assert torch.equal(before, weights(policy))
    assert metrics["policy/skipped_updates"] == 2 and metrics["policy/updates"] == 0
    again = ppo_update(policy, optimizer, make_batch([episode(policy, [good])], policy), epochs=1)
    assert again["policy/updates"] == 1 and torch.isfinite(weights(policy)).all()
    assert not torch.equal(before, weights(policy))


def test_equal_returns_move_only_the_critic(policy):
    """Without variance there is nothing to learn from for the policy."""
    with torch.no_grad():
        policy.value.weight.zero_(), policy.value.bias.zero_()
    batch = make_batch([episode(policy, [turn(policy, s, "door 1", 0.0)]) for s in DOORS], policy)
    assert all((a == 0).all() for a in batch.advantages)
    _, metrics = minibatch_loss(policy, batch, [0, 1, 2], 0.2, 0.5, 0.5, 0.0, 0.0, 1.0, False)
    assert metrics["policy/loss"] == 0


def test_updates_stop_when_the_policy_has_moved_too_far(policy):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05)
    episodes = [episode(policy, [turn(policy, s, d, float(s == d))]) for s in DOORS for d in DOORS] * 4
    batch = make_batch(episodes, policy)
    metrics = ppo_update(policy, optimizer, batch, epochs=50, minibatch=64, kl_stop=0.02, kl_coef=0.0)
    assert metrics["policy/updates"] < 25


def test_the_kl_term_holds_the_policy_back():
    def drift(kl_coef):
        policy, reference = new_policy(), new_policy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        torch.manual_seed(0)
        for _ in range(20):
            episodes = [episode(policy, [turn(policy, s, d, float(s == d))]) for s in DOORS for d in DOORS]
            batch = make_batch(episodes, policy, reference)
            metrics = ppo_update(policy, optimizer, batch, epochs=1, kl_coef=kl_coef, kl_stop=1e9)
        return metrics["policy/kl_ref"]

    free, loose, tight = drift(0.0), drift(1.0), drift(10.0)
    assert 0 < tight < 0.2 * loose < 0.1 * free, (tight, loose, free)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_name_the_door_it_saw(seed):
    """Two turns: the state of the first names a door, and only the right answer in both is rewarded at the end."""
    policy = new_policy(seed)
    generator, optimizer = TransformersGenerator(policy.language_model), torch.optim.AdamW(policy.parameters(), lr=5e-3)
    torch.manual_seed(seed)

    def play(n):
        states = [[DOORS[i % 3] for i in range(n)], [DOORS[(i + 1) % 3] for i in range(n)]]
        turns = [[] for _ in range(n)]
        for shown in states:
            prompts = policy.codec.prompts(shown)
            for i, (prompt, reply) in enumerate(
                zip(prompts, generator.generate(prompts, SamplingParams(2)), strict=True)
            ):
                action = policy.codec.action(reply.ids)
                reward = float(action == shown[i])
                turns[i].append(Turn(prompt, reply.ids, reply.logprobs, reward, shown[i], action, action))
        return [episode(policy, t) for t in turns]

    curve = []
    for _ in range(30):
        episodes = play(48)
        curve.append(sum(e.episode_return for e in episodes) / 96)
        ppo_update(policy, optimizer, make_batch(episodes, policy), kl_coef=0.0, minibatch=48)
    assert curve[0] < 0.5 and sum(curve[-3:]) / 3 > 0.9, curve[::5]


def test_warm_up_of_the_critic_leaves_the_policy_alone(policy):
    """The trunk is shared: only the value head may move, whatever the advantages say."""
    turns = [turn(policy, s, d, float(s == d)) for s in DOORS for d in DOORS]
    prompts, responses = [t.prompt_ids for t in turns], [t.response_ids for t in turns]
    before, _ = score_turns(policy, prompts, responses)
    batch = make_batch([episode(policy, [t]) for t in turns], policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    curve = [ppo_update(policy, optimizer, batch, epochs=1, values_only=True)["value/loss"] for _ in range(20)]
    after, _ = score_turns(policy, prompts, responses)
    assert curve[-1] < 0.95 * curve[0]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
