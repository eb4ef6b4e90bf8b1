"""Agents trained by TRL, and our environments as its rollouts."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import datasets
import pytest
import torch
import trl

from dreamgym.core.data_structures import Experience, StepResult, Task
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.core.generators import Generation
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.environments.base_env import CountingEnv
from dreamgym.models.experience_sft import example_loss
from dreamgym.training import trl_baselines as tb
from dreamgym.training.policy import Policy, TurnCodec
from dreamgym.training.rollout import RolloutConfig, rollout

DOORS = [f"door {i}" for i in range(1, 5)]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>be brief<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_policy(family="SmallLM", seed=0, **options):
    entities = "merged" if family == "SmallLM" else "split"
    tokenizer = train_tokenizer([*DOORS, "count 0", "count 9", "+1", "noop", "be brief\n"], entities)
    model = build_model(tokenizer, family, hidden_size=32, layers=1, seed=seed, **options)
    return Policy(LanguageModel(model, tokenizer))


def examples_of(policy):
    states = [*DOORS, "door 1 door 2 door 3"]
    return list(zip(policy.codec.prompts(states), map(policy.codec.response, [*DOORS, "door 1"]), strict=True))


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def row(policy, state, action, after, success=True, task="t"):
    return Experience(state, action, 0.0, after, False, task_id=task, policy=policy, success=success)


# ---- the model as TRL takes it


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_trl_has_our_loss_and_gradient(family):
    """Its fused head, on a padded batch of ragged rows, against cross-entropy at the response's positions."""
    from trl.trainer.utils import add_fused_lm_head

    policy = make_policy(family)
    rows = tb.sft_rows(examples_of(policy))
    width = max(len(r["input_ids"]) for r in rows)

    def pad(name, value):
        return torch.tensor([r[name] + [value] * (width - len(r[name])) for r in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    ours = example_loss(policy.model, examples_of(policy))
    ours.backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad(set_to_none=True)
    with tb.lent_to_trl(policy.model) as lent:
        add_fused_lm_head(lent)
        out = lent(input_ids=pad("input_ids", 0), attention_mask=mask, labels=pad("labels", -100), fused_lm_head=True)
    out.loss.backward()
    assert torch.allclose(out.loss, ours, atol=1e-5)
    for name, p in policy.model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


def test_the_tokens_are_those_that_trl_makes_of_the_text(tmp_path):
    """Where the template adds nothing behind the end token, TRL's own encoding gives the very same rows."""
    policy = make_policy()
    prompt = [{"role": "user", "content": "door 2"}]
    text = {"prompt": [prompt], "completion": [[{"role": "assistant", "content": "door 3"}]]}
    fields = tb.trainer_settings(str(tmp_path), torch.device("cpu"), {"max_length": None})
    with tb.lent_to_trl(policy.model) as model:
        data = datasets.Dataset.from_dict(text)
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**fields), train_dataset=data, processing_class=policy.tokenizer)
    ids = (policy.codec.prompts(["door 2"])[0], policy.codec.response("door 3"))
    ours = tb.sft_rows([ids])[0]
    assert {k: trainer.train_dataset[0][k] for k in ("input_ids", "labels")} == ours
    pair = {"prompt": "door 2", "chosen": "door 3", "rejected": "door 1"}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = {key: [[{"role": roles[key], "content": text}]] for key, text in pair.items()}
    with tb.lent_to_trl(policy.model) as model:
        reference = tb.trl_model(copy.deepcopy(policy.model))
        data, args = datasets.Dataset.from_dict(rows), trl.DPOConfig(**fields)
        dpo = trl.DPOTrainer(model, reference, args, train_dataset=data, processing_class=policy.tokenizer)
    expected = tb.dpo_rows([pair], policy)[0]
    assert {k: dpo.train_dataset[0][k] for k in expected} == expected


def test_no_newline_of_the_template_gets_into_the_loss():
    policy = make_policy()
    policy.tokenizer.chat_template = CHATML
    codec = type(policy.codec)(policy.tokenizer)
    row = tb.sft_rows([(codec.prompts(["door 1"])[0], codec.response("door 2"))])[0]
    learnt = [i for i in row["labels"] if i != -100]
    assert learnt == codec.response("door 2") and learnt[-1] == policy.tokenizer.eos_token_id


def test_control_tokens_in_a_state_stay_text():
    policy = make_policy()
    rows = tb.dpo_rows([{"prompt": "door 1<|end|><|assistant|>", "chosen": "door 1", "rejected": "door 2"}], policy)
    assert rows[0]["prompt_ids"].count(policy.tokenizer.eos_token_id) == 1


# ---- training


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_agents_learn_and_leave_nothing_behind(family, tmp_run, capfd, monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: asked.append(1))
    monkeypatch.setenv("TMPDIR", str(tmp_run))
    monkeypatch.setattr("tempfile.tempdir", None)
    telemetry, policy, seen = constants.HF_HUB_DISABLE_TELEMETRY, make_policy(family), []
    forward, start = policy.model.forward, weights(policy)
    got = tb.sft_agent(policy, examples_of(policy) * 4, 20, 10, 1e-2, on_log=lambda step, logs: seen.append(logs))
    losses = [logs["loss"] for logs in seen if "loss" in logs]
    assert got is policy and losses[-1] < 0.1 < losses[0]
    learnt = weights(policy)
    assert any(not torch.equal(start[name], learnt[name]) for name in start)
    pairs = [{"prompt": a, "chosen": b, "rejected": a} for a, b in zip(DOORS, DOORS[1:] + DOORS[:1], strict=True)]
    seen.clear()
    tb.dpo_agent(policy, pairs * 4, 0.1, 0, 20, 8, 3e-3, on_log=lambda step, logs: seen.append(logs), logging_steps=1)
    assert abs(seen[0]["loss"] - 0.693147) < 1e-4  # log 2: reference and policy agree at the start
    assert [logs["rewards/accuracies"] for logs in seen if "rewards/accuracies" in logs][-1] == 1
    assert policy.model.forward == forward and not policy.model.training
    assert constants.HF_HUB_DISABLE_TELEMETRY == telemetry
    assert os.listdir(tmp_run) == ["runs"]
    assert capfd.readouterr().out == ""


def test_a_copy_of_a_trained_agent_is_independent():
    """TRL's replaced forward would make a deep copy use the original's weights."""
    policy = make_policy("Llama")
    tb.sft_agent(policy, examples_of(policy), 1, 8)
    other, ids = copy.deepcopy(policy), torch.tensor([examples_of(policy)[0][0]])
    before = policy.model(ids).logits
    with torch.no_grad():
        other.model.get_input_embeddings().weight.zero_()
    assert torch.equal(policy.model(ids).logits, before) and not torch.equal(other.model(ids).logits, before)


def test_the_same_seed_is_the_same_agent():
    runs = []
    for seed in (0, 0, 1):
        policy = make_policy()
        tb.sft_agent(policy, examples_of(policy) * 3, 2, 4, seed=seed)
        runs.append(weights(policy))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_the_telemetry_switch_is_on_inside(monkeypatch):
    from huggingface_hub import constants

    states = []
    told = "trl.trainer.base_trainer.send_telemetry"
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(told, lambda **_: states.append(constants.HF_HUB_DISABLE_TELEMETRY))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    policy = make_policy()
    tb.sft_agent(policy, examples_of(policy), 1, 8)
    assert states == [True] and constants.HF_HUB_DISABLE_TELEMETRY is False


def test_an_accelerator_of_our_own_keeps_its_settings():
    """TRL's trainers reset accelerate's global state; precision and accumulation would change under our feet."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    with tb.accelerate_as_before():
        AcceleratorState._reset_state(reset_partial_state=True)  # another test may have left one
        ours = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        policy = make_policy()
        tb.sft_agent(policy, examples_of(policy), 1, 8)
        assert (ours.mixed_precision, ours.gradient_accumulation_steps) == ("bf16", 3)


def test_nothing_to_train_on_is_an_error():
    policy = make_policy()
    with pytest.raises(DataError, match="SFT"):
        tb.sft_agent(policy, [])
    with pytest.raises(DataError, match="DPO"):
        tb.dpo_agent(policy, [])


def test_agents_play():
    """Data, pairs and evaluation of the household games, end to end."""
    from dreamgym.core.config import load_config
    from dreamgym.environments.base_env import make_environment
    from dreamgym.training import preparation as prep
    from dreamgym.training.baselines import demonstrations
    from dreamgym.training.trainer import evaluate_policy

    config = load_config(None, "alfworld", "smoke", {"environment.data_dir": "generated"})
    env = make_environment("alfworld", config.environment)
    data = prep.offline_data(env, config, prep.training_tasks(env, config))
    model = prep.make_language_model(config.policy_model, prep.environment_texts(data, env), 0)
    policy = Policy(model)
    tb.sft_agent(policy, demonstrations(data, policy), 1, 64)
    pairs = tb.dpo_pairs(data)
    assert len(pairs) > 50 and {pair["behaviour"] for pair in pairs} == {"noise", "random"}
    tb.dpo_agent(policy, pairs, epochs=1)
    found = evaluate_policy(policy, env, env.tasks("valid")[:4])
    assert len(found.outcomes) == 4


# ---- pairs


def test_pairs_come_from_the_same_task_and_situation():
    rows = [
        row("expert", "a\nlast: ok", "go", "b\nlast: ok"),
        row("noise", "a\nlast: ok", "jump", "a\nlast: fail jump"),
        row("random", "a\nlast: ok", "swim", "a\nlast: fail swim", task="another"),
        row("random", "c\nlast: ok", "swim", "c\nlast: fail swim"),
    ]
    pairs = tb.dpo_pairs(rows)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("a\nlast: ok", "go", "jump")]


def test_what_an_expert_did_is_never_rejected():
    rows = [
        row("expert", "a\nlast: ok", "go", "b\nlast: ok"),
        row("expert", "a\nlast: fail x", "run", "b\nlast: ok"),
        row("cloned", "a\nlast: ok", "run", "a\nlast: fail run"),
    ]
    assert tb.dpo_pairs(rows) == []


def test_an_action_with_an_effect_is_rejected_only_when_asked_and_failed():
    rows = [row("expert", "a\nlast: ok", "go", "b\nlast: ok")]
    rows += [row("cloned", "a\nlast: ok", "left", "c\nlast: ok", success=won) for won in (True, None)]
    assert tb.dpo_pairs(rows) == [] and tb.dpo_pairs(rows, effective=True) == []
    rows += [row("cloned", "a\nlast: ok", "right", "c\nlast: ok", success=False)]
    assert tb.dpo_pairs(rows) == []
    assert [p["rejected"] for p in tb.dpo_pairs(rows, effective=True)] == ["right"]


@pytest.mark.parametrize(("who", "won", "pairs"), [("cloned", True, 1), ("cloned", False, 0), ("noise", True, 0)])
def test_a_policy_that_won_knows_better_than_its_failed_actions(who, won, pairs):
    rows = [
        row("cloned", "a\nlast: ok", "jump", "a\nlast: fail jump", success=won),
        row(who, "a\nlast: fail jump", "go", "b\nlast: ok", success=won),
    ]
    found = tb.dpo_pairs(rows)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found] == [("a\nlast: ok", "go", "jump")] * pairs


def test_pairs_of_one_situation_are_limited_and_ordered():
    rows = [row("expert", "a\nlast: ok", "go", "b\nlast: ok")]
    rows += [row("noise", "a\nlast: ok", f"try {i}", "a\nlast: fail") for i in range(6)] * 2
    assert [p["rejected"] for p in tb.dpo_pairs(rows, per_situation=2)] == ["try 4", "try 5"]
    assert len(tb.dpo_pairs(rows, per_situation=9)) == 6


# ---- rollouts for GRPOTrainer


def talking(policy):
    return TurnCodec(policy.tokenizer, context="conversation")


class Scripted:
    """Answers in turn."""

    def __init__(self, codec, *actions):
        self.codec, self.actions = codec, list(actions)

    def generate(self, prompts, sampling, sessions=None):
        if not prompts:  # all conversations have ended
            return []
        ids = self.codec.response(self.actions.pop(0))
        return [Generation(ids, [-0.25] * len(ids), "stop") for _ in prompts]


def play(codec, env, tasks, *actions):
    return rollout(Scripted(codec, *actions), env, tasks, codec, RolloutConfig(len(tasks)))


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_row_is_the_conversation_and_marks_what_was_sampled(template):
    policy = make_policy()
    policy.tokenizer.chat_template = template or policy.tokenizer.chat_template
    codec = talking(policy)
    one, two = play(codec, CountingEnv(2), [Task("a", "1"), Task("b", "2")], "+1", "noop", "+1")
    said = [codec.response(action) for action in ("+1", "noop", "+1")]
    row = tb.conversation_row(two)
    assert [i for i, m in zip(row["completion_ids"], row["env_mask"], strict=True) if m] == sum(said, [])
    assert {lp for lp, m in zip(row["logprobs"], row["env_mask"], strict=True) if m} == {-0.25}
    assert {lp for lp, m in zip(row["logprobs"], row["env_mask"], strict=True) if not m} == {0.0}
    states = ["count 0", "count 1", "count 1"]
    chat = [m for s in states for m in ({"role": "user", "content": s}, {"role": "assistant", "content": ""})]
    for message, action in zip(chat[1::2], ("+1", "noop", "+1"), strict=True):
        message["content"] = action
    whole = policy.tokenizer.apply_chat_template(chat)["input_ids"]
    ids = row["prompt_ids"] + row["completion_ids"]
    assert whole[: len(ids)] == ids and len(whole) - len(ids) <= 1  # but for the template's newline at the end
    assert tb.conversation_row(one)["completion_ids"] == said[0] and two.episode_return == 1.0


def test_prompts_of_single_states_are_refused():
    policy = make_policy()
    played = play(policy.codec, CountingEnv(1), [Task("a", "2")], "+1", "+1")
    with pytest.raises(DataError, match="context 'conversation'"):
        tb.conversation_row(played[0])
    with pytest.raises(ConfigError, match="context 'conversation'"):
        tb.trl_rollout_func(CountingEnv, [], policy.codec)


class Paid(CountingEnv):
    """Pays for every letter, so that random answers differ in return."""

    def step(self, slots, actions):
        pay = [0.01 * len(action) for action in actions]
        return [replace(r, reward=p) for r, p in zip(super().step(slots, actions), pay, strict=True)]


class Breaks(Paid):
    """Slot 1 dies at its first step; slot 2 cannot be reset."""

    def reset(self, slots, tasks, seeds=None):
        results = super().reset(slots, tasks, seeds)
        return [StepResult("", aborted="no game") if s == 2 else r for s, r in zip(slots, results, strict=True)]

    def step(self, slots, actions):
        results = super().step(slots, actions)
        return [StepResult("", aborted="died") if s == 1 else r for s, r in zip(slots, results, strict=True)]


def test_an_aborted_episode_has_no_return_and_its_siblings_go_on():
    codec = talking(make_policy())
    columns = tb.trl_columns(play(codec, Breaks(4), [Task("a", "2")] * 4, "+1", "+1"), codec)
    assert columns["episode_return"] == [0.04, None, None, 0.04]
    assert columns["env_mask"][2] == [0] and len(columns["completion_ids"][1]) == 3
    assert tb.episode_reward([], [], columns["episode_return"]) == [0.04, None, None, 0.04]


@pytest.mark.parametrize(("family", "env"), [("SmallLM", Paid), ("Llama", Paid), ("SmallLM", Breaks)])
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_two_steps_of_grpo_trainer(family, env, tmp_path):
    policy, batches = make_policy(family), []
    tasks = [Task("one", "1"), Task("two", "2")]
    roll = tb.trl_rollout_func(env, tasks, talking(policy), max_new_tokens=4)

    def watched(prompts, trainer):
        training = trainer.model.training
        out = roll(prompts, trainer)
        assert trainer.model.training == training
        batches.append((prompts, out))
        names = ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        with torch.no_grad():  # what the sampler reports is what a fresh pass gives
            for p, c, lp, mask in zip(*(out[name] for name in names), strict=True):
                logits = policy.model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].float().log_softmax(-1)
                fresh = logits[range(len(c)), c] * torch.tensor(mask)
                assert torch.allclose(fresh, torch.tensor(lp), atol=1e-5)
                assert len(p) + len(c) <= trainer.max_completion_length
        return out

    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "max_completion_length": 48}
    sizes |= {"learning_rate": 1e-2, "logging_steps": 1}
    fields = tb.trainer_settings(str(tmp_path), torch.device("cpu"), sizes)
    start = weights(policy)
    with tb.lent_to_trl(policy.model) as model:
        args, data = trl.GRPOConfig(**fields), datasets.Dataset.from_list(tb.trl_rows(tasks))
        trainer = trl.GRPOTrainer(
            model, tb.episode_reward, args, data, processing_class=policy.tokenizer, rollout_func=watched
        )
        tb.run_trainer(trainer, None)
    assert len(batches) == 2 and all(sorted(p) == ["one"] * 4 + ["two"] * 4 for p, _ in batches)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for (_, out), log in zip(batches, logs, strict=True):
        returns = [r for r in out["episode_return"] if r is not None]
        assert log["reward"] == pytest.approx(sum(returns) / len(returns), abs=1e-6)
        assert log["completions/mean_length"] == sum(map(sum, out["env_mask"])) / 8
    assert any(not torch.equal(a, b) for a, b in zip(start.values(), weights(policy).values(), strict=True))
