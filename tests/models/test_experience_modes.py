"""Instructed models, votes, pessimism, known rules as a check, and replies that never come."""

import json
import random
from dataclasses import replace

import pytest

from dreamgym.core.config import BufferConfig, EnvironmentConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Experience, Task
from dreamgym.core.errors import ConfigError, PredictionError
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import TranscriptMapper, make_environment
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.offline import EXPERT, RANDOM, record
from dreamgym.models.experience_sft import training_queries
from dreamgym.models.instructions import instructed_prompt, read_step
from dreamgym.models.reasoning_model import Query, ReasoningExperienceModel, failure_kind, render_target
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.models.votes import elect, pessimistic, vote_shares


@pytest.fixture(scope="module")
def env():
    return make_environment("alfworld", EnvironmentConfig(data_dir="generated"))


@pytest.fixture(scope="module")
def rows(env):
    tasks = env.tasks("train")
    return [row for who in (EXPERT, RANDOM) for episode in record(env, tasks[:25], who) for row in episode]


class Answers:
    """Replies by request; remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.requests, self.calls = answer, [], 0

    def complete(self, requests):
        self.calls += 1
        self.requests += requests
        replies = [self.answer(request) for request in requests]
        return [reply if isinstance(reply, Reply) else Reply(reply) for reply in replies]


def model_of(env, answer, buffer=None, check=None, **config):
    settings = ReasoningModelConfig(**config)
    return ReasoningExperienceModel(settings, Answers(answer), buffer, env.mapper, None, check)


def as_json(row, mapper):
    """What an instructed model should answer."""
    works = row.next_state != mapper.merge(row.state, f"fail {row.action}")
    fields = {"reasoning": row.reasoning, "works": works, "next_state": row.next_state.split("\n") if works else []}
    return json.dumps(fields | {"reward": row.reward, "terminated": row.terminated})


# ---- instructions


def test_an_instructed_model_that_knows_the_truth_predicts_it(env, rows):
    known = {(row.state, row.action): as_json(row, env.mapper) for row in rows}

    def answer(request):
        state, _, action = request.prompt.partition("\n\nState:\n")[2].partition("\n\nAction:\n")
        return known[state, action]

    model = model_of(env, answer, prompted=True)
    found = model.predict(training_queries(rows, 2))
    assert len(rows) > 300 and model.malformed == 0
    for e, row in zip(found, rows, strict=True):
        assert (e.next_state, e.reward, e.terminated) == (row.next_state, row.reward, row.terminated)
        assert e.reasoning == row.reasoning
    request, *_ = model.client.requests
    assert request.schema["required"][0] == "reasoning" and "JSON object" in request.system


def test_what_is_served_is_instructed_unless_told_otherwise():
    served = {"provider": "openai", "name": "m"}
    assert ReasoningModelConfig(**served).instructed and not ReasoningModelConfig().instructed
    assert not ReasoningModelConfig(**served, prompted=False).instructed
    assert ReasoningModelConfig(prompted=True).instructed


def test_an_instructed_model_sees_similar_steps_everywhere_and_the_past(env, rows):
    buffer = ExperienceReplayBuffer(BufferConfig(top_k=2, same_world=False), dedup=False)
    buffer.add_many(rows)
    row = next(row for row in rows if row.action.startswith("take") and row.turn > 2)
    query = training_queries([r for r in rows if r.episode_id == row.episode_id], 2)[row.turn]
    model = model_of(env, lambda request: "", buffer, prompted=True)
    model.predict([query])
    prompt = model.client.requests[0].prompt
    assert "Similar steps of the real environment:\n- " in prompt and "Before, oldest first:\n- " in prompt
    assert all(f"- {action} > " in prompt for _, action in query.history)
    bare = instructed_prompt(Task("t", "find it", context="two rooms"), "s", "look", env.mapper)
    assert bare == "Task:\nfind it\n\nAbout this world:\ntwo rooms\n\nState:\ns\n\nAction:\nlook"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: f"```json\n{text}\n```",
        lambda text: f"<think>hm {{}}</think>\nHere you are: {text}",
        lambda text: text[:-1] + ",}",
        lambda text: text.replace('"next_state"', '"Next State"').replace('"terminated"', '"done"'),
        lambda text: text.replace('"reward": 0.0', '"reward": "0"').replace("false", '"False"'),
        lambda text: f"[{text}]",
        lambda text: json.dumps(json.loads(text) | {"next_state": "\n".join(json.loads(text)["next_state"])}),
    ],
)
def test_small_faults_are_repaired(env, rows, damage):
    row = next(row for row in rows if row.action.startswith("go to") and "\nlast: ok" in row.next_state)
    assert read_step(damage(as_json(row, env.mapper)), row.state, row.action, env.mapper)[1] == row.next_state


def test_lines_are_read_where_json_was_asked_for(env, rows):
    row = rows[0]
    model = model_of(env, lambda request: render_target(row, env.mapper), prompted=True)
    assert model.generate_experience(row.state, row.action, row.instruction).next_state == row.next_state


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"reward": 1}, "without the end"),
        ({"reward": 2, "terminated": True}, "0 to 1"),
        ({"reward": float("nan")}, "bad JSON"),
        ({"works": False, "reward": 1, "terminated": True}, "cannot earn"),
        ({"works": "maybe"}, "true or false"),
        ({"next_state": "banana"}, "banana"),
        ({"next_state": None}, "no next state"),
        ({"next_state": {"at": "desk"}}, "no next state"),
    ],
)
def test_what_contradicts_the_contract_is_refused(env, rows, change, complaint):
    row = rows[0]
    text = json.dumps(json.loads(as_json(row, env.mapper)) | change)
    with pytest.raises(PredictionError, match=complaint):
        read_step(text, row.state, row.action, env.mapper)
    model = model_of(env, lambda request: text, prompted=True)
    e = model.generate_experience(row.state, row.action, row.instruction)
    assert failure_kind(e) == "malformed" and (e.reward, e.terminated) == (0.0, False)


def test_random_json_never_raises(env, rows):
    rng = random.Random(0)
    values = [
        None,
        True,
        1,
        -3,
        0.5,
        "1",
        "yes",
        [],
        ["at: desk 1"],
        {"a": 1},
        "at: desk 1\nhold: nothing",
        "\x00",
        "é",
    ]
    keys = ["reasoning", "works", "next_state", "reward", "terminated", "Done", "x"]

    def answer(request):
        text = json.dumps({key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 7))})
        return text[: rng.choice((8, 1000, 1000))]

    model = model_of(env, answer, prompted=True)
    found = [e for _ in range(10) for e in model.predict(training_queries(rows[:200]))]
    assert model.malformed == sum(not e.valid for e in found) > 1000
    assert all((e.terminated or not e.reward) and env.mapper.facts(e.next_state) for e in found)


# ---- votes


def test_votes_are_one_batch_with_samples_of_their_own(env, rows):
    model = model_of(env, lambda request: "banana", votes=3, redraws=2)
    model.predict(training_queries(rows[:4]))
    assert model.client.calls == 3 and [r.sample for r in model.client.requests[:4]] == [0, 1, 2, 0]
    assert sorted({r.sample for r in model.client.requests}) == list(range(9))
    assert (model.predictions, model.malformed, model.redrawn) == (4, 4, 8)


def test_a_greedy_model_is_not_asked_twice(env, rows):
    model = model_of(env, lambda request: "banana", redraws=3, temperature=0.0)
    model.predict(training_queries(rows[:4]))
    assert model.client.calls == 1 and model.redrawn == 0


def test_the_majority_corrects_a_noisy_model(env, rows):
    """A model that is wrong in a third of its samples; five votes are right far more often."""
    truth = {(row.state, row.action): render_target(row, env.mapper) for row in rows}

    def exact(votes):
        rng = random.Random(votes)

        def answer(request):
            text = truth[tuple(request.prompt.rsplit("\naction: ", 1))]
            return text if rng.random() > 1 / 3 else rng.choice(["banana", "ok\nfail\nreward 0"])

        model = model_of(env, answer, votes=votes, history=0)
        found = model.predict(training_queries(rows))
        worked = [i for i, row in enumerate(rows) if "\nlast: ok" in row.next_state]
        return sum(found[i].next_state == rows[i].next_state for i in worked) / len(worked)

    assert exact(1) < 0.75 < 0.9 < exact(5)


def predictions(*outcomes):
    """Votes (next state, reward), of a transcript; None cannot be read."""
    mapper, state = TranscriptMapper(), "task: find it\na room"
    base = Experience(state, "open", 0.0, mapper.merge(state, "fail open"), False)
    votes = [
        (
            replace(base, valid=False, error="?")
            if outcome is None
            else replace(base, next_state=mapper.merge(state, outcome[0]), reward=outcome[1], terminated=outcome[1] > 0)
        )
        for outcome in outcomes
    ]
    return votes, mapper


@pytest.mark.parametrize(
    "outcomes, state, agreement, reward_share",
    [
        ([("a", 0)], "a", 1, 1),
        ([("a", 0), ("b", 0), ("b", 0)], "b", 1, 1),  # imagined contents may differ
        ([("a", 0), ("fail open", 0), ("fail open", 0)], "fail open", 2 / 3, 1),
        ([("a", 1), ("a", 0), ("b", 0), None], "a", 1 / 2, 1 / 2),
        ([("a", 1), ("b", 0)], "a", 1 / 2, 1 / 2),  # the first drawn of equals
        ([None, ("a", 0)], "a", 1 / 2, 1 / 2),
    ],
)
def test_elections_by_hand(outcomes, state, agreement, reward_share):
    election = elect(*predictions(*outcomes))
    assert election.chosen.next_state.endswith(state)
    assert (election.agreement, election.reward_share) == (agreement, reward_share)


def test_pessimism_by_hand():
    disputed = elect(*predictions(("a", 1), ("a", 1), ("a", 0)))
    assert pessimistic(disputed, "none", 0.75).reward == 1 and pessimistic(disputed, "lower", 0.75).reward == 0.67
    ended = pessimistic(disputed, "end", 0.75)
    assert (ended.reward, ended.terminated) == (0, True) and ended.next_state == disputed.chosen.next_state
    assert pessimistic(disputed, "end", 0.6) == disputed.chosen
    sure = elect(*predictions(("a", 1), ("a", 1)))
    assert all(pessimistic(sure, rule, 1.0) == sure.chosen for rule in ("none", "lower", "end"))
    unread = elect(*predictions(None, None))
    assert pessimistic(unread, "end", 0.75) == unread.chosen  # nobody disagreed
    assert vote_shares(*predictions(("a", 1), None, ("fail open", 0), ("a", 0))) == {
        "reward": 0.25,
        "terminated": 0.25,
        "works": 0.5,
    }


def test_pessimism_needs_votes(env):
    with pytest.raises(ConfigError, match="votes to 3 or more"):
        model_of(env, lambda request: "", pessimism="lower")


# ---- known rules


def test_predictions_against_the_rules_are_redrawn_or_refused(env, rows):
    """A generous model gives a reward at its first try; the second is the truth."""
    row = next(row for row in rows if row.action.startswith("go to") and "\nlast: ok" in row.next_state)
    truth = render_target(row, env.mapper)
    generous = truth.replace("reward 0", "reward 1 end")
    for redraws, believed in ((0, False), (1, True)):
        answer = lambda request: truth if request.sample else generous  # noqa: E731
        model = model_of(env, answer, check=env.verify, redraws=redraws)
        assert model.generate_experience(row.state, row.action, row.instruction).reward == 1, "off by default"
        model = model_of(env, answer, check=env.verify, redraws=redraws, verify=True)
        e = model.generate_experience(row.state, row.action, row.instruction)
        assert e.reward == 0 and e.valid == believed and model.refused == (not believed)
        assert believed or e.error == "against the rules: false reward"


def test_real_steps_are_never_refused(env, rows):
    texts = iter(render_target(row, env.mapper) for row in rows)
    model = model_of(env, lambda request: next(texts), check=env.verify, verify=True)
    model.predict(training_queries(rows))
    assert model.refused == model.malformed == 0


# ---- no reply


def test_an_unanswered_prediction_aborts_its_own_dream_only(env, rows):
    first = {row.task_id: row.state for row in rows if row.turn == 0}
    tasks = [replace(task, initial_state=first[task.id]) for task in env.tasks("train")[:4]]
    model = model_of(
        env, lambda r: Reply("", "error", error="timeout: 2 s") if "open moon" in r.prompt else "x\nfail\nreward 0"
    )
    dream = DreamEnv(model, 4, env.max_turns)
    dream.reset(range(4), tasks)
    results = dream.step(range(4), ["look", "open moon 1", "look", "look"])
    assert [r.aborted for r in results] == [None, "no answer: timeout: 2 s", None, None]
    assert results[1].state == tasks[1].initial_state and results[1].success is None
    assert (model.unanswered, model.malformed, model.predictions) == (1, 0, 4)
    assert len(dream.step([0, 2, 3], ["look"] * 3)) == 3
    with pytest.raises(ValueError, match="slot 1 has no dream"):
        dream.step([1], ["look"])


def test_one_vote_that_never_came_is_left_out(env, rows):
    row = rows[0]
    lost = Reply("", "error", error="dropped: …")
    model = model_of(env, lambda r: lost if r.sample else render_target(row, env.mapper), votes=2)
    assert model.predict([Query(row.state, row.action, Task("t", ""))])[0].valid and model.unanswered == 0


def test_json_faults_of_a_client_are_the_models_own(env, rows):
    for error, kind in (
        ("bad JSON: …", "malformed"),
        ("wrong schema: …", "malformed"),
        ("rate limit: …", "unanswered"),
    ):
        model = model_of(env, lambda r, error=error: Reply("", "error", error=error), prompted=True)
        e = model.generate_experience(rows[0].state, rows[0].action, "x")
        assert failure_kind(e) == kind and error in e.error


@pytest.mark.parametrize(("prompted", "key"), [(False, "max_new_tokens"), (True, "reply_tokens")])
def test_a_reply_that_was_cut_off_says_what_to_do(prompted, key, env, rows):
    lost = Reply("", "error", error="bad JSON: …; it was cut off, raise max_new_tokens")
    for reply in [Reply("at desk", "length"), *([lost] if prompted else [])]:
        model = model_of(env, lambda r, reply=reply: reply, prompted=prompted)
        said = model.generate_experience(rows[0].state, "look", "x").error
        assert said.endswith(f"it was cut off, raise reasoning_model.{key}"), said


def test_an_instructed_model_has_room_for_a_whole_state(env, rows):
    """`max_new_tokens` is sized for the changes that a trained model writes."""
    for told, room in (({}, 9), ({"prompted": True}, 1024), ({"prompted": True, "reply_tokens": 300}, 300)):
        model = model_of(env, lambda r: Reply("no"), max_new_tokens=9, **told)
        model.generate_experience(rows[0].state, "look", "x")
        assert {r.max_new_tokens for r in model.client.requests} == {room}
