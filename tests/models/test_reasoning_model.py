"""The contract between real transitions and the experience model's text, and what becomes of replies that break it."""

import random
from dataclasses import replace

import pytest

from dreamgym.core.config import BufferConfig, EnvironmentConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import DataError, PredictionError
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import TranscriptMapper, make_environment
from dreamgym.environments.household_rules import reasoning_trace
from dreamgym.environments.offline import EXPERT, RANDOM, Behaviour, record
from dreamgym.models.experience_sft import training_queries
from dreamgym.models.reasoning_model import (
    Query,
    ReasoningExperienceModel,
    parse_target,
    render_prompt,
    render_target,
)
from dreamgym.models.replay_buffer import ExperienceReplayBuffer


@pytest.fixture(scope="module")
def env():
    built = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    return replace(built, annotate=lambda *step: reasoning_trace(*step))


@pytest.fixture(scope="module")
def rows(env):
    """At least 2,000 real steps of experts, noisy experts and random walks, failures included."""
    tasks, noisy = env.tasks("train"), Behaviour("noisy", 0.4)
    parts = [(tasks[:70], EXPERT), (tasks[70:130], noisy), (tasks[:35], RANDOM)]
    return [row for chosen, who in parts for episode in record(env, chosen, who) for row in episode]


class Answers:
    """Gives the same replies in turn, and remembers what it was asked."""

    def __init__(self, *texts):
        self.texts, self.requests = texts, []

    def complete(self, requests):
        start = len(self.requests)
        self.requests += requests
        return [Reply(self.texts[(start + i) % len(self.texts)]) for i in range(len(requests))]


def model_of(env, client, buffer=None, **config):
    return ReasoningExperienceModel(ReasoningModelConfig(**config), client, buffer, env.mapper)


# ---- the contract


@pytest.mark.parametrize("reasoning", [True, False])
def test_every_real_step_survives_the_contract(env, rows, reasoning):
    assert len(rows) >= 2000 and sum(row.reward > 0 for row in rows) > 50
    assert sum("\nlast: fail" in row.next_state for row in rows) > 200
    for row in rows:
        text = render_target(row, env.mapper, reasoning)
        thought, after, reward, end = parse_target(text, row.state, row.action, env.mapper, reasoning)
        assert (after, reward, end) == (row.next_state, row.reward, row.terminated)
        assert thought == (row.reasoning if reasoning else "")


def test_reasoning_of_several_lines_stands_in_one(env, rows):
    for row in rows[:50]:
        told = replace(row, reasoning="a\n\nb\u2028 c")
        for whole in (False, True):
            text = render_target(told, env.mapper, whole=whole)
            thought, after, *_ = parse_target(text, row.state, row.action, env.mapper, whole=whole)
            assert (thought, after) == ("a b c", row.next_state)
    assert render_target(replace(rows[0], reasoning="\n"), env.mapper).startswith("no reasoning\n")


@pytest.mark.parametrize(
    "reward, line", [(0, "reward 0 end"), (1, "reward 1 end"), (2 / 3, "reward 0.67 end"), (0.5, "reward 0.5 end")]
)
def test_rewards_keep_two_decimals(env, rows, reward, line):
    row = replace(rows[0], reward=float(reward), terminated=True)
    text = render_target(row, env.mapper)
    assert text.endswith("\n" + line)
    assert parse_target(text, row.state, row.action, env.mapper)[2:] == (round(reward, 2), True)


@pytest.mark.parametrize("reward, end", [(0.5, False), (1.0, False), (2.0, True), (-1.0, True), (float("nan"), True)])
def test_rewards_that_the_contract_cannot_express_are_refused(env, rows, reward, end):
    with pytest.raises(DataError, match="expected a reward between 0 and 1"):
        render_target(replace(rows[0], reward=reward, terminated=end), env.mapper)


def test_a_model_that_writes_the_truth_predicts_it(env, rows):
    client = Answers(*(render_target(row, env.mapper) for row in rows))
    model = model_of(env, client)
    predictions = model.predict(training_queries(rows, model.config.history))
    assert model.predictions == len(rows) and model.malformed == 0
    for prediction, row in zip(predictions, rows, strict=True):
        assert prediction.valid and prediction.source == "synthetic" and prediction.reasoning == row.reasoning
        same = (
            "state",
            "action",
            "next_state",
            "reward",
            "terminated",
            "instruction",
            "world_id",
            "task_type",
            "split",
        )
        assert all(getattr(prediction, name) == getattr(row, name) for name in same)


def test_whole_next_states_say_what_changes_do(env, rows):
    """Read with and without colons and commas, which tokenizers from scratch drop; a damaged one is refused."""
    rng = random.Random(0)
    assert len(rows) > 1000
    for row in rows:
        text = render_target(row, env.mapper, whole=True)
        assert row.next_state in text
        for written in (text, text.replace(":", "").replace(",", "")):
            found = parse_target(written, row.state, row.action, env.mapper, whole=True)
            assert found[1:] == (row.next_state, row.reward, row.terminated)
        thought, *lines, last = text.split("\n")
        lines.pop(rng.randrange(len(lines)))
        with pytest.raises(PredictionError, match="some of its lines changed"):
            parse_target("\n".join([thought, *lines, last]), row.state, row.action, env.mapper, whole=True)


@pytest.mark.parametrize("name, raw", [("alfworld", True), ("taubench", False), ("webshop", False)])
def test_whole_next_states_of_other_mappers_are_read_too(name, raw):
    env = make_environment(name, EnvironmentConfig(name=name, data_dir="generated", mapper=not raw))
    mapper = env.mapper or TranscriptMapper()
    for episode in record(env, env.tasks("train")[:12], RANDOM):
        for row in episode:
            text = render_target(row, mapper, reasoning=False, whole=True)
            assert parse_target(text, row.state, row.action, mapper, False, True)[1] == row.next_state


def test_models_of_whole_states_are_asked_and_read_so(env, rows):
    section = ReasoningModelConfig(whole_states=True)
    client = Answers(*(render_target(row, env.mapper, whole=True) for row in rows))
    model = ReasoningExperienceModel(section, client, mapper=env.mapper)
    predictions = model.predict(training_queries(rows))
    assert [p.next_state for p in predictions] == [row.next_state for row in rows] and model.malformed == 0


@pytest.mark.parametrize(
    "reply, complaint",
    [
        ("", "last line"),
        ("at desk 1; ok", "last line"),
        ("reward 0", "no change|last line"),
        ("thought\nreward 0", "no change"),
        ("thought\nat: desk 1\nreward 2", "last line"),
        ("thought\nat: desk 1\nreward nan end", "last line"),
        ("thought\nat: desk 1\nreward 1.5 end", "last line"),
        ("thought\nat: desk 1\nreward 0.667 end", "last line"),
        ("thought\nat: desk 1\nreward -0.5 end", "last line"),
        ("thought\nat: desk 1\nreward 0.5", "without the end"),
        ("thought\nat: desk 1\nreward 1", "without the end"),
        ("thought\nfail\nreward 1 end", "cannot earn"),
        ("thought\nfail go to desk 1\nreward 1 end", "stands alone"),
        ("thought\nfail\nat: desk 1\nreward 0", "stands alone"),
        ("thought\n   \nreward 0", "."),
        ("thought\nmoon 7: mug 1\nreward 0", "moon 7"),
        ("thought\nbanana\nreward 0", "banana"),
        ("thought\nat: desk 1\nreward 0\nreward 0", "."),
        ('{"next_state": "at desk 1", "reward": 0}', "last line"),
    ],
)
def test_a_broken_reply_is_recorded_and_says_why(env, rows, reply, complaint):
    row = rows[0]
    with pytest.raises(PredictionError, match=complaint):
        parse_target(reply, row.state, row.action, env.mapper)
    model = model_of(env, Answers(reply))
    prediction = model.generate_experience(state=row.state, action=row.action, task=row.instruction)
    assert not prediction.valid and prediction.error and (prediction.reward, prediction.terminated) == (0.0, False)
    assert prediction.next_state == env.mapper.merge(row.state, f"fail {row.action}") and model.malformed == 1


@pytest.mark.parametrize("whole", [False, True])
def test_random_damage_never_raises(env, rows, whole):
    """Words are dropped, doubled, swapped and cut: each reply is a valid prediction or a recorded failure."""
    rng = random.Random(0)
    words = sorted({word for row in rows[:200] for word in render_target(row, env.mapper, whole=whole).split()})
    words += ["\n", "+", "-", "?", ":", "99", "<|end|>", "\x00", "é", "reward 1 end"]
    chosen = [rng.choice(rows) for _ in range(4000)]
    replies = []
    for row in chosen:
        tokens = render_target(row, env.mapper, whole=whole).replace("\n", " \n ").split(" ")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(tokens) + 1)
            tokens[at : at + rng.randint(0, 2)] = [rng.choice(words)] * rng.randint(0, 2)
        replies.append(" ".join(tokens).replace(" \n ", "\n")[: rng.choice((20, 10_000))])
    model = model_of(env, Answers(*replies), whole_states=whole)
    predictions = model.predict(training_queries(chosen))
    assert len(predictions) == 4000 and 400 < model.malformed < 3990
    assert model.malformed == sum(not p.valid for p in predictions) == sum(bool(p.error) for p in predictions)
    for p in predictions:  # whatever came out can be dreamt on
        assert env.mapper.admissible_actions(p.next_state) and env.mapper.facts(p.next_state)
        assert (p.terminated or not p.reward) and p.next_state.startswith("task: ")
        assert env.mapper.merge(p.next_state, "fail look").endswith("last: fail look")


def test_a_huge_reply_is_only_malformed(env, rows):
    model = model_of(env, Answers("mug " * 250_000))
    assert not model.generate_experience(rows[0].state, rows[0].action, rows[0].instruction).valid


# ---- prompts and retrieval


def test_history_is_shown_as_far_as_configured(env, rows):
    name = next(row.episode_id for row in rows if row.turn == 6)
    episode = [row for row in rows if row.episode_id == name]
    query = training_queries(episode, history=3)[4]
    assert [action for _, action in query.history] == [row.action for row in episode[1:4]]
    assert "before: " not in render_prompt(query, [], env.mapper, history=0)
    shown = render_prompt(query, [], env.mapper, history=2)
    assert f"before: {episode[2].action}; {episode[3].action}\n" in shown
    assert shown.startswith(query.state) and shown.endswith(f"action: {query.action}")


def test_training_queries_start_afresh_with_each_episode(rows):
    for query, row in zip(training_queries(rows, 2), rows, strict=True):
        assert query.exclude_episode == row.episode_id and len(query.history) == min(row.turn, 2)
        assert (query.state, query.action, query.world_id) == (row.state, row.action, row.world_id)


@pytest.mark.parametrize("same_action", [True, False])
def test_the_own_episode_is_never_retrieved(env, rows, same_action):
    """Every demonstration comes from another episode, although the own one would match best."""
    config = BufferConfig(top_k=3, same_action=same_action)
    buffer = ExperienceReplayBuffer(config, dedup=False)
    buffer.add_many(rows)
    model = model_of(env, Answers(""), buffer)
    queries = training_queries(rows)[:400]
    found = model.demos(queries)
    assert sum(map(len, found)) > 50
    assert all(d.episode_id != q.exclude_episode for q, demos in zip(queries, found, strict=True) for d in demos)
    assert all(d.world_id == q.world_id for q, demos in zip(queries, found, strict=True) for d in demos)
    own = model.demos([replace(q, exclude_episode="") for q in queries])
    assert sum(q.exclude_episode in {d.episode_id for d in demos} for q, demos in zip(queries, own, strict=True)) > 100


def test_demonstrations_reach_the_prompt(env, rows):
    buffer = ExperienceReplayBuffer(BufferConfig(top_k=1))
    buffer.add_many([replace(rows[0], episode_id="elsewhere")])
    client = Answers("")
    model_of(env, client, buffer).predict(training_queries(rows[:1]))
    (prompt,) = [request.prompt for request in client.requests]
    assert f"\nseen: {rows[0].action} > " in prompt
    bare = Answers("")
    model_of(env, bare, ExperienceReplayBuffer(BufferConfig(top_k=1))).predict(training_queries(rows[:1]))
    assert "\nseen: " not in bare.requests[0].prompt


def test_no_retrieval_where_top_k_is_zero(env, rows):
    buffer = ExperienceReplayBuffer(BufferConfig(top_k=0))
    buffer.add_many(rows[:50])
    assert model_of(env, Answers(""), buffer).demos(training_queries(rows[:3])) == [[], [], []]


def test_one_call_for_a_batch(env, rows):
    client = Answers("")
    calls = []
    client.complete, complete = lambda requests: calls.append(len(requests)) or complete(requests), client.complete
    model = model_of(env, client, temperature=0.3, max_new_tokens=17)
    model.predict(training_queries(rows[:32]))
    assert calls == [32]
    assert {(r.temperature, r.max_new_tokens) for r in client.requests} == {(0.3, 17)}
    assert model.predict([]) == [] and calls == [32]


def test_without_a_mapper_states_are_transcripts():
    model = ReasoningExperienceModel(ReasoningModelConfig(), Answers("I look.\nlook = A desk.\nreward 0", "?"))
    assert isinstance(model.mapper, TranscriptMapper)
    good, bad = (model.generate_experience("task: find it\nA room.", "look", Task("t", "find it")) for _ in range(2))
    assert good.next_state == "task: find it\nA room.\nlook = A desk." and good.reasoning == "I look."
    assert not bad.valid and bad.next_state.endswith("fail look")


def test_transcripts_keep_their_lines():
    """Task and first observation are a line each, whatever they hold; a state of one line is gone on from."""
    mapper, task = TranscriptMapper(window=2), Task("t", "find it\nand  bring it")
    state = mapper.start(task, "A room.\nA desk.")
    assert state == "task: find it and bring it\nA room. A desk."
    for action in "abc":
        state = mapper.update(state, action, "ok")
    assert state.split("\n")[1:] == ["A room. A desk.", "b = ok", "c = ok"]
    model = ReasoningExperienceModel(ReasoningModelConfig(), Answers("?"))
    found = model.generate_experience("count 0", "look", Task("t", "find it"))
    assert not found.valid and found.next_state == "count 0\nfail look"


def test_a_query_belongs_to_the_world_of_its_task():
    assert Query("s", "a", Task("t", "i", world_id="w")).world_id == "w"
