"""The embedded service desk: tools, tickets, abstract states, rules, sessions, floors."""

import json
import random
from dataclasses import replace

import pytest

from dreamgym.core.config import EnvironmentConfig, load_config
from dreamgym.core.data_structures import Experience
from dreamgym.core.errors import ConfigError, DataError, EnvironmentFailure
from dreamgym.core.language_model import train_tokenizer
from dreamgym.core.llm import LLMError, Reply
from dreamgym.environments.base_env import check_env, make_environment
from dreamgym.environments.desk_rules import desk_determined, judge_call
from dreamgym.environments.desk_state import parse_desk
from dreamgym.environments.offline import RANDOM, Behaviour, record
from dreamgym.environments.service_desk import (
    FIRST,
    WISHES,
    DeskData,
    ServiceDesk,
    desk_case,
    desk_task,
    desk_tools,
    desk_world,
    feasible,
    gold_actions,
    read_ticket,
    replay,
    vary,
)
from dreamgym.environments.service_session import ENDS, ConversationMapper, ServiceEnv, Session
from dreamgym.environments.taubench import DeskService, build
from dreamgym.environments.tool_calls import CallError, read_call, run_call, write_call

DONE = write_call(ENDS)


@pytest.fixture(scope="module")
def env():
    return build()


def play(env, tasks, choose):
    """Plays every task once; the last result of each."""
    batch, slots = env.make(len(tasks)), list(range(len(tasks)))
    results = dict(zip(slots, batch.reset(slots, tasks), strict=True))
    while alive := [slot for slot in slots if not results[slot].done]:
        actions = [choose(batch, slot, results[slot]) for slot in alive]
        results |= zip(alive, batch.step(alive, actions), strict=True)
    return [results[slot] for slot in slots]


def share(env, tasks, choose):
    return sum(bool(result.success) for result in play(env, tasks, choose)) / len(tasks)


def test_noise_at_a_desk_without_a_list_calls_tools():
    """Plain text would end the conversation: nobody is there to hear it, as in an official domain."""

    class Strict(DeskService):
        plain_ends = True

    made = build(EnvironmentConfig(name="taubench", mapper=False))
    strict = replace(made, make=lambda slots: ServiceEnv(slots, Strict, made.max_turns, made.mapper))
    for behaviour in (RANDOM, Behaviour("noisy", 0.3)):
        episodes = record(strict, strict.tasks("train")[:20], behaviour)
        rows = [row for episode in episodes for row in episode]
        assert all(row.action.startswith("{") for row in rows) and len(rows) > 3 * len(episodes)
        noise = [read_call(row.action) for row in rows if row.policy != "expert"]
        assert {call.name for call in noise} >= {"find", "refund", "show"}


# ---- the desk


def test_registry_builds_the_embedded_default():
    env = make_environment("taubench", load_config(None, "taubench", "smoke").environment)
    assert env.name == "taubench-desk" and env.max_turns == 15 and env.info["data"] == "generated"


def test_worlds_of_splits_are_apart_and_seen_tickets_are_held_out(env):
    tasks = {split: list(env.tasks(split)[:600]) for split in FIRST}
    worlds = {split: {task.world_id for task in found} for split, found in tasks.items()}
    assert worlds["train"] == worlds["seen"]
    assert not worlds["train"] & worlds["valid"] and not worlds["valid"] & worlds["unseen"]
    asked = {split: {(t.world_id, read_ticket(t.instruction)[1]) for t in found} for split, found in tasks.items()}
    assert not asked["train"] & asked["seen"]
    assert len(env.tasks("unseen")) >= 200 and {t.task_type for t in tasks["unseen"]} == set(WISHES)
    assert [t.id for t in tasks["train"]] == [f"desk-train-{n}" for n in range(600)]


def test_cases_are_in_tau2_format_and_assertions_tell_gold_from_less():
    for task in (desk_task(n, "unseen") for n in range(60)):
        case = json.loads(json.dumps(desk_case(task)))
        criteria, start = case["evaluation_criteria"], case["initial_state"]["initialization_data"]["agent_data"]
        assert criteria["reward_basis"] == ["DB", "ENV_ASSERTION"] and criteria["env_assertions"] and case["ticket"]
        desk = ServiceDesk(DeskData.of(start))
        before = desk.data.hash()
        for action in criteria["actions"]:
            run_call(desk_tools(desk), read_call(write_call(action["name"], **action["arguments"])))
        outcomes = {name: order.outcome for name, order in desk.data.orders.items()}
        assert all(outcomes[a["arguments"]["order"]] == a["arguments"]["outcome"] for a in criteria["env_assertions"])
        assert desk.data.hash() == replay(task).data.hash() != before


@pytest.mark.parametrize("left_out", [0, 1])
def test_gold_solves_every_task_and_without_its_last_change_none(env, left_out):
    tasks = env.tasks("unseen")[:200]
    plans = [gold_actions(task) for task in tasks]
    plans = [plan[: -1 - left_out] + [DONE] for plan in plans]
    turns = dict.fromkeys(range(200), 0)

    def choose(batch, slot, result):
        turns[slot] += 1
        return plans[slot][turns[slot] - 1]

    assert share(env, tasks, choose) == 1.0 - left_out


def test_floors(env):
    tasks, rng = env.tasks("unseen")[:300], random.Random(0)
    assert share(env, tasks, lambda batch, slot, result: DONE) == 0.0
    assert share(env, tasks, lambda batch, slot, result: rng.choice(result.admissible_actions)) < 0.05
    assert share(env, tasks, lambda batch, slot, result: "Hello") == 0.0
    assert share(env, tasks, env.expert) == 1.0


def test_another_order_handled_on_the_way_costs_the_reward(env):
    for task in env.tasks("unseen")[:40]:
        service = DeskService(task)
        session, plan = Session(service), gold_actions(task)
        others = [name for name, order in service.desk.data.orders.items() if order.user == service.desk.data.caller]
        others = [name for name in others if name not in str(plan)]
        for call in plan[:-1] + [write_call(t, order=name) for name in others[:1] for t in ("show", "transfer")]:
            session.say(call)
        session.say(DONE)
        assert service.reward(session.said, True)[0] == (0.0 if others else 1.0)


def test_variations_and_their_checker(env):
    tasks = env.tasks("train")[:30]
    for task in tasks:
        texts = vary(task, 4)
        made = [replace(task, id=f"{task.id}-{i}", instruction=t, source="generated") for i, t in enumerate(texts)]
        assert made and all(feasible(made)) and vary(task, 4) == texts
        assert share(env, made, env.expert) == 1.0
    wrong = ["user 3 wants to sing.", "", tasks[0].instruction.replace("the ", "the other ")]
    assert feasible([replace(tasks[0], instruction=text) for text in wrong]) == [None] * 3
    held = env.tasks("seen")[:20]  # tickets of the same worlds that training must not see
    assert all(feasible(held)) and not any(feasible([replace(task, split="train") for task in held]))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"caller": "user 1", "orders": {"order 1": {}}, "stock": {}},
        {"caller": "user 1", "orders": [], "stock": {}},
        {"caller": "user 1", "orders": {}, "stock": {"lamp": None}},
    ],
)
def test_corrupt_databases_are_named(data):
    with pytest.raises(DataError, match="service desk data"):
        DeskData.of(data)


# ---- calls


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "show"',
        '{"name": "show"}',
        '{"arguments": {}}',
        '{"name": "show", "arguments": [1]}',
        '{"name": null, "arguments": {}}',
        '{"name": "show", "arguments": "order 1"}',
        "[]",
        "```json\n```",
        '{"name": "show", "arguments": {"order": NaN}}',
        "{" * 5000,
    ],
)
def test_malformed_calls_are_answered_in_words(text, env):
    with pytest.raises(CallError, match="malformed"):
        read_call(text)
    batch = env.make(1)
    before = batch.reset([0], env.tasks("train")[:1])[0]
    result = batch.step([0], [text])[0]
    assert result.observation.startswith("Error: malformed tool call") and not result.done and result.reward == 0.0
    assert result.info["action_error"] and result.state.startswith(before.state.rpartition("\n")[0])


@pytest.mark.parametrize(
    "call",
    [
        write_call("fly"),
        write_call("show"),
        write_call("show", order=12),
        write_call("show", order="order 12", why="x"),
        write_call("show", order="../../etc/passwd"),
        write_call("find", user="user 999"),
        write_call("__init__", data={}),
    ],
)
def test_wrong_calls_are_answered_in_words(call):
    session = Session(DeskService(desk_task(0, "train")))
    assert session.say(call).startswith("Error: ") and session.failed and not session.ended


def test_calls_survive_the_tokenizer():
    calls = [call for n in range(40) for call in gold_actions(desk_task(n, "train"))]
    for entities in ("merged", "split"):
        tokenizer = train_tokenizer(calls, entities)
        assert all(tokenizer.decode(tokenizer.encode(c, add_special_tokens=False)) == c for c in calls)
    tokenizer = train_tokenizer(calls)
    assert max(len(tokenizer.encode(c, add_special_tokens=False)) for c in calls) <= 11


# ---- states and rules


@pytest.mark.parametrize("behaviour", [Behaviour("expert"), Behaviour("noisy", 0.5), RANDOM], ids=lambda b: b.name)
def test_states_changes_rules_and_traces_on_recorded_steps(env, behaviour):
    episodes = record(env, env.tasks("train")[:120], behaviour, seed=1)
    rows = [row for episode in episodes for row in episode]
    assert len(rows) > 400
    for e in rows:
        change = env.mapper.diff(e.state, e.next_state)
        assert env.mapper.merge(e.state, change) == e.next_state
        assert env.mapper.merge(e.state, change.replace(":", "").replace(",", "")) == e.next_state or "fail" in change
        assert env.verify(e.state, e.action, e.next_state, e.reward, e.terminated) == []
        works = e.next_state.endswith("\nlast: ok")
        assert judge_call(parse_desk(e.state), e.action).ok == works
        assert e.reasoning.rpartition("; ")[2] in (("ok", "done", "not yet", "maybe") if works else ("fail",))
        assert (e.reward > 0) == e.reasoning.endswith("; done") or e.reasoning.endswith("maybe")
        assert parse_desk(e.state).text() == e.state
        silent = env.mapper.silent(e.state, e.action)
        assert not (silent and works and desk_determined(e))
    assert sum(e.reward for e in rows) == sum(episode[-1].success for episode in episodes)


def test_the_checker_condemns_what_is_changed_in_a_recorded_step(env):
    rows = [row for episode in record(env, env.tasks("train")[:60], Behaviour("noisy", 0.3)) for row in episode]
    caught = 0
    for e in rows:
        assert env.verify(e.state, e.action, e.next_state, 1.0 - e.reward, e.terminated) or e.reasoning.endswith(
            "maybe"
        )
        assert env.verify(e.state, e.action, e.next_state, e.reward, not e.terminated)
        worked = e.next_state.endswith("last: ok")
        other = env.mapper.merge(e.state, f"fail {e.action}" if worked else "no change")
        assert env.verify(e.state, e.action, other, e.reward, e.terminated)
        caught += 1
    assert caught == len(rows) > 300


def test_the_order_of_a_calls_arguments_means_nothing_to_the_rules(env):
    turned = set()
    for task in env.tasks("train")[:60]:
        session, state = Session(DeskService(task)), env.mapper.start(task, "")
        for call in gold_actions(task):
            found = read_call(call)
            call = write_call(found.name, **dict(reversed(found.arguments.items())))
            after = env.mapper.update(state, call, session.say(call))
            assert session.failed is None and env.mapper.merge(state, env.mapper.diff(state, after)) == after
            reward = session.service.reward(session.said, True)[0] if session.ended else 0.0
            assert env.verify(state, call, after, reward, session.ended) == []
            assert env.annotate(state, call, after).endswith(("; ok", "done"))
            turned |= {found.name} if len(found.arguments) > 1 else set()
            state = after
    assert turned == {"refund", "move", "exchange"}


@pytest.mark.parametrize(
    "text", ["", "no lines", "task: x\norder 1: gone", "task: x\nunseen: order 1, order 1\nlast: ok"]
)
def test_states_that_are_none(text, env):
    with pytest.raises(ValueError, match="desk state"):
        parse_desk(text)
    state = env.mapper.start(env.tasks("train")[0], "")
    assert env.verify(state, DONE, text, 0.0, True) == ["malformed state"]


def test_nothing_hidden_is_in_the_state(env):
    """Two databases that differ only in what was not shown give the same states."""
    task = desk_task(0, "train")
    secret = DeskService(task)
    for order in secret.desk.data.orders.values():
        order.item, order.payment = "black bag", "gift 9"
    states = []
    for service in (DeskService(task), secret):
        session, state = Session(service), env.mapper.start(task, "")
        call = gold_actions(task)[0]
        states.append(env.mapper.update(state, call, session.say(call)))
    assert states[0] == states[1]


# ---- sessions


def test_conformance(env):
    calls = [*gold_actions(env.tasks("train")[0])[:2], "Hello", '{"name": "show"', write_call("fly")]
    assert check_env(env.make(3), env.tasks("train")[:3], calls, env.max_turns)
    raw = build(EnvironmentConfig(name="taubench", mapper=False))
    assert raw.annotate is None and raw.verify is None
    assert check_env(raw.make(3), raw.tasks("train")[:3], calls, raw.max_turns)
    first = raw.make(1).reset([0], raw.tasks("train")[:1])[0]
    assert first.state == first.observation and all(part in first.state for part in ("<policy>", "<tools>", "<ticket>"))


def test_a_task_without_its_world_is_aborted_and_its_sibling_plays_on(env):
    good = env.tasks("train")[0]
    broken = replace(good, id="broken", metadata={})
    bad, fine = env.make(2).reset([0, 1], [broken, good])
    assert bad.aborted and fine.aborted is None
    nonsense = env.make(1)
    nonsense.reset([0], [replace(good, instruction="user 3 wants to cancel the red moon.")])
    assert "no red moon" in nonsense.step([0], [DONE])[0].aborted


def test_a_step_needs_a_conversation(env):
    batch = env.make(1)
    with pytest.raises(ValueError, match="reset"):
        batch.step([0], [DONE])
    batch.reset([0], env.tasks("train")[:1])
    batch.step([0], [DONE])
    with pytest.raises(ValueError, match="reset"):
        batch.step([0], [DONE])


class Customer:
    """Says the wish, then stops once the agent says that it is done."""

    def __init__(self, failing=False, dead=False):
        self.failing, self.dead, self.batches = failing, dead, []

    def complete(self, requests):
        self.batches.append(len(requests))
        if self.dead:
            raise LLMError("nobody answers")
        said = "" if self.failing else "I want something."
        return [Reply("Bye ###STOP###" if "It is done" in r.prompt else said) for r in requests]


def with_customer(customer, slots):
    from dreamgym.environments.service_session import ServiceEnv

    return ServiceEnv(slots, lambda task: DeskService(task, solo=False), 15, None, customer)


def test_the_desk_with_a_customer(env):
    tasks, customer = list(env.tasks("unseen")[:8]), Customer()
    batch = with_customer(customer, 8)
    first = batch.reset(list(range(8)), tasks)
    assert all("<customer>\nI want something." in r.observation and "<ticket>" not in r.observation for r in first)
    plans = [[*gold_actions(task)[:-1], "It is done."] for task in tasks]
    final = {}
    for turn in range(max(map(len, plans))):
        alive = [slot for slot in range(8) if turn < len(plans[slot])]
        final |= zip(alive, batch.step(alive, [plans[slot][turn] for slot in alive]), strict=True)
    assert all(result.success and result.terminated for result in final.values())
    assert customer.batches[0] == 8 and sum(customer.batches) == 16  # one call for all that wait


def test_customers_who_do_not_answer(env):
    task = env.tasks("unseen")[0]
    silent = with_customer(Customer(failing=True), 1).reset([0], [task])[0]
    assert "empty message" in silent.aborted and silent.reward == 0.0 and silent.success is None
    with pytest.raises(LLMError, match="nobody answers"):
        with_customer(Customer(dead=True), 1).reset([0], [task])
    with pytest.raises(EnvironmentFailure, match="user_llm"):
        with_customer(None, 1).reset([0], [task])


def test_an_answer_about_an_error_is_no_failed_action():
    """Telecom's phone answers "Error. Permission …" to a call that works."""
    mapper = ConversationMapper()
    for answer, failed in (("Error: no tool", True), ("Error: ", True), ("Error", True), ("Error. Permission", False)):
        after = mapper.update("<ticket>", "check", answer)
        assert mapper.failed(Experience("<ticket>", "check", 0.0, after, False)) == failed
    assert mapper.failed(Experience("a", "check", 0.0, mapper.merge("a", "fail check"), False))


@pytest.mark.parametrize("domain", ["retail", "airline"])
def test_official_desks_with_customers_need_one(domain):
    with pytest.raises(ConfigError, match="user_llm"):
        build(EnvironmentConfig(name="taubench", domain=domain))
    with pytest.raises(ConfigError, match="^environment.user_llm: expected an address"):
        build(EnvironmentConfig(name="taubench", domain=domain, user_llm="llama@somewhere"))


def test_worlds_are_never_changed_by_playing():
    before = json.dumps(dict(desk_world(0)))
    desk = ServiceDesk(DeskData.of(desk_world(0)))
    desk.data.orders[next(iter(desk.data.orders))].outcome = "cancelled"
    desk.data.stock["lamp"].append("pink")
    assert json.dumps(dict(desk_world(0))) == before


@pytest.mark.parametrize("key", ["user_llm", "judge_llm"])
def test_an_address_that_is_none_is_told_by_its_key(key):
    with pytest.raises(ConfigError, match=f"^environment.{key}: expected an address such as http"):
        build(EnvironmentConfig(name="taubench", domain="retail", **{key: "llama@localhost:8000"}))
