"""Recorded episodes: every real transition once, in order, by whom, and read back from damaged files."""

import json
import random
from dataclasses import replace

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Experience, StepResult, Task, Trajectory, Turn, to_row
from dreamgym.core.errors import EnvironmentFailure
from dreamgym.core.experience_files import write_jsonl
from dreamgym.environments.base_env import CountingEnv, Environment, had_effect, make_environment
from dreamgym.environments.household_rules import reasoning_trace
from dreamgym.environments.offline import EXPERT, RANDOM, Behaviour, experiences_of, record
from dreamgym.environments.offline_readers import read_trajectories

NOISY = Behaviour("noisy", 0.4)


@pytest.mark.parametrize("name", ["alfworld", "webshop", "taubench"])
def test_raw_observations_tell_which_actions_had_no_effect(name):
    """As the real environment does, so that dreams charge for the same actions."""
    env = make_environment(name, EnvironmentConfig(name=name, data_dir="generated", mapper=False))
    expert, rng, seen = (
        make_environment(name, EnvironmentConfig(name=name, data_dir="generated")),
        random.Random(0),
        set(),
    )
    right = {e.action for rows in record(expert, expert.tasks("train")[:8]) for e in rows}
    actions = [*sorted(right), "click[nothing]", "take the moon", '{"name": "fly", "arguments": {}}']
    batch, steps = env.make(1), 0
    for task in env.tasks("train")[:20]:
        result = batch.reset([0], [task])[0]
        while not result.done:
            before, action = result.state, rng.choice(actions)
            result = batch.step([0], [action])[0]
            failed = not had_effect(Experience(before, action, 0.0, result.state, result.done), env.mapper)
            assert failed == bool(result.info.get("action_error")), (action, result.state[-300:])
            seen.add(failed)
            steps += 1
    assert seen == {True, False} and steps > 100


class Counted:
    """Passes everything on and counts real steps."""

    def __init__(self, batch):
        self.batch, self.steps, self.resets = batch, 0, 0

    def reset(self, slots, tasks, seeds=None):
        self.resets += len(slots)
        return self.batch.reset(slots, tasks, seeds)

    def step(self, slots, actions):
        self.steps += len(slots)
        return self.batch.step(slots, actions)

    def __getattr__(self, name):
        return getattr(self.batch, name)


@pytest.fixture(scope="module")
def env():
    built = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    return replace(built, annotate=lambda *step: reasoning_trace(*step))


@pytest.mark.parametrize("who", [EXPERT, NOISY, RANDOM], ids=lambda b: b.name)
@pytest.mark.parametrize("slots", [3, 64])
def test_every_real_transition_is_kept_once(env, who, slots):
    made = []
    counting = replace(env, make=lambda n: made.append(Counted(env.make(n))) or made[-1])
    tasks = env.tasks("train")[:12]
    told = []
    episodes = record(counting, tasks, who, slots=slots, on_episode=told.append)
    assert sum(map(len, episodes)) == made[0].steps and made[0].resets == 12
    assert sorted(ep[0].task_id for ep in episodes) == sorted(task.id for task in tasks)
    assert told[-1] == 12 and told == sorted(told)
    names = [ep[0].episode_id for ep in episodes]
    assert len(set(names)) == 12
    for episode in episodes:
        assert [row.turn for row in episode] == list(range(len(episode)))
        assert all(a.next_state == b.state for a, b in zip(episode, episode[1:]))
        assert {row.episode_id for row in episode} == {episode[0].episode_id}
        assert not any(row.terminated or row.truncated for row in episode[:-1])
        last = episode[-1]
        assert last.terminated != last.truncated and len(episode) <= env.max_turns
        assert {row.success for row in episode} == {last.reward > 0} and last.terminated == (last.reward > 0)
        assert all(row.source == "real" and row.env == env.name and row.reasoning for row in episode)


def test_same_seed_same_record(env):
    tasks = env.tasks("train")[:10]
    one, same = (record(env, tasks, NOISY, seed=3) for _ in range(2))
    other = record(env, tasks, NOISY, seed=4)
    assert one == same
    assert [[r.action for r in ep] for ep in one] != [[r.action for r in ep] for ep in other]


def test_the_expert_wins_and_noise_is_marked(env):
    tasks = env.tasks("train")[:40]
    expert = [row for ep in record(env, tasks, EXPERT) for row in ep]
    assert {row.policy for row in expert} == {"expert"} and {row.success for row in expert} == {True}
    noisy = [row for ep in record(env, tasks, NOISY) for row in ep]
    share = sum(row.policy == "noise" for row in noisy) / len(noisy)
    assert {row.policy for row in noisy} == {"expert", "noise"} and 0.33 < share < 0.47
    assert {row.policy for row in (r for ep in record(env, tasks[:5], RANDOM) for r in ep)} == {"random"}
    failed = [row for row in noisy if "\nlast: fail" in row.next_state]
    assert failed and {row.policy for row in failed} == {"noise"}  # an expert's action always works


def test_expert_rows_hold_what_the_expert_would_do(env):
    """Replaying a noisy episode, the expert asked at each of its rows gives the recorded action."""
    task = env.tasks("train")[7]
    (episode,) = record(env, [task], NOISY, seed=5, slots=1)
    batch = env.make(1)
    batch.reset([0], [task])
    for row in episode:
        if row.policy == "expert":
            assert env.expert(batch, 0, 5) == row.action
        batch.step([0], [row.action])


def test_without_an_expert_only_random_walks(env):
    blind = replace(env, expert=None)
    with pytest.raises(EnvironmentFailure, match="has no expert"):
        record(blind, env.tasks("train")[:1], NOISY)
    assert len(record(blind, env.tasks("train")[:3], RANDOM)) == 3


class Unlisted(CountingEnv):
    """Says nothing of what is possible."""

    def reset(self, slots, tasks, seeds=None):
        return [replace(r, admissible_actions=None) for r in super().reset(slots, tasks, seeds)]

    def step(self, slots, actions):
        return [replace(r, admissible_actions=None) for r in super().step(slots, actions)]


@pytest.mark.parametrize("behaviour", [NOISY, RANDOM])
def test_where_nothing_is_listed_noise_is_what_the_expert_would_do(behaviour):
    """Here and elsewhere, with near misses among them; never a word of another environment."""

    def expert(batch, slot, seed):
        return "add 1 to pile 1" if slot % 2 else f"take {1 + slot} from heap 2"

    toy = Environment("toy", None, 6, lambda split: [], Unlisted, expert=expert)
    episodes = record(toy, [Task(str(i), "99") for i in range(12)], behaviour, slots=4)
    assert record(toy, [Task(str(i), "99") for i in range(12)], behaviour, slots=4) == episodes
    noise = {row.action for episode in episodes for row in episode if row.policy != "expert"}
    wise = {expert(None, slot, 0) for slot in range(4)}
    spoken = {word for action in wise for word in action.split()}
    assert noise & wise and noise - wise and {word for action in noise for word in action.split()} <= spoken
    blind = replace(toy, expert=None)
    with pytest.raises(EnvironmentFailure, match=r"'toy' lists no admissible actions.*info\['admissible_actions'\]"):
        record(blind, [Task("a", "2")], RANDOM)


def test_broken_games_do_not_stop_the_others():
    class Fragile(CountingEnv):
        def reset(self, slots, tasks, seeds=None):
            results = super().reset(slots, tasks, seeds)
            bad = [task.id == "broken" for task in tasks]
            return [StepResult("", aborted="reset failed") if b else r for b, r in zip(bad, results, strict=True)]

        def _step(self, slot, action):
            result = super()._step(slot, action)
            dying = self._tasks[slot].id == "dying" and result.state == "count 2"
            return StepResult("count 0", aborted="server died") if dying else result

    toy = Environment("toy", None, 6, lambda split: [], Fragile, expert=lambda *a: "+1")
    tasks = [Task("broken", "1"), Task("fine", "2"), Task("dying", "3"), Task("also fine", "1")]
    episodes = record(toy, tasks, EXPERT, slots=2)
    found = {ep[0].task_id: ep for ep in episodes if ep}
    assert set(found) >= {"fine", "also fine"} and "broken" not in found
    assert [row.action for row in found["fine"]] == ["+1", "+1"]
    assert (
        len(found["dying"]) == 1
        and [row.success for row in found["fine"]] == [True, True]
        and found["dying"][0].success is None
    )
    assert all(row.next_state != "count 0" for ep in episodes for row in ep), "an aborted step is no transition"


# ---- rolled-out episodes


def rolled(env, task):
    (episode,) = record(env, [task], EXPERT)
    turns = [Turn([1], [2], [0.0], row.reward, row.state, row.action, row.action) for row in episode]
    last = episode[-1]
    return episode, Trajectory(
        turns, task, 5, "real", 0, last.terminated, last.truncated, last.success, final_state=last.next_state
    )


def test_rows_of_a_trajectory_equal_the_recorded_ones(env):
    recorded, trajectory = rolled(env, env.tasks("train")[2])
    rows = experiences_of(trajectory, env, "cloned", iteration=4)
    differing = ("episode_id", "policy", "iteration", "observation")
    for ours, theirs in zip(rows, recorded, strict=True):
        blank = {name: getattr(theirs, name) for name in differing}
        assert replace(ours, **blank) == theirs
        assert ours.policy == "cloned" and ours.iteration == 4


# ---- files


def test_recorded_rows_return_from_a_damaged_file(env, tmp_path):
    rows = [row for ep in record(env, env.tasks("train")[:8], NOISY) for row in ep]
    rows.append(replace(rows[0], state="naïve ☃ \u2028 \x85 state", success=None, episode_id="another"))
    assert write_jsonl(tmp_path / "a.jsonl", rows) == len(rows)
    assert read_trajectories(tmp_path, strict=True) == (rows, [])
    lines, rng = [json.dumps(to_row(row)) for row in rows], random.Random(0)
    garbage = ["{", "null", "[1]", "not json", '{"state": "s"}', '{"moon": 1}', "\ufffd\x00", lines[0][:50]]
    places = sorted(rng.sample(range(len(lines)), len(garbage)), reverse=True)
    for at, text in zip(places, garbage, strict=True):
        lines.insert(at, text)
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe broken bytes")
    back, bad = read_trajectories(tmp_path / "a.jsonl")
    numbers = [i for i, line in enumerate(lines, 1) if line in garbage] + [len(lines) + 1]
    assert back == rows and [int(entry.split(":")[1]) for entry in bad] == numbers
