"""Reasoning for recorded steps: by rules, by a scripted teacher, with faults, and again from a cache."""

import json
import random
import re
from dataclasses import replace

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Experience
from dreamgym.core.errors import ConfigError
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import TranscriptMapper, make_environment
from dreamgym.environments.offline import EXPERT, RANDOM, record
from dreamgym.models.annotation import ANNOTATION, annotate, episode_pieces, teacher_request


@pytest.fixture(scope="module")
def env():
    return make_environment("alfworld", EnvironmentConfig(data_dir="generated"))


@pytest.fixture(scope="module")
def rows(env):
    tasks = env.tasks("train")
    return [row for who in (EXPERT, RANDOM) for episode in record(env, tasks[:6], who) for row in episode]


def answer(steps, plan="step {}: the facts say so"):
    tutorial = {"overall_plan": "p", "success_mode": "s", "failure_mode": "f"}
    plans = [{"step_id": i, "transition_plan": plan.format(i)} for i in steps]
    return json.dumps({"task_tutorial": tutorial, "state_transitions": plans})


def asked(request):
    return [int(n) for n in re.findall(r"\d+", request.prompt.rsplit("Explain the steps:\n", 1)[1])]


class Teacher:
    def __init__(self, reply=lambda request: answer(asked(request))):
        self.reply, self.requests = reply, []

    def complete(self, requests):
        self.requests += requests
        replies = [self.reply(r) for r in requests]
        return [r if isinstance(r, Reply) else Reply(r) for r in replies]


def test_every_step_gets_its_own_plan(env, rows):
    teacher = Teacher()
    found, report = annotate([replace(row, reasoning="") for row in rows], env, teacher, size=4)
    positions = {}
    for before, after in zip(rows, found, strict=True):
        at = positions[before.episode_id] = positions.get(before.episode_id, -1) + 1
        assert after.reasoning == f"step {at}: the facts say so"
        assert replace(after, reasoning=before.reasoning) == before, "nothing else is touched"
    episodes = len(positions)
    assert report.row() == {
        "by": "llm",
        "rows": len(rows),
        "annotated": len(rows),
        "requests": len(teacher.requests),
    } | {
        "missing": 0,
        "bad": {},
    }
    assert len(report.tutorials) == episodes and len(teacher.requests) >= episodes
    assert all(r.schema is ANNOTATION and r.max_new_tokens > 100 for r in teacher.requests)


def test_the_teacher_sees_the_whole_episode_and_its_end(env, rows):
    won = next(row.episode_id for row in rows if row.success and row.turn == 5 and not row.reward)
    episode = [row for row in rows if row.episode_id == won]
    piece = episode_pieces(episode, size=3)[1]
    prompt = teacher_request(piece, env.mapper).prompt
    assert (
        "How the episode ended:\nthe task was done" in prompt and "State before step 3:\n" + episode[3].state in prompt
    )
    assert all(f"{i}: {row.action} > " in prompt for i, row in enumerate(episode))
    assert "(the end, reward 1)" in prompt and prompt.endswith("Explain the steps:\n3, 4, 5")
    unknown = [replace(row, success=None) for row in episode]
    assert "ended:\nunknown" in teacher_request(episode_pieces(unknown)[0], env.mapper).prompt


def test_bad_replies_are_counted_and_asked_again(env, rows):
    rng, kinds = random.Random(0), ["", "The mug.", '{"state_transitions": [', answer([999]), answer([0], " ")]
    lost = Reply("", "error", error="timeout: 120 s")
    given = []

    def reply(request):
        wrong = rng.random() < 0.3
        given.append(rng.choice([*kinds, lost, '{"task_tutorial": 3}']) if wrong else answer(asked(request)))
        return given[-1]

    found, report = annotate([replace(row, reasoning="old") for row in rows], env, Teacher(reply), size=2, tries=6)
    bad = len([g for g in given if not (isinstance(g, str) and "the facts say so" in g and "999" not in g)])
    assert report.bad.total() == bad > 10 and set(report.bad) == {
        "bad JSON",
        "wrong schema",
        "missing steps",
        "timeout",
    }
    assert report.annotated == sum(row.reasoning != "old" for row in found) > 0.99 * len(rows)


def test_steps_that_stay_unexplained_keep_what_they_had(env, rows, caplog):
    found, report = annotate(rows, env, Teacher(lambda r: answer(asked(r)[:1])), size=5, tries=2)
    kept = [before.reasoning == after.reasoning for before, after in zip(rows, found, strict=True)]
    assert sum(kept) == report.row()["missing"] > 0 and "no plan by the teacher" in caplog.text


def test_again_asks_with_another_sample_for_what_is_missing_only(env, rows):
    teacher = Teacher(lambda r: answer(asked(r)[:2]))
    annotate(rows, env, teacher, size=6, tries=2)
    first = [r for r in teacher.requests if r.sample == 0]
    again = [r for r in teacher.requests if r.sample == 1]
    assert len(first) + len(again) == len(teacher.requests) and again
    assert all(len(asked(r)) <= 4 for r in again)


def test_plans_are_one_line(env, rows):
    found, _ = annotate(rows[:3], env, Teacher(lambda r: answer(asked(r), "a\n\n b\t{}")))
    assert [row.reasoning for row in found] == ["a b 0", "a b 1", "a b 2"]


def test_rules_where_they_exist(env, rows):
    found, report = annotate([replace(row, reasoning="") for row in rows], env)
    assert found == rows and report.row()["annotated"] == len(rows)
    with pytest.raises(ConfigError, match="annotation to 'llm'"):
        annotate(rows, replace(env, annotate=None))


def test_a_world_without_a_mapper():
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated", mapper=False))
    assert isinstance(env.mapper, TranscriptMapper)
    row = Experience("task: x\na room", "look", 0.0, "task: x\na room\nlook = a desk", False, episode_id="e")
    found, _ = annotate([row], replace(env, mapper=None), Teacher())
    assert found[0].reasoning.startswith("step 0")


def test_nothing_to_annotate(env):
    assert annotate([], env, Teacher())[1].requests == 0
