"""The embedded sites, their tasks, states and rules, and what a missing or broken part says. No browser is needed here."""

import json
import random
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import ConfigError, EnvironmentFailure, MissingExtra
from dreamgym.environments import browser, webarena
from dreamgym.environments.browser_worker import WorkerEpisodes
from dreamgym.environments.miniwob import SOLVED
from dreamgym.environments.site_tasks import site_tasks, vary, webarena_config, world_goals
from dreamgym.environments.sites import HEADERS, ROUTES, SITES, SiteServer, open_database
from dreamgym.environments.web_rules import effect_of, expert_action, violations
from dreamgym.environments.web_state import (
    Command,
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
