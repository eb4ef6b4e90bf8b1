"""Batched rollouts: every task once, right to the token, and a failed episode never takes the others with it."""

import math
import random

import pytest
import torch

from dreamgym.core.data_structures import StepResult, Task
from dreamgym.core.generators import Generation, TransformersGenerator
from dreamgym.core.language_model import (
    LanguageModel,
    build_model,
    train_tokenizer,
)
from dreamgym.environments.base_env import CountingEnv
from dreamgym.training.policy import Policy, TurnCodec
from dreamgym.training.ppo import score_turns
from dreamgym.training.rollout import RolloutConfig, rollout, rollout_metrics


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*(f"count {i}" for i in range(13)), "+1", "noop"])


@pytest.fixture(scope="module")
def codec(tokenizer):
    return TurnCodec(tokenizer)


class Chooses:
    """A 'generator' that picks actions by a rule on the prompt's text; remembers what it was asked."""

    def __init__(self, codec, rule, version=0):
        self.codec, self.rule, self.version, self.asked = codec, rule, version, []

    def generate(self, prompts, sampling):
        self.asked.append((len(prompts), sampling))
        texts = [self.codec.tokenizer.decode(p) for p in prompts]
        ids = [self.codec.response(self.rule(text)) for text in texts]
        return [Generation(i, [-0.5] * len(i), "stop", self.version) for i in ids]


class Watched(CountingEnv):
    """Checks the promises that the caller of a batch environment makes; some tasks abort."""

    def __init__(self, slots, max_turns=6):
        super().__init__(slots, max_turns)
        self.live, self.steps, self.resets = set(), 0, []

    def reset(self, slots, tasks, seeds=None):
        assert not self.live & set(slots) and len(set(slots)) == len(slots)
        results = super().reset(slots, tasks, seeds)
        broken = [task.id.startswith("broken") for task in tasks]
        self.live |= {slot for slot, b in zip(slots, broken, strict=True) if not b}
        self.resets += [(task.id, seed) for task, seed in zip(tasks, seeds, strict=True)]
        return [StepResult("", aborted="no such game") if b else r for b, r in zip(broken, results, strict=True)]

    def _step(self, slot, action):
        assert slot in self.live, "a step in a slot whose episode is over"
        self.steps += 1
        result = super()._step(slot, action)
        if self._tasks[slot].id.startswith("dying") and self._count[slot][1] == 2:
            result = StepResult(result.state, aborted="server died")
        if result.done:
            self.live.discard(slot)
        return result


def always(codec, action="+1", version=0):
    return Chooses(codec, lambda text: action, version)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_every_task_once_in_order_whatever_the_slots(codec, slots):
    goals = random.Random(0).choices(range(1, 9), k=25)
    tasks = [Task(f"t{i}", str(goal), seed=i) for i, goal in enumerate(goals)]
    env = Watched(slots)
    played = rollout(always(codec), env, tasks, codec, RolloutConfig(slots=slots))
    assert [t.task for t in played] == tasks
    assert sorted(env.resets) == sorted((task.id, task.seed) for task in tasks)
    assert env.steps == sum(len(t.turns) for t in played) == sum(min(goal, 6) for goal in goals)
    for trajectory, goal in zip(played, goals, strict=True):
        assert trajectory.terminated == trajectory.success == (goal <= 6) and trajectory.truncated == (goal > 6)
        assert trajectory.episode_return == float(goal <= 6)
        assert [turn.state for turn in trajectory.turns] == [f"count {i}" for i in range(min(goal, 6))]
        assert trajectory.final_state == f"count {min(goal, 6)}"


def test_the_slots_never_wait_for_the_longest(codec):
    """A free slot takes the next task at once: one call of the generator for each round."""
    tasks = [Task(f"t{i}", "1") for i in range(5)] + [Task("long", "5")]
    generator = always(codec)
    rollout(generator, Watched(2), tasks[::-1], codec, RolloutConfig(slots=2))
    assert [n for n, _ in generator.asked] == [2] * 5


def test_tokens_are_kept_as_sampled(tokenizer):
    """Ids and log-probabilities are the sampler's; prompts are what the policy would be given again."""
    policy = Policy(LanguageModel(build_model(tokenizer, hidden_size=32, layers=1, seed=0), tokenizer))
    generator = TransformersGenerator(policy.language_model)
    tasks = [Task(f"t{i}", str(1 + i % 4)) for i in range(12)]
    config = RolloutConfig(slots=5, max_new_tokens=3)
    played = rollout(generator, CountingEnv(5), tasks, policy.codec, config, seed=7)
    turns = [turn for t in played for turn in t.turns]
    assert {turn.stop_reason for turn in turns} == {"stop", "length"} and len(turns) > 40
    scored, _ = score_turns(policy, [t.prompt_ids for t in turns], [t.response_ids for t in turns])
    for turn, logprobs in zip(turns, scored, strict=True):
        assert turn.prompt_ids == policy.codec.prompts([turn.state])[0]
        assert torch.allclose(logprobs, torch.tensor(turn.logprobs), atol=1e-5)
        assert turn.action == policy.codec.action(turn.response_ids)
        ended = turn.response_ids[-1] == tokenizer.eos_token_id
        assert ended == (turn.stop_reason == "stop") and len(turn.response_ids) <= 3


def test_same_seed_same_rollout(tokenizer):
    policy = Policy(LanguageModel(build_model(tokenizer, hidden_size=32, layers=1, seed=0), tokenizer))
    tasks = [Task(f"t{i}", "3") for i in range(10)]

    def actions(seed):
        generator = TransformersGenerator(policy.language_model)
        played = rollout(generator, CountingEnv(4), tasks, policy.codec, RolloutConfig(slots=4), seed=seed)
        return [[turn.response_ids for turn in t.turns] for t in played]

    assert actions(1) == actions(1) != actions(2)


def test_truncated_episodes_carry_the_prompt_of_their_last_state(codec):
    cut, won = rollout(always(codec), Watched(2), [Task("a", "9"), Task("b", "2")], codec, RolloutConfig(slots=2))
    assert list(cut.final_prompt_ids) == codec.prompts(["count 6"])[0] and not cut.terminated
    assert won.final_prompt_ids == () and won.terminated and not won.truncated


def test_failed_episodes_leave_the_others_alone(codec):
    tasks = [Task("broken 1", "1"), Task("a", "3"), Task("dying", "4"), Task("broken 2", "1"), Task("b", "4")]
    played = rollout(always(codec), Watched(2), tasks, codec, RolloutConfig(slots=2))
    assert [t.task.id for t in played] == [task.id for task in tasks]
    assert [t.aborted for t in played] == ["no such game", None, "server died", "no such game", None]
    assert [t.success for t in played] == [None, True, None, None, True] and played[0].turns == []
    metrics = rollout_metrics(played)
    assert (metrics["episodes"], metrics["aborted"], metrics["success"], metrics["turns"]) == (2, 3, 1.0, 3.5)
    only_broken = rollout(always(codec), Watched(2), tasks[:1] * 5, codec, RolloutConfig(slots=2))
    assert [t.aborted for t in only_broken] == ["no such game"] * 5
    assert rollout_metrics(only_broken)["success"] == 0 and rollout([], Watched(2), [], codec) == []


def test_groups_are_the_rollouts_of_one_task(codec):
    tasks = [Task(name, "2") for name in "abacba"]
    groups = [t.group for t in rollout(always(codec), Watched(4), tasks, codec, RolloutConfig(slots=4))]
    assert [groups.index(g) for g in groups] == [0, 1, 0, 3, 1, 0]


def test_penalty_and_version_are_recorded(codec):
    rule = Chooses(codec, lambda text: "noop" if "count 1" in text else "+1", version=3)
    config = RolloutConfig(slots=1, invalid_action_penalty=0.25, source="dream")
    (played,) = rollout(rule, Watched(1), [Task("a", "2")], codec, config)
    assert played.version == 3 and played.source == "dream" and played.truncated
    assert [turn.penalty for turn in played.turns] == [0.0] + [0.25] * 5
    assert [turn.valid for turn in played.turns] == [True] + [False] * 5
    assert played.episode_return == 0 and rollout_metrics([played])["invalid_actions"] == 5 / 6


def test_sampling_settings_reach_the_generator(codec):
    generator = always(codec)
    config = RolloutConfig(slots=1, temperature=0.3, max_new_tokens=5)
    rollout(generator, Watched(1), [Task("a", "3")], codec, config, seed=10)
    assert [(s.max_new_tokens, s.temperature) for _, s in generator.asked] == [(5, 0.3)] * 3
    assert [s.seed for _, s in generator.asked] == [10, 11, 12]


def test_a_dream_that_could_not_be_read_is_marked(codec):
    class Dreams(CountingEnv):
        def _step(self, slot, action):
            result = super()._step(slot, action)
            broken = result.state == "count 2"
            info = {"malformed": broken, "action_error": "malformed prediction" if broken else None, "reasoning": "so"}
            return StepResult(
                result.state, "", result.reward, result.terminated, result.truncated, result.success, info=info
            )

    (played,) = rollout(always(codec), Dreams(1), [Task("a", "3")], codec, RolloutConfig(slots=1, source="dream"))
    assert [bool(turn.info.get("malformed")) for turn in played.turns] == [False, True, False]
    assert {turn.info["reasoning"] for turn in played.turns} == {"so"}


def test_progress_is_told(codec):
    told = []
    tasks = [Task(f"t{i}", str(1 + i % 3)) for i in range(7)]
    rollout(always(codec), Watched(3), tasks, codec, RolloutConfig(slots=3), on_step=told.append)
    assert told == sorted(told) and told[-1] == 7


def test_metrics_of_nothing_are_finite():
    assert all(math.isfinite(value) for value in rollout_metrics([]).values())
