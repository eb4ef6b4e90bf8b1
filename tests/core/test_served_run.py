"""A whole run whose experience model is behind a server: real HTTP, faults, cost limit, continuation, no offline data."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest
from servers import FAULTS, LLMServer, running, serving_problem, train_small_model, transformers_serve

from dreamgym.core.config import EnvironmentConfig, load_config
from dreamgym.core.errors import ConfigError
from dreamgym.core.ledger import CostLimit
from dreamgym.environments.household_rules import expected_state, judge
from dreamgym.environments.household_text import parse_state
from dreamgym.models.replay_buffer import read_rows
from dreamgym.training.preparation import check_servers
from dreamgym.training.train import main
from dreamgym.training.trainer import DreamGymTrainer

TINY = {
    "environment.data_dir": "generated",
    "environment.num_train_worlds": 4,
    "environment.max_episode_steps": 5,
    "training.batch_size": 4,
    "training.validation_episodes": 2,
    "training.gap_episodes": 2,
    "training.use_tensorboard": False,
    "reasoning_model.provider": "openai",
    "reasoning_model.name": "made-up",
}
KEY = "sk-canary-5b1e6f0c9d"


def step_answer(prompt):
    """The household's rules, written as an instructed model would."""
    state, action = re.search(r"State:\n(.*?)\n\nAction:\n(.*)$", prompt, re.S).groups()
    works = judge(parse_state(state), action).ok
    after = expected_state(parse_state(state), action)[0].text() if works else state
    lines = after.split("\n")
    return {"reasoning": "as the rules say", "works": works, "next_state": lines, "reward": 0, "terminated": False}


def teacher_answer(prompt):
    steps = map(int, prompt.rpartition("Explain the steps:\n")[2].split(", "))
    plans = [{"step_id": step, "transition_plan": f"a plan for step {step}"} for step in steps]
    return {
        "task_tutorial": {"overall_plan": "p", "success_mode": "s", "failure_mode": "f"},
        "state_transitions": plans,
    }


def answer(body):
    prompt = body["messages"][-1]["content"]
    if "Explain the steps" in prompt:
        return json.dumps(teacher_answer(prompt))
    if "candidates" in prompt:
        base = re.search(r"Vary this task: put (.*)\n", prompt)
        return json.dumps(
            {"candidates": ["put a sofa in mug.", f"put {base[1]}" if base else "look around the house."]}
        )
    if "selection" in prompt:
        return json.dumps({"reasoning": "the first", "selection": 1})
    return json.dumps(step_answer(prompt))


def trainer(folder, url, **more):
    changed = {key.replace("__", "."): value for key, value in more.items()} | {"reasoning_model.base_url": url}
    config = load_config(None, "alfworld", "smoke", TINY | changed)
    return DreamGymTrainer(config, folder, progress=lambda line: None)


def metrics(folder, without="time/"):
    rows = [json.loads(line) for line in (folder / "dream" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(without)} for row in rows]


@pytest.fixture
def server():
    with running(LLMServer(answer)) as serving:
        yield serving


def test_a_run_with_a_served_experience_model(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    more = {"curriculum__difficulty_increment": 0.5, "curriculum__synthetic_fraction_max": 0.5}
    t = trainer(tmp_path, server.base_url, **more)
    t.fit(t.prepare(), "dream")
    rows = metrics(tmp_path)[1:]
    assert len(rows) == 2 and all(row["dream/malformed"] == row["dream/unanswered"] == 0 for row in rows)
    assert all(row["dream/predictions"] >= 20 and row["rollout/real_transitions"] == 0 for row in rows)
    assert sum(row["dream/llm_calls"] for row in rows) == len(server.bodies)
    assert not (tmp_path / "prepared" / "experience_model").exists()  # nothing is fine-tuned
    assert (
        rows[-1]["curriculum/candidate"] > 0 and rows[-1]["curriculum/malformed"] == 0
    )  # the server proposes tasks too
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["calls"] == len(server.bodies) and ledger["requests"] >= sum(row["dream/predictions"] for row in rows)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if KEY.encode() in file.read_bytes()]
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_without_offline_data(server, tmp_path):
    t = trainer(tmp_path, server.base_url, environment__offline_data=None, training__num_iterations=1)
    ready = t.prepare()
    assert ready.counts == {"offline": 0, "cloned": 0, "demonstrations": 0, "resets": 4} and len(ready.buffer) == 0
    assert ready.real_transitions == 4 and ready.clone_transitions == 0
    t.fit(ready, "dream")
    assert metrics(tmp_path)[-1]["dream/predictions"] > 0
    again = trainer(tmp_path, server.base_url, environment__offline_data=None, training__num_iterations=1).prepare()
    assert again.tasks == ready.tasks and again.counts == ready.counts
    with pytest.raises(ConfigError, match="offline_data null .* needs a language model"):
        trainer(tmp_path / "x", "", environment__offline_data=None, reasoning_model__provider="local")


def test_a_misbehaving_server_hurts_only_the_episodes_that_it_fails(tmp_path):
    faults = tuple(fault for fault in FAULTS if fault != "hang")
    with running(LLMServer(answer, faults=(*faults, "bad json", "wrong schema"), rate=0.2)) as server:
        t = trainer(tmp_path, server.base_url, reasoning_model__concurrency=4, training__batch_size=12)
        t.client.tries, t.client.backoff = 2, 0.0
        t.fit(t.prepare(), "dream")
    rows = metrics(tmp_path)[1:]
    assert len(rows) == 2 and t.client.ledger.faults.total() == sum(row["dream/llm_faults"] for row in rows)
    assert t.client.ledger.faults.total() == server.faults.total() > 10
    lost = sum(row["dream/unanswered"] for row in rows)
    assert sum(row["rollout/aborted"] for row in rows) == lost and all(
        row["rollout/n"] + row["rollout/aborted"] == 12 for row in rows
    )


def test_the_cost_limit_stops_saves_and_can_be_raised(server, tmp_path):
    price = {"reasoning_model__price_output": 1000.0, "reasoning_model__concurrency": 1, "training__save_every": 9}
    price["reasoning_model__reply_tokens"] = 48  # a call may start while its longest reply can be paid
    free = trainer(tmp_path / "free", server.base_url, **price)
    free.fit(free.prepare(), "dream")
    first, second = (row["dream/llm_cost_usd"] for row in metrics(tmp_path / "free")[1:])
    limit, folder = first + second / 2, tmp_path / "run"
    t = trainer(folder, server.base_url, **price, reasoning_model__cost_limit=limit)
    with pytest.raises(CostLimit, match="raise cost_limit"):
        t.fit(t.prepare(), "dream")
    assert [row["iteration"] for row in metrics(folder)] == [0, 1]
    assert (folder / "dream" / "checkpoints" / "policy_iter_0001.json").is_file()  # the stop saves what is whole
    spent = json.loads((folder / "ledger.json").read_text())
    again = trainer(folder, server.base_url, **price, reasoning_model__cost_limit=10 * limit)
    assert first < again.client.ledger.cost <= limit and again.client.ledger.calls == spent["calls"]
    again.fit(again.prepare(), "dream")
    assert [row["iteration"] for row in metrics(folder)] == [0, 1, 2]
    assert again.client.ledger.cost > first + second  # the half of an iteration that was lost is counted too


def test_a_cached_run_that_is_continued_is_the_same_run(server, tmp_path, monkeypatch):
    from dreamgym.training import arms

    cached = {"reasoning_model__cache": str(tmp_path / "replies.db"), "rl__algorithm": "grpo", "rl__group_size": 2}
    whole = trainer(tmp_path / "a", server.base_url, **cached)
    whole.fit(whole.prepare(), "dream")
    asked = len(server.bodies)
    t, inner, calls = trainer(tmp_path / "b", server.base_url, **cached), arms.update_policy, iter(range(9))

    def update(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return inner(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arms, "update_policy", update)
        t.fit(t.prepare(), "dream")
    again = trainer(tmp_path / "b", server.base_url, **cached)
    again.fit(again.prepare(), "dream")
    skip = ("time/", "dream/llm_")
    assert metrics(tmp_path / "b", skip) == metrics(tmp_path / "a", skip)
    assert len(server.bodies) == asked and again.client.ledger.cached > 0  # every reply was on record


def test_a_teacher_explains_the_offline_data(server, tmp_path):
    t = trainer(tmp_path, server.base_url, reasoning_model__annotation="llm")
    ready = t.prepare(dream=False)
    rows = [e for _, e in read_rows(ready.buffer.db, "evicted_at IS NULL")]
    assert len(rows) > 50 and all(e.reasoning == f"a plan for step {e.turn}" for e in rows)
    assert json.loads((tmp_path / "ledger.json").read_text())["calls"] == len(server.bodies)


def test_a_server_that_is_not_there_is_one_clear_error(tmp_path, capsys):
    """Told before anything is recorded; once a run is prepared, the first dream tells."""
    flags = [f"{key}={value}" for key, value in TINY.items()] + ["reasoning_model.base_url=http://127.0.0.1:9/v1"]
    more = ["--preset", "smoke", "--checkpoints", "", "--out-dir", str(tmp_path / "run")]
    command, counts = [*more, "--set", *flags, "reasoning_model.concurrency=4"], tmp_path / "run/prepared/counts.json"
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "reasoning_model.base_url: http://127.0.0.1:9/v1 cannot be reached" in said and "is the server up?" in said
    assert not counts.exists()
    t = trainer(tmp_path / "run", "http://127.0.0.1:9/v1", reasoning_model__concurrency=4)
    t.prepare(dream=False)  # needs no server
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "answered none of" in said and "Traceback" not in said and counts.is_file()


def test_any_answer_says_that_a_server_is_there(server, tmp_path):
    """It is asked once, without a key, and nothing is paid for."""
    config = trainer(tmp_path, server.base_url).config
    check_servers(config)
    assert not server.bodies and not server.headers
    service = {"name": "taubench", "domain": "retail", "user_llm": f"m@{server.base_url}"}
    for lost, place in ((False, server.base_url), (True, "http://127.0.0.1:9/v1")):
        asked = config.model_copy(update={"environment": EnvironmentConfig(**service, judge_llm=f"m@{place}")})
        with pytest.raises(ConfigError, match="environment.judge_llm: .*is the server up") if lost else nullcontext():
            check_servers(asked)


def test_replies_on_record_need_no_server(tmp_path):
    t = trainer(tmp_path, "http://127.0.0.1:9/v1", reasoning_model__cache=str(tmp_path / "replies.db"))
    check_servers(t.config)  # opening it has made the file


@pytest.mark.parametrize("tokens", [4, None])
def test_a_run_whose_predictions_are_malformed_says_so(tokens, tmp_path, caplog):
    """A server that keeps to the limit it is told cuts off what is longer."""

    def short(body):
        said, limit = answer(body), body["max_tokens"]
        return " ".join(said.split(" ")[:limit])

    with running(LLMServer(short)) as server:
        t = trainer(tmp_path, server.base_url, reasoning_model__reply_tokens=tokens, training__num_iterations=1)
        t.fit(t.prepare(), "dream")
    row = metrics(tmp_path)[-1]
    assert row["dream/malformed"] == (row["dream/predictions"] if tokens else 0)
    warned = [record.message for record in caplog.records if "predictions are malformed; the first: " in record.message]
    assert len(warned) == bool(tokens) and all("iteration 1" in text and "JSON" in text for text in warned)


def test_transformers_serve_runs_an_experience_model(tmp_path):
    """A small model of no use: every step is malformed, which is counted, and the run ends well."""
    if problem := serving_problem():
        pytest.skip(problem)
    train_small_model(tmp_path / "model", [("hello", '{"works": false}')], steps=5)
    with transformers_serve(tmp_path / "model") as url:
        name = {"reasoning_model__name": str(tmp_path / "model"), "reasoning_model__reply_tokens": 8}
        short = {"environment__max_episode_steps": 2, "training__num_iterations": 1, "training__batch_size": 2}
        t = trainer(tmp_path / "run", url, **name, **short, environment__num_train_worlds=2)
        t.client.tries = 1
        t.fit(t.prepare(), "dream")
    row = metrics(tmp_path / "run")[-1]
    assert row["dream/llm_calls"] == row["dream/predictions"] > 0
    assert row["dream/malformed"] + row["dream/unanswered"] == row["dream/predictions"]
