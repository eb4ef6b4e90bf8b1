"""Official τ² domains: rewards, a customer and a judge served over HTTP, a stand-in for tau2-bench, bad input.

Tests on official data are skipped where the extra `dreamgym[taubench]` is not installed.
"""

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dreamgym.core.config import EnvironmentConfig, load_config
from dreamgym.core.errors import CheckpointError, DataError, EnvironmentFailure, MissingExtra
from dreamgym.core.llm import LLMError
from dreamgym.environments import tau2_domains, tau2_upstream
from dreamgym.environments.base_env import check_env
from dreamgym.environments.offline import record
from dreamgym.environments.service_session import ENDS, ServiceEnv
from dreamgym.environments.tau2_domains import (
    Tau2Service,
    gold_messages,
    gold_replay,
    load_domain,
    read_data,
    required_actions,
    tau2_tasks,
)
from dreamgym.environments.taubench import build, text_client
from dreamgym.environments.tool_calls import write_call
from dreamgym.training.trainer import claim_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from servers import LLMServer, running  # noqa: E402

DONE = write_call(ENDS)
installed = importlib.util.find_spec("inspect_evals") is not None
official = pytest.mark.skipif(not installed, reason="needs pip install 'dreamgym[taubench]'")


def episode(env, task, messages):
    """Sends messages in turn; the last result."""
    result = env.reset([0], [task])[0]
    for message in messages:
        if not result.done:
            result = env.step([0], [message])[0]
    return result


def solo(domain="telecom"):
    data = load_domain(domain)
    return data, ServiceEnv(1, lambda task: Tau2Service(data, task), 100)


# ---- telecom, solo


@official
@pytest.mark.parametrize("left_out", [0, 1])
def test_telecom_gold_is_1_and_gold_without_its_last_action_0(left_out):
    data, env = solo()
    tasks = tau2_tasks(data, "base")
    plans = [gold_messages(data, task)[: -1 - left_out] + [DONE] for task in tasks]
    rewards = [episode(env, task, plan).reward for task, plan in zip(tasks, plans, strict=True)]
    assert rewards == [1.0 - left_out] * 114


@official
@pytest.mark.parametrize("nothing", [DONE, "I cannot help."])
def test_telecom_floor_is_0(nothing):
    data, env = solo()
    results = [episode(env, task, [nothing]) for task in tau2_tasks(data, "base")]
    assert len(results) == 114 and all(r.terminated and r.reward == 0.0 for r in results)


@official
def test_telecom_shows_policy_tools_and_ticket_and_answers_mistakes():
    env = build(EnvironmentConfig(name="taubench", domain="telecom"))
    assert env.name == "taubench-telecom" and env.info["data"] == "inspect-evals" and env.info["mode"] == "solo"
    sizes = {split: len(env.tasks(split)) for split in ("train", "valid", "unseen", "base")}
    assert sizes == {"train": 59, "valid": 15, "unseen": 40, "base": 114}
    calls = [write_call("get_customer_by_id", customer_id="C1001"), write_call("fly"), '{"name": "x"']
    assert check_env(env.make(3), env.tasks("train")[:3], calls, env.max_turns)
    batch, task = env.make(1), env.tasks("train")[0]
    first = batch.reset([0], [task])[0]
    assert task.instruction in first.state and "# Telecom Agent Policy" in first.state
    assert '"name": "toggle_airplane_mode"' in first.state and '"name": "refuel_data"' in first.state
    wrong = write_call("get_customer_by_id", customer_id="C9999")
    for call, answer in ((calls[0], '"customer_id": "C1001"'), (wrong, "not found"), (calls[1], "no tool 'fly'")):
        before = first.state
        first = batch.step([0], [call])[0]
        assert (
            answer in first.observation
            and env.mapper.merge(before, env.mapper.diff(before, first.state)) == first.state
        )


@official
def test_demonstrations_are_recorded_and_win():
    env = build(EnvironmentConfig(name="taubench", domain="telecom"))
    episodes = record(env, env.tasks("valid")[:5])
    assert all(rows[-1].success for rows in episodes) and all(rows[-1].reward == 1.0 for rows in episodes)


# ---- retail and airline, with a customer over HTTP


def customer(body):
    """Asks for something, then stops."""
    talk = body["messages"][-1]["content"]
    return "###STOP###" if talk.count("Agent:") > 1 else "I need your help."


@official
@pytest.mark.parametrize("domain", ["retail", "airline"])
def test_customers_over_http(domain):
    with running(LLMServer(customer)) as server:
        env = build(EnvironmentConfig(name="taubench", domain=domain, user_llm=f"llama@{server.base_url}"))
        data, batch = load_domain(domain), env.make(2)
        tasks = env.tasks("unseen")[:2]
        first = batch.reset([0, 1], tasks)
        assert all(r.observation.endswith("<customer>\nI need your help.\n</customer>") for r in first)
        scenario = data.records[tasks[0].metadata["tau2_id"]]["user_scenario"]["instructions"]["known_info"]
        assert any(scenario.split("\n")[0] in body["messages"][0]["content"] for body in server.bodies)
        assert not any(scenario.split("\n")[0] in r.state for r in first)  # the agent has to ask
        for slot, task in enumerate(tasks):
            *calls, _ = gold_messages(data, task)
            for message in calls:
                result = batch.step([slot], [message])[0]
            result = result if result.done else batch.step([slot], ["Is there anything else?"])[0]
            assert (
                result.terminated and result.reward == 1.0 and set(result.info["reward_parts"]) == {"DB", "COMMUNICATE"}
            )


@official
def test_a_dead_customer_raises_and_a_broken_reply_aborts():
    """A server that never answered raises at once; one that dies aborts what it left open, and raises the third time."""
    data = load_domain("airline")
    task = tau2_tasks(data, "unseen")[0]
    with running(LLMServer(lambda body: "" if "Agent" in body["messages"][-1]["content"] else "?")) as server:
        address = server.base_url
        env = ServiceEnv(1, lambda task: Tau2Service(data, task), 30, None, text_client(f"m@{address}", "user"))
        results = [env.reset([0], [task])[0]]
    with pytest.raises(LLMError):
        results += [env.reset([0], [task])[0] for _ in range(3)]
    assert len(results) == 1 and results[0].aborted and results[0].success is None and results[0].reward == 0.0
    never = ServiceEnv(1, lambda task: Tau2Service(data, task), 30, None, text_client(f"m@{address}", "user"))
    with pytest.raises(LLMError):
        never.reset([0], [task])


@official
def test_a_judge_over_http_decides_sentences():
    data = load_domain("airline")
    task = next(
        t
        for t in tau2_tasks(data, "base")
        if data.records[t.metadata["tau2_id"]]["evaluation_criteria"]["nl_assertions"]
    )
    count = len(data.records[task.metadata["tau2_id"]]["evaluation_criteria"]["nl_assertions"])
    for met in (True, False):
        reply = json.dumps({"results": [{"reasoning": "so", "met": met}] * count})
        with running(LLMServer(lambda body, reply=reply: reply)) as server:
            service = Tau2Service(data, task, text_client(f"judge@{server.base_url}", "judge"))
            assert service.reward([("agent", "No.")], True)[1]["NL_ASSERTION"] == float(met)
            service.criteria = service.criteria | {"reward_basis": ["NL_ASSERTION"]}
            assert service.reward([("agent", "No.")], True)[0] == float(met)
    with pytest.raises((LLMError, EnvironmentFailure)):  # the last judge's server is gone
        service.reward([("agent", "No.")], True)
    service.judge = None
    with pytest.raises(EnvironmentFailure, match="judge_llm"):
        service.reward([("agent", "No.")], True)


@official
def test_gold_calls_that_fail_are_no_demonstrations():
    data = load_domain("airline")
    for task in tau2_tasks(data, "base")[:12]:
        name = task.metadata["tau2_id"]
        gold = data.records[name]["evaluation_criteria"]["actions"]
        _, worked, wrong = gold_replay("airline", name)
        assert len(worked) + wrong == len(gold)
    assert gold_messages(data, task)[-1] == DONE


# ---- without the extra


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setattr(tau2_domains, "find_spec", lambda name: None)
    monkeypatch.delenv("TAU2_DATA_DIR", raising=False)
    load_domain.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'dreamgym\[taubench\]'"):
        build(EnvironmentConfig(name="taubench", domain="telecom"))
    load_domain.cache_clear()


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff\xfe", gzip.compress(b"[]", mtime=0)[:-5], b"not gzip"])
def test_corrupt_data_files_are_named(tmp_path, content):
    for name in ("tasks.json", "tasks.json.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_data(tmp_path / name)
    with pytest.raises(DataError, match="missing"):
        read_data(tmp_path / "nothing.json")


def test_required_actions_compare_as_upstream():
    said = [
        ("agent", write_call("pay", bill="B1", card=2)),
        ("tool", "ok"),
        ("agent", '{"name": "pay"'),
        ("user", "hm"),
    ]
    gold = {"name": "pay", "arguments": {"bill": "B1", "card": 3}}
    assert required_actions(said, []) == 1.0 and required_actions(said, [gold]) == 0.0
    assert required_actions(said, [gold | {"compare_args": ["bill"]}]) == 1.0
    assert required_actions(said, [gold | {"compare_args": []}]) == 1.0
    assert required_actions([], [gold | {"compare_args": []}]) == 0.0


# ---- a stand-in for tau2-bench: the four parts that are used, with its names


class Message(SimpleNamespace):
    pass


def stand_in(judgement):
    """Modules with tau2-bench's names, on one task: call `pay`."""
    task = SimpleNamespace(id="t1", ticket="Pay it.", initial_state=None)
    task.user_scenario = SimpleNamespace(model_dump=lambda: {"persona": None, "instructions": "You want to pay."})
    action = SimpleNamespace(name="pay", arguments={"bill": "B1"})
    task.evaluation_criteria = SimpleNamespace(actions=[action], communicate_info=["B1"])
    schema = {"function": {"name": "pay", "parameters": {"type": "object", "properties": {"bill": {"type": "string"}}}}}

    class Desk:
        def __init__(self, solo_mode=False):
            self.solo_mode, self.paid = solo_mode, []

        def get_policy(self):
            return "Be kind."

        def get_tools(self):
            return [SimpleNamespace(name="pay", openai_schema=schema)]

        def get_user_tools(self):
            return []

        def make_tool_call(self, tool_name, requestor, **arguments):
            if arguments["bill"] != "B1":
                raise ValueError("no such bill")
            return {"paid": arguments["bill"]}

        def sync_tools(self):
            pass

        to_json_str = staticmethod(json.dumps)

    registry = SimpleNamespace(
        get_env_constructor=lambda domain: Desk,
        get_tasks_loader=lambda domain: lambda: [task],
        get_task_splits_loader=lambda domain: lambda: {"train": ["t1"], "test": ["t1"], "base": ["t1"]},
    )
    reasons = SimpleNamespace(AGENT_STOP="agent_stop", USER_STOP="user_stop", MAX_STEPS="max_steps")
    run = SimpleNamespace(model_construct=lambda **fields: SimpleNamespace(**fields))
    parts = {
        "tau2.registry": {"registry": registry},
        "tau2.data_model.message": {n: Message for n in ("UserMessage", "AssistantMessage", "ToolMessage", "ToolCall")},
        "tau2.data_model.simulation": {"TerminationReason": reasons, "SimulationRun": run},
        "tau2.evaluator.evaluator": {"EvaluationType": SimpleNamespace(ALL="all"), "evaluate_simulation": judgement},
    }
    modules = {name: ModuleType(name) for name in ("tau2", "tau2.data_model", "tau2.evaluator", *parts)}
    for name, content in parts.items():
        vars(modules[name]).update(content)
    return modules


@pytest.fixture
def upstream(monkeypatch, tmp_path):
    def install(judgement):
        monkeypatch.setenv("TAU2_DATA_DIR", str(tmp_path))
        for name, module in stand_in(judgement).items():
            monkeypatch.setitem(sys.modules, name, module)
        return build(EnvironmentConfig(name="taubench", domain="telecom"))

    for cached in (tau2_upstream.upstream, tau2_upstream.upstream_records):
        cached.cache_clear()
    yield install
    for cached in (tau2_upstream.upstream, tau2_upstream.upstream_records):
        cached.cache_clear()


def test_upstream_is_used_where_its_data_are_named(upstream):
    seen = []

    def judgement(simulation, task, evaluation_type, solo_mode, domain):
        seen.append(simulation)
        paid = any(getattr(m, "tool_calls", None) for m in simulation.messages)
        return SimpleNamespace(reward=float(paid), reward_breakdown={"DB": float(paid)}, info={})

    env = upstream(judgement)
    assert env.info["data"] == "tau2-bench" and len(env.tasks("base")) == 1
    batch, task = env.make(1), env.tasks("base")[0]
    assert "Be kind." in batch.reset([0], [task])[0].observation
    assert "no such bill" in batch.step([0], [write_call("pay", bill="B2")])[0].observation
    assert batch.step([0], [write_call("pay", bill="B1")])[0].observation == '{"paid": "B1"}'
    result = batch.step([0], [DONE])[0]
    assert result.success and result.info["reward_parts"] == {"DB": 1.0}
    kinds = [(getattr(m, "role", ""), getattr(m, "error", None)) for m in seen[-1].messages]
    assert kinds == [("assistant", None), ("tool", True), ("assistant", None), ("tool", False), ("assistant", None)]
    # Upstream's own words, since its evaluator plays the calls again and compares.
    assert seen[-1].messages[1].content == "Error: no such bill"
    assert seen[-1].messages[-1].content == "###STOP###" and seen[-1].termination_reason == "agent_stop"
    assert all(rows[-1].success for rows in record(env, [task]))


def test_a_run_on_packaged_data_is_not_continued_on_upstreams(upstream, tmp_path):
    config = load_config(None, "taubench", "smoke", {"environment.domain": "telecom"})
    packaged = SimpleNamespace(name="taubench-telecom", info={"data": "inspect-evals"}, digest="")
    claim_folder(tmp_path / "run", config, packaged)
    with pytest.raises(CheckpointError, match="other data"):
        claim_folder(tmp_path / "run", config, upstream(lambda **run: None))


def test_ten_refused_calls_end_a_conversation_with_upstream(upstream):
    seen = []

    def judgement(simulation, **_):
        seen.append(simulation.termination_reason)
        return SimpleNamespace(reward=0.0, reward_breakdown={}, info={})

    env = upstream(judgement)
    batch, task = env.make(1), env.tasks("base")[0]
    batch.reset([0], [task])
    results = [batch.step([0], [write_call("pay", bill=bill)])[0] for bill in ["B2", 3, None] * 3]
    assert not any(result.done for result in results) and {r.observation for r in results} == {"Error: no such bill"}
    last = batch.step([0], ["not a call"])[0]
    assert last.terminated and last.success is False and seen == ["max_steps"]


def test_upstream_that_cannot_judge_aborts(upstream):
    failed = SimpleNamespace(reward=0.0, reward_breakdown=None, info={"error": "litellm: connection refused"})
    env = upstream(lambda **run: failed)
    result = episode(env.make(1), env.tasks("base")[0], [DONE])
    assert "connection refused" in result.aborted and result.success is None


def test_pypis_other_tau2_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tau2", ModuleType("tau2"))
    tau2_upstream.upstream.cache_clear()
    with pytest.raises(MissingExtra, match="sierra-research/tau2-bench"):
        tau2_upstream.upstream()
