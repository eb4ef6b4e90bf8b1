"""Official parts without Docker: WebArena-Verified's score, Wikipedia through kiwix-serve, the task files, MiniWoB++.

Their packages live in Pythons of their own: $WEBARENA_VERIFIED_PYTHON (webarena-verified==1.2.3 and libzim) and $WEBARENA_PYTHON
(browsergym-webarena, browsergym-webarenalite). What is absent is skipped.
"""

import os
import shutil
import socket
import subprocess
import time
from urllib.request import urlopen

import pytest
from pages import pages

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import DreamGymError
from dreamgym.environments import miniwob
from dreamgym.environments.browser import BrowserProcess, BrowserSettings, find_chromium, require_browsergym
from dreamgym.environments.offline import record
from dreamgym.environments.site_tasks import said
from dreamgym.environments.web_scoring import verified_score
from dreamgym.environments.web_state import WebMapper, parse_state
from dreamgym.environments.webarena import official_configs

try:
    require_browsergym()
    CHROMIUM, PROBLEM = find_chromium(), ""
except DreamGymError as error:
    CHROMIUM, PROBLEM = "", str(error)
TOOLS = os.environ.get("WEBARENA_VERIFIED_PYTHON", "")
browser = pytest.mark.skipif(not CHROMIUM, reason=PROBLEM)
tools = pytest.mark.skipif(
    not TOOLS, reason="$WEBARENA_VERIFIED_PYTHON names no Python with webarena-verified and libzim"
)


@pytest.fixture
def worker():
    process = BrowserProcess(BrowserSettings(CHROMIUM))
    yield process
    process.kill()


def ask(worker, **request):
    worker.send(request)
    answer = worker.receive(60)
    assert "failed" not in answer, answer
    return answer


MAP = "<title>map</title><form action=/search><input name=query aria-label=query><button>Go</button></form>"


@browser
@tools
@pytest.mark.parametrize(("query", "score"), [("parking near Carnegie Mellon University", 1.0), ("pizza", 0.0)])
def test_webarena_verified_scores_an_episode_from_the_har_of_our_browser(worker, tmp_path, query, score):
    har = tmp_path / "network.har"
    with pages(lambda path: MAP) as url:
        plain = {"task_kwargs": {"start_url": url, "goal": "Show on the map parking near Carnegie Mellon University"}}
        task = {"gym": "browsergym/openended", "package": "browsergym.core", "how": plain}
        recorded = task | {"how": plain | {"pw_context_kwargs": {"record_har_path": str(har)}}}
        first = ask(worker, op="reset", seed=0, task=recorded)
        lines = parse_state(WebMapper().start(Task("t", "x"), first["observation"])).lines
        assert lines == ["textbox: query", "button: Go"]
        ask(worker, op="step", action=f"fill 1 {query}")
        assert "search?query=" in ask(worker, op="step", action="click 2")["observation"]
        ask(worker, op="reset", seed=0, task=task)  # the first episode's context closes, and its HAR is written
    answer = {"task_type": "navigate", "status": "SUCCESS", "retrieved_data": None}
    assert verified_score(378, answer, har, {"map": url}, TOOLS) == score
    wrong = answer | {"task_type": "retrieve"}
    assert verified_score(378, wrong, har, {"map": url}, TOOLS) == 0.0


ZIM = """
import sys
from libzim.writer import Creator, Hint, Item, StringProvider
pages = {"Main": "<a href='Tower_of_Alba'>Tower of Alba</a> <a href='Bridge_of_Alba'>Bridge of Alba</a>",
         "Tower_of_Alba": "<p>The tower was finished in 1782.</p>", "Bridge_of_Alba": "<p>The bridge was finished in 1931.</p>"}
class Article(Item):
    def __init__(self, name, text):
        super().__init__()
        self.name, self.text = name, text
    def get_path(self): return self.name
    def get_title(self): return self.name.replace("_", " ")
    def get_mimetype(self): return "text/html"
    def get_hints(self): return {Hint.FRONT_ARTICLE: True}
    def get_contentprovider(self):
        return StringProvider(f"<html><head><title>{self.get_title()}</title></head><body>{self.text}</body></html>")
with Creator(sys.argv[1]) as zim:
    zim.set_mainpath("Main")
    for name, text in pages.items():
        zim.add_item(Article(name, text))
    for key, value in {"Title": "Alba", "Language": "eng", "Name": "alba", "Creator": "us", "Publisher": "us",
                       "Date": "2026-01-01", "Description": "Three articles"}.items():
        zim.add_metadata(key, value)
"""


@browser
@tools
@pytest.mark.skipif(shutil.which("kiwix-serve") is None, reason="no kiwix-serve; apt-get install kiwix-tools")
@pytest.mark.parametrize(("answer", "reward"), [("1931", 1.0), ("1782", 0.0)])
def test_a_wikipedia_task_runs_on_kiwix_serve(worker, tmp_path, answer, reward):
    subprocess.run([TOOLS, "-c", ZIM, str(tmp_path / "alba.zim")], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "kiwix-serve",
        "--address",
        "127.0.0.1",
        "--port",
        str(port),
        "--nolibrarybutton",
        str(tmp_path / "alba.zim"),
    ]
    wiki = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(50):
            try:
                urlopen(url).close()
                break
            except OSError:
                time.sleep(0.1)
        config = {
            "sites": ["wikipedia"],
            "start_url": "__SITE__/alba/A/Main",
            "intent": "When was the bridge finished?",
        }
        first = urlopen(f"{url}/alba/A/Main").url
        config |= {"start_url": first, "eval": said(1931)}
        seen = ask(worker, op="reset", seed=0, task={"config": config, "address": url})["observation"]
        lines = parse_state(WebMapper().start(Task("t", "x"), seen)).lines
        bridge = next(i for i, line in enumerate(lines, 1) if line == "link: Bridge of Alba")
        seen = ask(worker, op="step", action=f"click {bridge}")["observation"]
        assert "The bridge was finished in 1931." in seen
        ended = ask(worker, op="step", action=f"answer {answer}")
        assert ended["reward"] == reward and ended["terminated"]
    finally:
        wiki.kill()


@pytest.mark.skipif(not os.environ.get("WEBARENA_PYTHON"), reason="$WEBARENA_PYTHON names no Python with WebArena")
def test_the_official_task_files_are_read():
    assert len(official_configs("webarena")) == 812 and len(official_configs("webarenalite")) == 165


@browser
def test_miniwob_tasks_are_solved_through_the_same_states():
    try:
        miniwob.miniwob_pages()
    except DreamGymError as error:
        pytest.skip(str(error))
    world = miniwob.build(EnvironmentConfig(browsers=2))
    names = ("click-test-2", "enter-password", "choose-list", "simple-arithmetic")
    tasks = [task for task in world.tasks("unseen") if task.task_type in names][:4]
    episodes = record(world, tasks)
    assert {rows[0].task_type: rows[-1].success for rows in episodes} == dict.fromkeys(names, True)
