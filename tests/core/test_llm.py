"""LLM clients over real HTTP: dialects, faults, ledger, cache, secrets, event loops, and `transformers serve`."""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace

import pytest
from pydantic import SecretStr
from servers import FAULTS, TEXT_FAULTS, LLMServer, running, serving_problem, train_small_model, transformers_serve

from dreamgym.core.config import ReasoningModelConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import ConfigError, DataError, PredictionError
from dreamgym.core.ledger import CostLimit, Ledger, ReplyCache, request_key, reserve, settle, summary
from dreamgym.core.llm import (
    GeneratorClient,
    LLMError,
    Reply,
    Request,
    fit_reply,
    object_schema,
    read_json,
    read_structured,
)
from dreamgym.core.served import ServedClient, Server, find_key, request_body, served_client
from dreamgym.environments.base_env import TranscriptMapper
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.household_state import HouseholdMapper
from dreamgym.models.reasoning_model import Query, ReasoningExperienceModel, read_prediction

STEP = object_schema(state={"type": "string"}, reward={"enum": [0, 1]})
GOOD = json.dumps({"state": "at: desk 1", "reward": 0})
CANARY = "sk-canary-5f1c0ffee"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clients():
    """Builds clients that are closed at the end; quick to try again."""
    built = []

    def build(server, model="m", provider="openai", timeout=20.0, **options):
        extra = options.pop("extra", {})
        where = Server(model, server.base_url, provider, timeout=timeout, extra=extra)
        built.append(ServedClient(where, **({"backoff": 0.001} | options)))
        return built[-1]

    yield build
    for client in built:
        client.close()


def prompts(n):
    return [Request(f"open drawer {i}") for i in range(n)]


# ---- structured replies


@pytest.mark.parametrize(
    "text",
    [GOOD, f"```json\n{GOOD}\n```", f"Sure! {GOOD} Anything else?", f"<think>{{}}</think>\n{GOOD}", GOOD[:-1] + ",}"],
)
def test_json_is_found(text):
    assert read_structured(text, STEP) == json.loads(GOOD)


@pytest.mark.parametrize("text", ['{"reward": NaN}', '{"reward": -Infinity}', '{"reward": 1e999}', GOOD[:-1], "", "no"])
def test_no_json_is_invented(text):
    with pytest.raises(PredictionError, match="^bad JSON: "):
        read_json(text)


def test_damaged_json_is_a_value_or_a_named_problem():
    rng, fits = random.Random(0), 0
    for _ in range(1000):
        text = list(f"```json\n{GOOD}\n```")
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randint(0, 2)] = rng.choice(['"', ",", "}", "\\", "{", "[", "9", "\x00", "é", "<think>"])
        try:
            assert set(read_structured("".join(text), STEP)) == {"state", "reward"}
            fits += 1
        except PredictionError as error:
            assert str(error).startswith(("bad JSON: ", "wrong schema: "))
    assert 200 < fits < 950


@pytest.mark.parametrize("piece", ['"', '\\"', '"\\', "{", "[", ",", "```", "</think>", "9", '{"a":', ", "])
def test_hostile_text_takes_no_time(piece):
    began = time.process_time()
    with pytest.raises(PredictionError):
        read_structured("{" + piece * (262_144 // len(piece)), STEP)
    assert time.process_time() - began < 2.0


# ---- dialects


def test_chat_completions(clients):
    with running(LLMServer()) as server:
        client = clients(server, extra={"top_p": 0.9, "temperature": None})
        request = Request("look around", "You are a household.", 7, 0.3, schema=STEP)
        server.answer = lambda body: GOOD
        assert client.complete([request]) == [Reply(GOOD, "stop", 6, 6)]
    body = server.bodies[0]
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and body["max_tokens"] == 7
    assert body["top_p"] == 0.9 and "temperature" not in body
    assert body["response_format"]["json_schema"]["schema"] == STEP
    assert "Authorization" not in server.headers[0] and server.paths == ["/v1/chat/completions"]


def test_anthropic_messages(clients, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
    with running(LLMServer(lambda body: GOOD)) as server:
        client = clients(server, "claude", "anthropic")
        assert client.complete([Request("look", "You are a household.", schema=STEP)])[0].text == GOOD
    body, headers = server.bodies[0], server.headers[0]
    assert server.paths == ["/v1/messages"]
    assert body["system"] and body["output_config"]["format"]["schema"] == STEP
    assert headers["x-api-key"] == CANARY and headers["anthropic-version"] and "Authorization" not in headers


def test_openai_itself_has_its_own_token_limit():
    assert request_body(Server("gpt"), Request("x"))["max_completion_tokens"] == 128
    assert request_body(Server("gpt", "http://127.0.0.1:1/v1"), Request("x"))["max_tokens"] == 128


def test_a_server_without_structured_output_is_parsed_instead(clients):
    with running(LLMServer(lambda body: f"Here: {GOOD}", faults=("400",))) as server:
        server.says, server.arrived = "Unsupported parameter: response_format", once(server.arrived, server)
        client = clients(server, concurrency=1)
        requests = [Request("first", schema=STEP), Request("second", schema=STEP)]
        assert [reply.text for reply in client.complete(requests)] == [GOOD, GOOD]
    assert ["response_format" in body for body in server.bodies] == [True, False, False]


def once(arrived, server):
    """The server has its faults on the first call only."""

    def first_only(handler, body):
        fault = arrived(handler, body)
        server.kinds = ()
        return fault

    return first_only


# ---- faults


@pytest.mark.parametrize("fault", [*FAULTS, *TEXT_FAULTS])
def test_one_bad_request_among_good_ones(clients, fault):
    kind = (FAULTS | TEXT_FAULTS)[fault]
    with running(LLMServer(lambda body: GOOD, faults=(fault,), only="bad")) as server:
        client = clients(server, tries=2, timeout=0.5 if fault == "hang" else 20.0)
        replies = client.complete([Request(p, schema=STEP) for p in ("one", "two", "bad", "three")])
    assert [reply.text for reply in replies] == [GOOD, GOOD, "", GOOD]
    assert replies[2].error.startswith(f"{kind}: ") and replies[2].stop_reason == "error"
    calls = 1 if fault == "one megabyte" else 2
    assert client.ledger.faults == {kind: calls} and client.ledger.failures == {kind: 1}
    assert client.ledger.calls == 3 + calls == len(server.bodies) and client.ledger.reserved == 0


def test_a_server_that_misbehaves_at_a_rate_of_a_fifth(clients):
    kinds = (*FAULTS, *TEXT_FAULTS)
    requests = [replace(request, schema=STEP) for request in prompts(600)]
    with running(LLMServer(lambda body: GOOD, faults=kinds, rate=0.2)) as server:
        client = clients(server, timeout=2.0)
        replies = client.complete(requests)
    seen = Counter()
    for fault, n in server.faults.items():
        seen[(FAULTS | TEXT_FAULTS)[fault]] += n
    ledger = client.ledger
    assert ledger.faults == seen and set(seen) == {*FAULTS.values(), *TEXT_FAULTS.values()}, "every fault by its kind"
    assert ledger.calls == len(server.bodies) and 0.15 < seen.total() / ledger.calls < 0.25
    bad = [reply for reply in replies if reply.error]
    assert len(replies) == 600 and all(reply.text == ("" if reply.error else GOOD) for reply in replies)
    assert Counter(reply.error.partition(":")[0] for reply in bad) == ledger.failures
    assert ledger.failures["too long"] == server.faults["one megabyte"] and len(bad) <= ledger.failures["too long"] + 6
    assert summary(ledger)["failures"] == len(bad)


def test_the_experience_model_over_a_server_that_misbehaves(clients):
    state = (
        "task: put a mug in cabinet.\nat: drawer 1\nhold: nothing\ndrawer 1: open, mug 1\nunseen: cabinet 1\nlast: ok"
    )
    answer = "at drawer 1; ok\nhold: mug 1\ndrawer 1: -mug 1\nreward 0"
    with running(LLMServer(lambda body: answer, faults=(*FAULTS, *TEXT_FAULTS), rate=0.2)) as server:
        server.texts = {
            "nan reward": "ok\nhold: mug 1\nreward nan end",
            "bad json": '{"reward": 0, "state',
            "wrong schema": "ok\nmoon 7: mug 1\nreward 0",
        }
        client = clients(server, timeout=2.0)
        model = ReasoningExperienceModel(ReasoningModelConfig(), client, None, HouseholdMapper())
        task = Task("t", "put a mug in cabinet.")
        found = model.predict([Query(state, "take mug 1 from drawer 1", task) for _ in range(300)])
    odd = sum(server.faults[fault] for fault in server.texts)
    assert odd > 5 and model.malformed == odd and model.unanswered == client.ledger.failures.total()
    assert model.malformed + model.unanswered == sum(not e.valid for e in found)
    assert all(e.reward == 0 and not e.terminated and ("hold: mug 1" in e.next_state) == e.valid for e in found)


def test_retry_after_is_waited_for(clients):
    with running(LLMServer(faults=("429",))) as server:
        server.retry_after, server.arrived = "0.4", once(server.arrived, server)
        began = time.monotonic()
        assert clients(server).complete([Request("look")])[0].text == "LOOK"
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("status", ["301", "400", "401", "403", "404"])
def test_what_no_call_survives_stops_at_once(clients, status):
    with running(LLMServer(faults=(status,))) as server:
        began = time.monotonic()
        with pytest.raises(LLMError, match=f"status {status}"):
            clients(server, concurrency=4, backoff=60.0).complete(prompts(8))
    assert time.monotonic() - began < 15.0 and len(server.bodies) <= (8 if status == "400" else 4)


def test_a_quota_that_is_used_up_is_not_waited_for(clients):
    with running(LLMServer(faults=("429",))) as server:
        server.says = "insufficient_quota"
        with pytest.raises(LLMError, match="insufficient_quota"):
            clients(server, concurrency=1, backoff=5.0).complete(prompts(8))
    assert len(server.bodies) == 1


def test_a_dead_server_raises_and_one_that_dies_is_given_three_batches(clients):
    with running(LLMServer()) as server:
        client = clients(server, tries=2)
        assert client.complete(prompts(2))[1].text == "OPEN DRAWER 1"
    for _ in range(2):
        assert all(reply.error.startswith("dropped") for reply in client.complete(prompts(2)))
    with pytest.raises(LLMError, match="answered none of 2 requests; dropped"):
        client.complete(prompts(2))
    with pytest.raises(LLMError, match="answered none"):
        clients(server, tries=2).complete(prompts(2))


def test_a_model_that_knows_no_json_is_not_a_dead_server(clients):
    with running(LLMServer()) as server:
        client = clients(server, tries=2)
        replies = client.complete([Request("no", schema=STEP), Request("no", schema=STEP, temperature=0.0)])
    assert [reply.error.partition(":")[0] for reply in replies] == ["bad JSON"] * 2
    assert client.ledger.calls == 3, "a greedy reply is not asked for twice"
    assert client.ledger.completion_tokens == 3, "every call is counted"


def test_a_reply_that_was_cut_off_is_paid_once_and_says_so(clients):
    """Another draw would be cut off too; a local model keeps what it wrote and why it stopped."""
    half, request = GOOD[:-3], Request("look", max_new_tokens=4, schema=STEP)
    with running(LLMServer(lambda body: half)) as server:
        server.finish = "length"
        reply = clients(server).complete([request])[0]
    assert len(server.bodies) == 1 and reply.error.startswith("bad JSON: ") and "raise max_new_tokens" in reply.error
    local = fit_reply(Reply(half, "length"), STEP)
    assert (local.text, local.stop_reason) == (half, "length") and local.error == reply.error
    assert fit_reply(Reply(half), STEP).stop_reason == "error"
    query, section = Query("s", "look", Task("t", "i")), ReasoningModelConfig(prompted=True)
    for found in (reply, local):
        predicted = read_prediction(query, found, TranscriptMapper(), section)
        assert not predicted.valid and predicted.error.count("it was cut off, raise ") == 1


# ---- concurrency, loops, interruption


def test_concurrency_has_a_limit_and_order_is_kept(clients):
    with running(LLMServer()) as server:
        server.delay = 0.02
        client = clients(server, concurrency=8)
        assert [reply.text for reply in client.complete(prompts(60))] == [f"OPEN DRAWER {i}" for i in range(60)]
        assert 4 <= server.most_flying <= 8
        assert client.complete([]) == []


def test_inside_a_running_loop_and_from_two_threads(clients):
    with running(LLMServer()) as server:
        client = clients(server)

        async def cell():
            return client.complete(prompts(5))

        assert asyncio.run(cell())[4].text == "OPEN DRAWER 4"
        found = {}
        threads = [threading.Thread(target=lambda i=i: found.update({i: client.complete(prompts(40))})) for i in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert found[0] == found[1] and client.ledger.requests == 85


@pytest.fixture()
def heard():
    """SIGINT raises KeyboardInterrupt, also in a process that was started with SIGINT ignored (in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_cancels_the_batch_and_the_client_lives_on(clients, heard):
    with running(LLMServer(faults=("hang",), only="bad")) as server:
        client = clients(server)

        def interrupt():
            while not server.flying:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            client.complete([Request("bad")])
        deadline = time.monotonic() + 5
        while asyncio.all_tasks(client.connection[0].loop) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not asyncio.all_tasks(client.connection[0].loop), "the call in flight was cancelled"
        assert client.complete([Request("look")])[0].text == "LOOK"
        client.close()
        assert not client.connection[0].thread.is_alive()
        assert client.complete([Request("again")])[0].text == "AGAIN"


def test_a_bar_if_wanted(clients, capsys):
    with running(LLMServer()) as server:
        clients(server, "small").complete(prompts(3))
        assert "small" not in capsys.readouterr().err
        clients(server, "small", progress=True).complete(prompts(3))
        assert "small" in capsys.readouterr().err


# ---- ledger


def test_the_limit_holds_under_concurrency_and_loss(clients):
    """What the server did, at its prices, stays below the limit although calls run side by side and some are lost."""
    with running(LLMServer(lambda body: "mug " * 20, faults=("half", "500", "drop"), rate=0.2)) as server:
        ledger = Ledger(price_input=1.0, price_output=100.0, cost_limit=0.2)
        client = clients(server, ledger=ledger, cache=ReplyCache())
        with pytest.raises(CostLimit, match="of 0.2 USD are spent"):
            client.complete([Request(f"go to {i}", max_new_tokens=20) for i in range(300)])
        worked = len(server.bodies) - server.faults["500"]
        assert worked * (3 + 20 * 100) / 1e6 <= ledger.cost <= 0.2 and ledger.cost > 0.15
        assert 50 < len(client.cache) < 100 and ledger.reserved < 1e-12
        sent = len(server.bodies)
        with pytest.raises(CostLimit):
            client.complete([Request("one more", max_new_tokens=2000)])
        assert len(server.bodies) == sent


def test_the_ledger_in_random_use_never_exceeds_its_limit():
    rng = random.Random(0)
    for _ in range(200):
        ledger, flying = Ledger(rng.random(), rng.random() + 0.1, cost_limit=rng.random() * 1e-3), []
        for _ in range(60):
            prompt, most = rng.randint(1, 200), rng.randint(1, 200)
            try:
                flying.append((reserve(ledger, prompt, most), prompt, most))
            except CostLimit:
                pass
            if flying and rng.random() < 0.6:
                reserved, prompt, most = flying.pop(rng.randrange(len(flying)))
                reply = Reply("", prompt_tokens=rng.randint(0, prompt), completion_tokens=rng.randint(0, most))
                settle(ledger, reserved, rng.choice([reply, None]), rng.random() < 0.8)
            assert ledger.cost + ledger.reserved <= ledger.cost_limit + 1e-12


def test_a_limit_needs_prices():
    with pytest.raises(ConfigError, match="price_input"):
        Ledger(cost_limit=1.0)


# ---- cache


def test_a_rerun_asks_for_nothing(clients, tmp_path):
    path = tmp_path / "a" / "replies.sqlite"
    requests = [*prompts(20), *prompts(5), Request("open drawer 0", sample=1)]
    with running(LLMServer()) as server:
        first = clients(server, cache=ReplyCache(path)).complete(requests)
        assert len(server.bodies) == 21, "equal requests are sent once, another sample is another request"
        again = clients(server, cache=ReplyCache(path), tries=1)
        assert again.complete(requests) == first and len(server.bodies) == 21
        assert (again.ledger.requests, again.ledger.cached, again.ledger.calls) == (26, 26, 0)
        others = [clients(server, "n", cache=ReplyCache(path)), clients(server, cache=ReplyCache(path), extra={"n": 1})]
        for other in others:
            other.complete(requests[:1])
        changes = [dict(system="s"), dict(temperature=0.5), dict(max_new_tokens=9), dict(sample=2), dict(schema={})]
        again.complete([replace(requests[0], **change) for change in changes])
        assert len(server.bodies) == 21 + 2 + 5


def test_equal_dreams_have_futures_of_their_own_that_are_replayed(clients, tmp_path):
    """A server that never says the same twice: equal dreams, votes and steps are independent, from a cache too."""
    numbers, path, state = iter(range(99)), tmp_path / "replies.sqlite", "task\na room"

    def answer(body):
        step = {"reasoning": "", "works": True, "next_state": f"{state}\nlook = {next(numbers)}", "reward": 0}
        return json.dumps(step | {"terminated": False})

    def futures(server):
        settings = ReasoningModelConfig(provider="openai", name="m", votes=2)
        model = ReasoningExperienceModel(settings, clients(server, cache=ReplyCache(path)))
        dream = DreamEnv(model, 2, max_turns=3)
        dream.reset([0, 1], [Task("t", "task", initial_state=state)] * 2)
        found = [result.state for result in dream.step([0, 1], ["look", "look"])]
        return found + [model.generate_experience(state, "look", "task", sample=i).next_state for i in (0, 1, 0)]

    with running(LLMServer(answer)) as server:
        first = futures(server)
        assert len(set(first)) == 4 and first[4] == first[2] and len(server.bodies) == 8, "two votes for each of four"
        assert futures(server) == first and len(server.bodies) == 8


def test_failures_are_asked_again(clients):
    with running(LLMServer(faults=("503",), only="drawer 1")) as server:
        client = clients(server, cache=ReplyCache(), tries=1)
        assert [bool(reply.error) for reply in client.complete(prompts(3))] == [False, True, False]
        server.kinds = ()
        assert [reply.error for reply in client.complete(prompts(3))] == [""] * 3 and len(server.bodies) == 4


CHILD = """
import sys
from dreamgym.core.ledger import ReplyCache
from dreamgym.core.llm import Request
from dreamgym.core.served import ServedClient, Server
client = ServedClient(Server("m", sys.argv[1]), cache=ReplyCache(sys.argv[2]), concurrency=4)
for i in range(10_000):
    client.complete([Request(f"open drawer {i}")])
    print(i, flush=True)
"""


def test_what_was_paid_for_survives_kill_9(clients, tmp_path, root):
    path = tmp_path / "replies.sqlite"
    with running(LLMServer()) as server:
        command = [sys.executable, "-c", CHILD, server.base_url, str(path)]
        child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        while int(child.stdout.readline()) < 30:
            pass
        child.kill()
        seen = max([30, *map(int, child.stdout.read().split())])
        child.wait()
        sent = len(server.bodies)
        client = clients(server, cache=ReplyCache(path))
        replies = client.complete(prompts(seen + 1))
        assert len(server.bodies) == sent and client.ledger.cached == seen + 1
        assert [reply.text for reply in replies] == [f"OPEN DRAWER {i}" for i in range(seen + 1)]


def test_threads_share_a_cache_and_a_full_disk_costs_no_run(tmp_path, caplog):
    cache, keys = ReplyCache(tmp_path / "replies.sqlite"), [request_key("s", {"i": i}) for i in range(200)]
    threads = [
        threading.Thread(target=lambda t=t: [cache.put(key, Reply(f"{t}")) for key in keys]) for t in ("one", "two")
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(cache) == 200 and {cache.get(key).text for key in keys} <= {"one", "two"}
    first = cache.get(keys[0])
    cache.put(keys[0], Reply("later"))
    assert cache.get(keys[0]) == first, "whoever reads later sees what the first reader saw"
    cache.db.execute("PRAGMA max_page_count=1")
    cache.put("new", Reply("mug " * 100_000))
    assert cache.dropped == 1 and cache.get("new") is None and "full" in caplog.text
    (tmp_path / "text").write_text("not a database, but some text " * 10)
    with pytest.raises(DataError, match="not a database"):
        ReplyCache(tmp_path / "text")


# ---- secrets


@pytest.mark.parametrize("provider, header", [("openai", "Authorization"), ("anthropic", "x-api-key")])
def test_the_key_is_sent_and_kept_nowhere(clients, monkeypatch, caplog, tmp_path, provider, header):
    monkeypatch.setenv("OPENAI_API_KEY" if provider == "openai" else "ANTHROPIC_API_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "replies.sqlite"
    shown = []
    with running(LLMServer(lambda body: f"your key is {CANARY}", faults=("500", "400"), only="bad")) as server:
        server.says = "<html>Incorrect API key: {" + header + "}</html>"
        client = clients(server, provider=provider, cache=ReplyCache(path), tries=3)
        replies = client.complete([Request("look"), Request("bad"), Request("bad", sample=1)])
        assert replies[0].text == "your key is [key]" and "[key]" in replies[1].error
        server.kinds, server.only = ("401",), ""
        with pytest.raises(LLMError) as caught:
            client.complete([Request("go")])
    for capture in (False, True):
        error = traceback.TracebackException.from_exception(caught.value, capture_locals=capture)
        shown += list(error.format())
    assert all(CANARY in headers[header] for headers in server.headers) and len(server.headers) >= 5
    shown += [
        caplog.text,
        repr(client),
        repr(vars(client)),
        repr([vars(part) for part in client.connection]),
        repr(replies),
    ]
    shown += [str(caught.value), repr(summary(client.ledger)), repr(asdict(client.server))]
    assert "[key]" in "".join(shown) and CANARY not in "".join(shown)
    files = list(tmp_path.iterdir())
    assert files and not any(CANARY.encode() in file.read_bytes() for file in files)


def test_the_key_travels_neither_in_the_open_nor_in_an_address(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    assert find_key(Server("m", "http://10.0.0.5:8000/v1")) is None and "OPENAI_API_KEY" in caplog.text
    assert (
        find_key(Server("m")).get_secret_value() == CANARY == find_key(Server("m", "https://h/v1")).get_secret_value()
    )
    given = ServedClient(Server("m", "http://10.0.0.5:8000/v1"), key=SecretStr("given"))
    assert given.key.get_secret_value() == "given"
    for address in (f"https://me:{CANARY}@h/v1", f"https://h/v1?key={CANARY}", f"ftp://{CANARY}"):
        with pytest.raises(ConfigError) as caught:
            Server("m", address)
        assert "base_url" in str(caught.value) and (CANARY not in str(caught.value) or address.startswith("ftp"))


# ---- from the configuration


def test_the_config_describes_a_client(tmp_path):
    section = ReasoningModelConfig(
        provider="anthropic",
        name="claude",
        price_input=3,
        price_output=15,
        cost_limit=2,
        cache=str(tmp_path / "r.sqlite"),
    )
    client = served_client(section)
    assert client.server.address == "https://api.anthropic.com/v1" and client.ledger.cost_limit == 2
    assert client.cache.path == str(tmp_path / "r.sqlite") and client.concurrency == 16
    for wrong in (dict(), dict(provider="openai"), dict(name="llama")):
        with pytest.raises(ConfigError, match="expected a served model"):
            served_client(ReasoningModelConfig(**wrong))


# ---- a real server

LEARNT = [
    ("open drawer 1", json.dumps({"state": "drawer 1: open, mug 1", "reward": 0})),
    ("put mug 1 in sink", json.dumps({"state": "sink: mug 1", "reward": 1})),
    ("look", "nothing happens"),
    ("is it done", '{"reward": 3}'),
]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """(base_url, folder) of a `transformers serve` process whose model has learnt `LEARNT`."""
    if problem := serving_problem():
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("model")
    loss = train_small_model(folder, LEARNT)
    assert loss < 0.01
    with transformers_serve(folder) as base_url:
        yield base_url, folder


def test_transformers_serve(served, tmp_path):
    from dreamgym.core.language_model import load_language_model

    base_url, folder = served
    client = ServedClient(Server(str(folder), base_url, timeout=60), cache=ReplyCache(tmp_path / "replies.sqlite"))
    requests = [Request(prompt, temperature=0.0, max_new_tokens=80) for prompt, _ in LEARNT]
    replies = client.complete(requests)
    assert [reply.text for reply in replies] == [text for _, text in LEARNT]
    assert [reply.text for reply in GeneratorClient(load_language_model(folder)).complete(requests)] == [
        text for _, text in LEARNT
    ], "the same model in this process"
    assert all(reply.completion_tokens in (len(text), len(text) + 1) for reply, (_, text) in zip(replies, LEARNT))
    structured = client.complete([replace(request, schema=STEP) for request in requests])
    kinds = [reply.error.partition(":")[0] for reply in structured]
    assert kinds == ["", "", "bad JSON", "wrong schema"] and json.loads(structured[1].text)["reward"] == 1
    cut = client.complete([replace(requests[0], max_new_tokens=5)])[0]
    assert cut.stop_reason == "length" and cut.text == LEARNT[0][1][:5] and cut.completion_tokens == 5
    calls = client.ledger.calls
    assert client.complete(requests) == replies and client.ledger.calls == calls
    assert not client.ledger.faults - Counter({"bad JSON": 1, "wrong schema": 1})
    client.close()


def test_transformers_serve_many_at_once(served):
    base_url, folder = served
    client = ServedClient(Server(str(folder), base_url, timeout=60), concurrency=8)
    replies = client.complete([Request(LEARNT[i % 4][0], temperature=0.0, max_new_tokens=80) for i in range(24)])
    assert [reply.text for reply in replies] == [LEARNT[i % 4][1] for i in range(24)]
    client.close()
    with pytest.raises(LLMError):
        ServedClient(Server("another", base_url, timeout=60), backoff=0.001).complete([Request("look")])
