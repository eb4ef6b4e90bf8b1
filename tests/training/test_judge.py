"""The judge: its contract, what it counts, and whether planted errors are seen on real household episodes."""

import json
import math
import random
import re

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.errors import PredictionError
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.offline import EXPERT, Behaviour, record
from dreamgym.training.judge import CRITERIA, KINDS, judge, judge_request, plant, rank_planted, read_scores


@pytest.fixture(scope="module")
def env():
    return make_environment("alfworld", EnvironmentConfig(data_dir="generated"))


@pytest.fixture(scope="module")
def episodes(env):
    tasks = env.tasks("train")
    return record(env, tasks[:40], EXPERT) + record(env, tasks[40:60], Behaviour("noisy", 0.4))


def grades(score):
    return json.dumps({c.name: {"reason": "so", "score": score} for c in CRITERIA})


def steps_of(request):
    head, _, steps = request.prompt.partition("\n\nSteps (action > what it changed):\n")
    return head, re.split(r"\n(?=\d+: )", steps)


class Oracle:
    """Knows every real step by heart; one point less for each criterion where a step is none of them."""

    def __init__(self, episodes, mapper):
        self.known = {
            (head, step) for e in episodes for head, steps in [steps_of(judge_request(e, mapper))] for step in steps
        }

    def complete(self, requests):
        asked = [steps_of(r) for r in requests]
        faults = [sum((head, step) not in self.known for step in steps) for head, steps in asked]
        return [Reply(grades(2 - min(2, fault))) for fault in faults]


def test_an_oracle_ranks_planted_errors_below_the_truth(env, episodes):
    ranking = rank_planted(episodes, Oracle(episodes, env.mapper), env.mapper)
    assert ranking.right.n > 150 and ranking.right.value >= 0.95 and ranking.unjudged == 0
    assert all(e.n > 40 and e.value >= 0.95 for e in ranking.by_kind.values()) and set(ranking.by_kind) == set(KINDS)


def test_who_praises_or_blames_everything_sees_nothing(env, episodes):
    for score in (0, 2):
        same = type("Same", (), {"complete": lambda self, requests, s=score: [Reply(grades(s)) for _ in requests]})()
        ranking = rank_planted(episodes[:10], same, env.mapper)
        assert ranking.right.value == 0 and ranking.ties == ranking.right.n


def test_a_mute_judge_is_counted(env, episodes):
    mute = type("Mute", (), {"complete": lambda self, requests: [Reply("") for _ in requests]})()
    ranking = rank_planted(episodes[:10], mute, env.mapper)
    assert ranking.unjudged == ranking.right.n > 20 and ranking.right.value == 0
    seen = judge(episodes[:3], mute, env.mapper, votes=2)
    assert seen.bad == {"bad JSON": 6} and all(map(math.isnan, seen.totals())) and seen.row()["unreadable"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_planted_errors_differ_in_one_step(env, episodes, kind):
    rng, found = random.Random(0), 0
    for episode in episodes:
        damaged = plant(episode, kind, env.mapper, rng)
        if damaged is None:
            continue
        changed = [i for i, (a, b) in enumerate(zip(episode, damaged, strict=False)) if a != b]
        assert len(changed) == 1
        real, wrong = episode[changed[0]], damaged[changed[0]]
        if kind == "false success":
            assert (wrong.reward, wrong.terminated, len(damaged)) == (1, True, changed[0] + 1) and not real.terminated
        elif kind == "copied state":
            assert wrong.next_state == wrong.state != real.next_state
        else:
            assert env.mapper.facts(wrong.next_state) != env.mapper.facts(real.next_state)
        found += 1
    assert found > 40


def test_votes_are_averaged_and_one_batch(env, episodes):
    calls = []

    class Undecided:
        def complete(self, requests):
            calls.append([r.sample for r in requests])
            return [Reply(grades(r.sample % 3)) for r in requests]

    seen = judge(episodes[:2], Undecided(), env.mapper, votes=3)
    assert calls == [[0, 1, 2] * 2] and seen.totals() == [4, 4] and seen.mean("diversity").value == 1
    assert judge([], Undecided(), env.mapper).totals() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fine",
        "{}",
        grades(3),
        grades(1.5),
        grades(2)[:-4],
        json.dumps({"diversity": 2}),
        grades(2).replace('"so"', "7"),
    ],
)
def test_replies_that_are_no_grades(text):
    with pytest.raises(PredictionError, match="bad JSON|wrong schema"):
        read_scores(Reply(text))


def test_grades_in_a_fence_are_read():
    assert set(read_scores(Reply(f"<think>hm</think>```json\n{grades(1)}\n```")).values()) == {1}
