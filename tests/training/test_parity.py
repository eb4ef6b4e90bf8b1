"""Parity with TRL: on the same single-turn rows and weights our GRPO loss and gradient are GRPOTrainer's."""

import copy

import pytest
import torch
from rl_toys import DOORS, LONG, as_trl_sees_it, episode, gradient, new_policy, turn

from dreamgym.training.grpo import GRPOSettings, grpo_loss, grpo_share, make_group_batch
from dreamgym.training.ppo import accumulate

LOSSES = {"grpo": "sequence-mean", "bnpo": "token-mean", "dapo": "token-mean", "dr_grpo": "dr-grpo"}
LONGEST, TEMPERATURE = 12, 0.8


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A GRPOTrainer on a Llama from scratch, offline, and our policy with the same weights."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    policy = new_policy(family="Llama")
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=0.0,  # TRL would load a reference by name; the test hands over its log-probabilities
        epsilon=0.2,
        temperature=TEMPERATURE,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=LONGEST,
        report_to=[],
        use_bias_correction_kl=False,  # k3 as GRPO has it; TRL weighs it by the ratio unless told not to
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    prompts = datasets.Dataset.from_dict({"prompt": DOORS})
    trainer = GRPOTrainer(
        model=copy.deepcopy(policy.model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=prompts,
        processing_class=policy.tokenizer,
    )
    trainer.beta, trainer.current_gradient_accumulation_steps = 0.05, 1
    trainer.model.eval()
    return trainer, policy


def single_turns(policy):
    """Prompts and responses of different lengths; stale log-probabilities, so that some tokens are clipped."""
    cases = [(s, " ".join([a] * n), r) for r, (s, a, n) in enumerate(zip([*DOORS, LONG], [*DOORS, LONG], (1, 4, 2, 1)))]
    turns = [turn(policy, s, a, float(r), shift=0.1 * (r - 1.5)) for s, a, r in cases]
    return [episode(policy, [t], group=i // 2, task=str(i // 2)) for i, t in enumerate(turns)]


def near(policy, other):
    """A third of the way to another policy: TRL has no bound on k3, and ours (10) is not reached here."""
    found = copy.deepcopy(policy)
    with torch.no_grad():
        for p, q in zip(found.parameters(), other.parameters(), strict=True):
            p.lerp_(q, 1 / 3)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_grpo_loss_and_gradient_equal_those_of_trl(peer, name):
    trainer, policy = peer
    reference = near(policy, new_policy(4, family="Llama"))
    batch = make_group_batch(single_turns(policy), policy, reference, temperature=TEMPERATURE)
    settings = GRPOSettings(
        clip=0.2, kl_coef=0.05, aggregation=LOSSES[name], max_tokens=LONGEST, temperature=TEMPERATURE
    )
    trainer.loss_type = trainer.args.loss_type = name
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, as_trl_sees_it(batch))
    theirs.backward()

    totals = []

    def loss(scores, tokens, settings):
        total, columns = grpo_loss(scores, tokens, settings)
        totals.append(float(total.detach()) / grpo_share(tokens, settings))
        return total, columns

    found = accumulate(policy, batch, loss, grpo_share, settings)
    ours = gradient(policy.model)
    assert 0 < found["policy/clip_fraction"] < 1 and found["policy/kl_ref"] > 0 and abs(totals[0]) > 1e-3
    assert abs(totals[0] - float(theirs.detach())) < 1e-5
    assert (ours - gradient(trainer.model)).abs().max() < 1e-5 and ours.abs().max() > 1e-3


def test_group_advantages_differ_from_trl_by_the_population_std_only():
    """TRL divides by the std of a sample, G - 1; ours is that times a constant of the group size."""
    from dreamgym.training.advantages import grpo_advantages

    returns = torch.randn(3, 8)
    theirs = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)
    ours = grpo_advantages(returns.flatten(), torch.arange(3).repeat_interleave(8))
    assert torch.allclose(ours, theirs.flatten() * (8 / 7) ** 0.5, atol=1e-3)
