"""Dreams keep the promises of a batch environment; a perfect experience model makes them equal to the real one."""

import random
from dataclasses import replace

import pytest

from dreamgym.core.config import EnvironmentConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Experience, Task
from dreamgym.core.errors import ConfigError
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import TranscriptMapper, check_env, make_environment
from dreamgym.environments.dream_env import DreamEnv, action_error, dream_result
from dreamgym.environments.household_rules import expected_state, judge
from dreamgym.environments.household_state import HouseholdMapper
from dreamgym.environments.household_text import parse_state
from dreamgym.environments.offline import EXPERT, Behaviour, record
from dreamgym.models.reasoning_model import ReasoningExperienceModel, render_target
from dreamgym.models.votes import Election, pessimistic

FIRST = "task: put a mug in shelf.\nat: nowhere\nhold: nothing\nunseen: desk 1, shelf 1\nlast: ok"
TASKS = [Task(str(i), "put a mug in shelf.", initial_state=FIRST) for i in range(4)]


class Rules:
    """Knows the rules; imagines every unseen place empty. Never gives a reward."""

    def __init__(self):
        self.mapper, self.prompts = HouseholdMapper(), []

    def complete(self, requests):
        self.prompts += [r.prompt for r in requests]
        return [Reply(self.answer(*r.prompt.rsplit("\naction: ", 1))) for r in requests]

    def answer(self, prompt, action):
        state = "\n".join(line for line in prompt.split("\n") if not line.startswith(("before: ", "seen: ")))
        if not judge(parse_state(state), action).ok:
            return "fail\nreward 0"
        after, free = expected_state(parse_state(state), action)
        imagined = f"\n{free}: nothing" if free else ""
        return f"{self.mapper.diff(state, after.text())}{imagined}\nreward 0"


class Scripted:
    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def complete(self, requests):
        self.calls.append(len(requests))
        return [Reply(self.texts.pop(0)) for _ in requests]


def dreams(client, slots=4, max_turns=6, history=0):
    config = ReasoningModelConfig(reasoning=False, history=history)
    return DreamEnv(ReasoningExperienceModel(config, client, mapper=HouseholdMapper()), slots, max_turns)


def test_same_check_as_the_real_environment():
    actions = ["go to desk 1", "open moon 1", "go to shelf 1", "", "take mug 1 from desk 1"]
    assert check_env(dreams(Rules()), TASKS, actions, max_turns=6) == 6


def test_a_perfect_model_dreams_the_real_game():
    """Every result of a dream equals the real one, but for what was printed; slots run in any order."""
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    tasks = list(env.tasks("train")[:16])
    episodes = record(env, tasks[:8], EXPERT) + record(env, tasks[8:], Behaviour("noisy", 0.5))
    known = {(row.state, row.action): render_target(row, env.mapper, False) for ep in episodes for row in ep}

    class Memory:
        def complete(self, requests):
            return [Reply(known[tuple(r.prompt.rsplit("\naction: ", 1))]) for r in requests]

    dream = DreamEnv(
        ReasoningExperienceModel(ReasoningModelConfig(reasoning=False, history=0), Memory(), mapper=env.mapper),
        len(tasks),
        env.max_turns,
    )
    real, by_id, slots = env.make(len(tasks)), {task.id: task for task in tasks}, list(range(len(tasks)))
    ordered = [by_id[episode[0].task_id] for episode in episodes]
    first = real.reset(slots, ordered)
    started = [replace(task, initial_state=r.state) for task, r in zip(ordered, first, strict=True)]
    for ours, theirs in zip(dream.reset(slots, started), first, strict=True):
        assert ours.state == theirs.state and ours.admissible_actions == theirs.admissible_actions
    rng, steps = random.Random(0), 0
    left = {slot: list(episodes[slot]) for slot in slots}
    while left:
        order = rng.sample(sorted(left), rng.randint(1, len(left)))
        actions = [left[slot].pop(0).action for slot in order]
        for slot, ours, theirs in zip(order, dream.step(order, actions), real.step(order, actions), strict=True):
            assert ours.observation == "" and theirs.observation
            for name in ("state", "reward", "terminated", "truncated", "success", "admissible_actions", "aborted"):
                assert getattr(ours, name) == getattr(theirs, name), name
            assert bool(ours.info["action_error"]) == bool(theirs.info["action_error"])
            steps += 1
            if theirs.done:
                del left[slot]
    assert steps == sum(map(len, episodes)) > 150


def test_truncated_is_not_terminated():
    env = dreams(Scripted(*["no change\nreward 0"] * 3, "no change\nreward 0 end"), slots=2, max_turns=3)
    env.reset([0, 1], TASKS[:2])
    results = [env.step([0], ["look"])[0] for _ in range(3)]
    assert [(r.terminated, r.truncated, r.success) for r in results[:2]] == [(False, False, None)] * 2
    assert (results[2].terminated, results[2].truncated, results[2].success) == (False, True, False)
    lost = env.step([1], ["look"])[0]  # the end without a reward is a lost game
    assert (lost.terminated, lost.truncated, lost.success, lost.reward) == (True, False, False, 0.0)


def test_the_last_turn_can_still_win():
    env = dreams(Scripted("no change\nreward 1 end"), slots=1, max_turns=1)
    env.reset([0], TASKS[:1])
    (won,) = env.step([0], ["look"])
    assert (won.reward, won.terminated, won.truncated, won.success) == (1.0, True, False, True)
    with pytest.raises(ValueError, match="slot 0 has no dream that goes on"):
        env.step([0], ["look"])


def test_slots_are_independent_and_one_call_serves_them_all():
    client = Scripted(*["at: desk 1\ndesk 1: mug 1\nreward 0", "at: shelf 1\nshelf 1: nothing\nreward 0"] * 2)
    env = dreams(client)
    env.reset([0, 1, 2, 3], TASKS)
    a, b = env.step([3, 1], ["go to desk 1", "go to shelf 1"])
    assert "at: desk 1" in a.state and "at: shelf 1" in b.state and client.calls == [2]
    env.reset([3], TASKS[:1])  # a fresh dream leaves the others alone
    c, d = env.step([3, 1], ["go to desk 1", "go to shelf 1"])
    assert "shelf 1: nothing" not in c.state and "shelf 1: nothing" in d.state


def test_a_reply_that_cannot_be_read_is_a_failed_action():
    env = dreams(Scripted("banana", "at: desk 1\ndesk 1: mug 1\nreward 0"))
    env.reset([0], TASKS[:1])
    (broken,) = env.step([0], ["go to desk 1"])
    assert broken.state == FIRST.replace("last: ok", "last: fail go to desk 1") and not broken.done
    assert "malformed" in broken.info["action_error"] and env.model.malformed == 1
    (fine,) = env.step([0], ["go to desk 1"])
    assert fine.info["action_error"] is None and "desk 1: mug 1" in fine.state


def test_history_grows_with_the_dream_and_ends_with_it():
    client = Rules()
    env = dreams(client, history=2)
    env.reset([0], TASKS[:1])
    for action in ("look", "go to desk 1", "go to shelf 1", "look"):
        env.step([0], [action])
    shown = [next((line for line in p.split("\n") if line.startswith("before: ")), "") for p in client.prompts]
    assert shown == ["", "before: look", "before: look; go to desk 1", "before: go to desk 1; go to shelf 1"]
    env.reset([0], TASKS[:1])
    env.step([0], ["look"])
    assert "before: " not in client.prompts[-1]


def test_a_dream_starts_from_a_recorded_state_only():
    env = dreams(Rules())
    with pytest.raises(ConfigError, match="'x' has no initial_state"):
        env.reset([0], [Task("x", "put a mug in shelf.")])


def test_a_slot_without_a_dream_is_an_error():
    env = dreams(Rules())
    with pytest.raises(ValueError, match="slot 2 has no dream"):
        env.step([2], ["look"])
    env.reset([2], TASKS[:1])
    env.close()
    with pytest.raises(ValueError, match="slot 2 has no dream"):
        env.step([2], ["look"])


def test_a_failed_action_is_one_in_raw_observations_too():
    """The penalty of RL hangs on it: a dream without an abstract state must charge what reality charges."""
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated", mapper=False))
    real, task = env.make(1), env.tasks("train")[0]
    first = real.reset([0], [task])[0].state
    after = real.step([0], ["take nothing 1 from nowhere 1"])[0]
    action = "take nothing 1 from nowhere 1"
    assert after.state.endswith(f"{action} = Nothing happens.") and after.info["action_error"]
    change = env.mapper.diff(first, after.state)
    assert change == f"fail {action}" and env.mapper.merge(first, change) == after.state
    dream = Experience(first, action, 0.0, after.state, False)
    assert action_error(dream, env.mapper) == "the action had no effect"
    moved = env.mapper.update(first, "look", "You are in the middle of a room.")
    assert action_error(replace(dream, action="look", next_state=moved), env.mapper) is None


def test_a_doubted_success_is_one_still():
    """Pessimism lowers what a dream pays, not how often it is won."""
    mapper, won = TranscriptMapper(), Experience("task: t\nroom", "go", 1.0, "task: t\nroom\ngo = done", True)
    doubted = pessimistic(Election(won, 2 / 3, 2 / 3), "lower", 0.0)
    found = dream_result(doubted, False, mapper)
    assert (found.reward, found.success) == (0.67, True)
    assert dream_result(replace(won, reward=0.0), False, mapper).success is False
