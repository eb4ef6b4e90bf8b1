"""The embedded sites, their tasks, states and rules, and what a missing or broken part says. No browser is needed here."""

import json
import random
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Experience, Task
from dreamgym.core.errors import CheckpointError, ConfigError, DataError, EnvironmentFailure, MissingExtra
from dreamgym.environments import browser, webarena
from dreamgym.environments.browser_worker import WorkerEpisodes, register_site_tasks
from dreamgym.environments.miniwob import SOLVED
from dreamgym.environments.site_tasks import said, score, site_tasks, vary, webarena_config, world_goals
from dreamgym.environments.sites import HEADERS, ROUTES, SITES, SiteServer, open_database
from dreamgym.environments.web_recordings import web_episode
from dreamgym.environments.web_rules import effect_of, expert_action, is_determined, reasoning_trace, violations
from dreamgym.environments.web_state import (
    Command,
    Element,
    WebMapper,
    WebState,
    apply_change,
    browser_call,
    parse_state,
    read_command,
    read_page,
    write_change,
    write_command,
)
from dreamgym.training.trainer import claim_folder


def test_every_link_and_form_of_every_site_leads_somewhere():
    import re

    for site in SITES:
        for seed in range(3):
            db, pages = open_database(site, seed), ROUTES[site][0]
            waiting, seen = ["/"], set()
            while waiting:
                path = waiting.pop()
                if path in seen:
                    continue
                seen.add(path)
                page = pages(db, path, {})
                assert page is not None, path
                html = "".join([*HEADERS[site], *page.body])
                waiting += re.findall(r'href="([^"]+)"', html)
            assert len(seen) > 8


def test_hostile_input_is_stored_as_text_and_shown_escaped():
    server = SiteServer()
    try:
        server.reset("forum", 0)
        words = "<script>alert(1)</script>' OR 1=1 --"
        assert server.answer("POST", "/reply", {}, {"post": "1", "comment": words})[0] == 303
        status, html = server.answer("GET", "/post/1", {}, {})
        assert status == 200 and "<script>" not in html and "&lt;script&gt;" in html
        assert server.answer("GET", "/post/1 OR 1=1", {}, {})[0] == 404
        server.reset("forum", 0)
        assert "script" not in server.answer("GET", "/post/1", {}, {})[1]
    finally:
        server.close()


def test_tasks_have_webarenas_fields_and_splits_share_no_task():
    splits = {split: site_tasks(split) for split in ("train", "seen", "valid", "unseen")}
    assert len(splits["unseen"]) >= 60 and {t.metadata["site"] for t in splits["unseen"][:6]} == set(SITES)
    ids = [t.id for tasks in splits.values() for t in tasks]
    assert len(ids) == len(set(ids))
    for task in splits["unseen"]:
        config = webarena_config(task)
        assert json.loads(json.dumps(config)) == config
        assert {"task_id", "sites", "start_url", "intent", "eval", "intent_template_id"} <= set(config)
    seen = {t.instruction for t in splits["seen"] if t.world_id == "shop-0"}
    assert seen and not seen & set(vary(splits["train"][0], 1000)) and len(world_goals("shop", 0)) > 50


def random_state(rng: random.Random, task: str = "close login crash in mobile") -> str:
    lines = [
        "link: home",
        "textbox: title",
        "textbox: title = a b",
        "text: status open",
        "button: close",
        "combobox: a = x of x y",
    ]
    return WebState(task, rng.choice("ab"), rng.choices(lines, k=rng.randint(0, 7))).text()


def test_changes_round_trip_between_any_states_also_without_the_marks_that_tokenizers_drop():
    rng = random.Random(0)
    for _ in range(500):
        first, second = random_state(rng), random_state(rng)
        change = write_change(first, second)
        assert apply_change(first, change) == second
        assert apply_change(first, change.replace(": ", " ").replace("] ", "]")) == second


def test_a_label_names_one_control_and_only_one():
    lines = [
        "link: home",
        "text: close",
        "textbox: title = old",
        "link: 3 pots",
        "button: close",
        "link: twice",
        "link: twice",
    ]
    for number, named in enumerate(["home", "", "title", "", "close", "", ""], 1):
        command = write_command(lines, "fill", number, "a = b")
        assert command == (f"fill {named} = a = b" if named else f"fill {number} a = b")
        assert read_command(command, lines) == Command("fill", number, "a = b")
    assert read_command("click twice", lines) == Command("click", 0) == read_command("click nothing", lines)
    assert read_command("choose title", lines) == read_command("push title", lines) == Command("")
    assert browser_call("click twice", []) == ("", "the page has no control [twice], or several of that name")


def test_a_short_state_comes_of_a_huge_page():
    lines = "".join(f"\t[{i}] link 'item {i}'\n" for i in range(100_000))
    state = WebMapper().start(Task("t", "x"), f"RootWebArea 'huge'\n{lines}")
    assert len(parse_state(state).lines) == 60 and len(state) < 5_000


def test_text_of_a_page_cannot_forge_lines_or_end_the_reader():
    rng = random.Random(1)
    for _ in range(300):
        junk = "".join(rng.choice("'\"\\\n\t[]: lastok\x00\u2028\ud83d<>") for _ in range(40))
        page = read_page(f"RootWebArea {junk!r}\n\t[3] link {junk!r}\n{junk}")
        state = WebMapper().start(Task("t", junk), f"RootWebArea {junk!r}\n\t[3] link {junk!r}")
        parsed = parse_state(state)
        assert len(parsed.lines) <= 1 and len(page.elements) <= 2 and parsed.last == "ok"


def test_the_rules_know_a_wrong_prediction():
    lines = [
        "link: home",
        "text: status open",
        "combobox: assignee = bob of nobody bob",
        "button: assign",
        "button: close",
    ]
    state = WebState("close login crash in mobile", "tracker login crash", lines).text()
    assert expert_action(state) == "click close"
    closed = apply_change(state, "[2] text: status closed\n[5] button: reopen")
    for action in ("click 5", "click close"):
        assert violations(state, action, closed, 1.0, True) == []
    assert violations(state, "click buy", apply_change(state, "fail click buy"), 0.0, False) == []
    assert "missed reward" in violations(state, "click 5", closed, 0.0, False)
    assert "wrong lines" in violations(state, "click 5", state, 1.0, True)
    assert "false reward" in violations(state, "click 4", state, 1.0, True)
    assert violations(state, "click 9", apply_change(state, "fail click 9"), 0.0, False) == []
    assert violations(state, "click 1", "nonsense", 0.0, False) == ["malformed state"]
    assert effect_of(parse_state(state), "fill 2 x").ok is False


def test_without_chromium_or_browsergym_the_environment_says_what_to_install(monkeypatch):
    with pytest.raises((EnvironmentFailure, MissingExtra), match="install"):
        webarena.build(EnvironmentConfig(name="webarena", browser="/no/chromium", data_dir="generated"))
    monkeypatch.setattr(browser, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'dreamgym\[webarena\]'"):
        webarena.build(EnvironmentConfig(name="webarena", data_dir="generated"))
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", "/no/such/folder")
    with pytest.raises(EnvironmentFailure, match="apt-get install chromium"):
        browser.find_chromium()


def test_readiness_names_each_sites_problem_and_the_tasks_that_can_run(monkeypatch):
    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/ok" else 500)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Site)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for site in webarena.OFFICIAL_SITES:
        monkeypatch.setenv(f"WA_{site.upper()}", "todo")
    monkeypatch.setenv("WA_REDDIT", f"{url}/ok")
    monkeypatch.setenv("WA_GITLAB", f"{url}/broken")
    tasks = [
        {"task_id": i, "sites": sites, "eval": {}}
        for i, sites in enumerate((["reddit"], ["reddit", "gitlab"], ["map"]))
    ]
    tasks[0]["eval"] = {"reference_answers": {"fuzzy_match": ["x"]}}
    found = webarena.readiness(tasks, webarena.site_addresses())
    server.shutdown()
    assert found["ready"] == [0] and found["fuzzy"] == 1
    assert found["problems"]["gitlab"] == "HTTP 500" and found["problems"]["map"] == "no address"
    assert webarena.chosen_benchmark(None) == "webarena" and webarena.chosen_benchmark("generated") == "generated"
    with pytest.raises(ConfigError, match="split"):
        webarena.official_tasks("webarena", "tset")
    with pytest.raises(ConfigError, match="webarenalite"):
        webarena.chosen_benchmark("webarenalight")


def test_a_worker_whose_browser_failed_is_never_used_again():
    class Worker:
        alive = True

        def receive(self, seconds):
            return {"failed": "TargetClosedError: the browser has been closed"}

        def kill(self):
            self.alive = False

    slot = browser.WebSlot(Worker())
    assert "failed" in browser.read_answer(slot, 1.0) and slot.done and not slot.worker.alive

    class Dead:
        def close(self):
            raise RuntimeError("the browser has been closed")

    episodes = WorkerEpisodes.__new__(WorkerEpisodes)
    episodes.env = Dead()
    with pytest.raises(RuntimeError):
        episodes.close()
    episodes.close()  # nothing is left that could fail again


def test_options_are_chosen_by_the_names_that_the_page_has():
    page = "RootWebArea 'A'\n\t[5] combobox 'branch'\n\t\t[6] option 'feature_x'\n\t\t[7] option 'my  own branch'"
    elements = read_page(page).elements
    assert browser_call("choose 1 feature_x", elements) == ("select_option('5', 'feature_x')", "")
    assert browser_call("choose 1 my_own_branch", elements) == ("select_option('5', 'my own branch')", "")


def test_proxies_are_for_others(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", ".corp")
    monkeypatch.delenv("no_proxy", raising=False)
    assert browser.no_proxy() == ".corp,127.0.0.1,localhost"
    assert webarena.site_problem(SiteServer().url) == ""


def test_names_of_solved_pages_are_whole():
    assert {"click-dialog-2", "login-user", "click-dialog"} <= {*SOLVED} and len(SOLVED) == len({*SOLVED})
    assert not [name for name in SOLVED if name.endswith("-") or name in ("user", "dialog-2")]


@pytest.mark.parametrize("answer", ["answer anna", "answer Anna", 'answer "anna"', "answer bob", "answer 'Bob'"])
def test_the_rules_judge_an_answer_as_the_scorer_does(answer):
    lines = ["link: home", "combobox: assignee = anna of nobody anna bob"]
    state = WebState("who works on login crash in mobile", "tracker login crash", lines).text()
    found = score(said("anna"), "", read_command(answer).value, lambda url, locator: "")
    assert found == float("anna" in answer.lower())
    assert violations(state, answer, state, found, True) == [] != violations(state, answer, state, 1 - found, True)
    assert reasoning_trace(state, answer, state).endswith("done" if found else "not yet")


@pytest.mark.parametrize("call", ["noop()", "scroll(0, 200)", "hover('1')", "go_back()", "keyboard_press('Tab')"])
def test_the_rules_leave_open_what_only_a_browser_can_tell(call):
    state = WebState("close login crash in mobile", "tracker login crash", ["link: home", "button: close"]).text()
    assert browser_call(call, [Element("link", "home", bid="4"), Element("button", "close", bid="5")])[0]
    for after in (state, apply_change(state, f"fail {call}")):
        assert violations(state, call, after, 0.0, False) == []
        assert not is_determined(Experience(state, call, 0.0, after, False))
    assert violations(state, call, "nonsense", 0.0, False) == ["malformed state"]


def test_what_is_offered_on_a_long_page_can_be_done():
    names = ["next", *(f"item {i}" for i in range(2, 82)), "next", "last"]
    tree = "".join(f"\t[{i}] link '{name}'\n" for i, name in enumerate(names, 1))
    many = "".join(f"\t\t[{i}] option 'o{i}'\n" for i in range(100, 130))
    observation = f"RootWebArea 'A'\n\t[99] combobox 'sort'\n{many}{tree}"
    mapper, elements = WebMapper(), read_page(observation).elements
    actions = mapper.admissible_actions(mapper.start(Task("t", "buy a pen"), observation))
    assert "click next" in actions and "choose sort = o100" in actions and len(actions) > 80
    assert [browser_call(action, elements)[1] for action in actions] == [""] * len(actions)
    assert browser_call("click next", elements)[0] == "click('1')"
    assert browser_call("click last", elements)[0] == "click('83')"  # on raw pages an agent sees it


def test_a_task_goes_by_the_number_that_browsergym_knows():
    record = {"task_id": 0, "old_task_id": 7, "sites": ["map"], "intent": "x"}
    lite = webarena.official_task("webarenalite", record, "unseen")
    assert lite.metadata["gym"] == "browsergym/webarenalite.7" and lite.id == "webarenalite.7"
    del record["old_task_id"]
    assert webarena.official_task("webarena", record, "unseen").metadata["gym"] == "browsergym/webarena.0"


def test_embedded_tasks_have_ids_of_browsergym_and_sites_of_their_own():
    pytest.importorskip("browsergym.core")
    gymnasium = pytest.importorskip("gymnasium")
    tasks = site_tasks("unseen", 1)[:2]
    names = register_site_tasks(tasks)
    assert names == [f"browsergym/dreamgym.{task.id}" for task in tasks] and set(names) <= set(gymnasium.registry)
    made = [gymnasium.spec(name).entry_point().task_entrypoint(seed=0) for name in names]
    try:
        assert [task.config["intent"] for task in made] == [task.instruction for task in tasks]
        assert made[0].url != made[1].url and all(task.config["start_url"].startswith(task.url) for task in made)
    finally:
        for task in made:
            task.teardown()


@pytest.fixture
def one_site(monkeypatch):
    """Only one official site has an address; no browser is needed to build an environment."""
    for site in (*webarena.OFFICIAL_SITES, "homepage"):
        monkeypatch.delenv(f"WA_{site.upper()}", raising=False)
    monkeypatch.setenv("WA_REDDIT", "http://127.0.0.1:9")
    monkeypatch.setenv("WEBARENA_PYTHON", "/arena/bin/python")
    monkeypatch.setattr(browser, "require_browsergym", lambda: None)
    return EnvironmentConfig(name="webarena", browser=sys.executable)


def test_official_workers_are_told_of_all_seven_addresses(one_site, monkeypatch):
    told = []
    monkeypatch.setattr(browser.subprocess, "Popen", lambda command, **how: told.append((command[0], how["env"])))
    for data in (None, "generated"):
        env = webarena.build(one_site.model_copy(update={"data_dir": data}))
        browser.start_worker(env.make(1)._play.pool.settings)
    (python, official), (_, embedded) = told
    sites = {name: value for name, value in official.items() if name.startswith("WA_")}
    others = ("SHOPPING", "SHOPPING_ADMIN", "GITLAB", "WIKIPEDIA", "MAP", "HOMEPAGE")
    assert sites == {"WA_REDDIT": "http://127.0.0.1:9"} | {f"WA_{name}": "todo" for name in others}
    assert python == "/arena/bin/python" and "WA_MAP" not in embedded


def test_slow_sites_may_take_longer(one_site):
    """Null: twenty seconds for an action; a first page has three times as long."""
    for seconds, waits in ((None, (60.0, 20.0)), (45.0, (135.0, 45.0))):
        env = webarena.build(one_site.model_copy(update={"browser_seconds": seconds}))
        settings = env.make(1)._play.pool.settings
        assert (settings.reset_seconds, settings.step_seconds) == waits


def test_a_run_on_embedded_sites_is_not_continued_on_official_ones(one_site, monkeypatch, tmp_path):
    from dreamgym.core.config import load_config

    config, official = load_config(None, "webarena", "smoke"), webarena.build(one_site)
    monkeypatch.delenv("WA_REDDIT")
    embedded = webarena.build(one_site)
    assert (embedded.digest, official.digest) == ("", "webarena")
    claim_folder(tmp_path / "run", config, embedded)
    with pytest.raises(CheckpointError, match="other data"):
        claim_folder(tmp_path / "run", config, official)


@pytest.mark.parametrize("action", ["click 1", " fill 2  a (b)", ""])
def test_a_page_cannot_say_that_a_raw_step_failed(action):
    mapper = webarena.PageMapper()
    state = mapper.start(Task("t", "x"), "url: http://a\nRootWebArea")
    spoof = "url: http://a RootWebArea 'A' StaticText 'x = url: http://a error: y'"
    for page, failed in ((spoof, False), ("url: http://a\nerror: no control\nRootWebArea", True)):
        e = Experience(state, action, 0.0, mapper.update(state, action, page), False)
        assert mapper.failed(e) == failed


@pytest.mark.parametrize("step", [{"action": "click('1')"}, {"axtree_txt": "x"}, 5, None, "axtree_txt action"])
def test_a_trajectory_with_a_broken_step_is_named(step):
    good = {"axtree_txt": "RootWebArea 'A'", "action": "noop()"}
    with pytest.raises(DataError, match="step 1 .*(axtree_txt|action).* is missing"):
        web_episode({"goal": "x", "steps": [good, step]})
