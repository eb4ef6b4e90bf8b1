"""Episode views: escaping, missing keys, the browser's controls, the static fallback."""

import re
import sys

import pytest

from dreamgym.utils.tracking import RunDir
from dreamgym.utils.widgets import browse_episodes, compare_html, episode_html, episodes_html, load_episodes, text_block

ATTACKS = [
    "<script>alert(1)</script>",
    "</pre></div><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "</style><iframe src=javascript:alert(1)>",
    "&lt;script&gt;",
    "]]><svg/onload=alert(1)>",
    "\x00\udce4 $x^2$ <!-- ",
]
DREAM = {
    "source": "dream",
    "task": "put a mug on desk 1",
    "success": True,
    "turns": [
        {"state": "state A", "response": "<action>go</action>", "action": "go", "reward": 0},
        {"state": "state B", "action": "put", "reasoning": "because", "reward": 1.0},
    ],
}
REAL = DREAM | {"source": "real", "success": False, "turns": DREAM["turns"][:1]}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("show", [episode_html, lambda e: compare_html(e, e), lambda e: episodes_html([e])])
def test_environment_text_never_becomes_html(attack, show):
    keys = ("source", "task", "task_id", "aborted", "final_state", "success")
    for episode in (dict.fromkeys(keys, attack), dict.fromkeys(keys[:3], attack)):
        turn = dict.fromkeys(("state", "response", "action", "reasoning", "reward", "valid"), attack)
        html = show(episode | {"turns": [turn, turn]})
        tags = re.findall(r"<[^>]*>", html.split("</style>", 1)[1])
        assert set(tags) <= {"</div>", "</span>", "</pre>", "</b>", "</summary>", "</details>"} | {
            tag for tag in tags if re.fullmatch(r'<(div|span|pre|b|summary|details)( class="[a-z -]*")?>', tag)
        }
        assert html.count("<style>") == 1 and html.count("</style>") == 1


def test_missing_keys_and_long_text():
    assert "0 turns" in episode_html({}) and "reward 0" in episode_html({"turns": [{}]})
    assert text_block("state", None) == "" and len(text_block("state", "x" * 10**6)) < 5000
    assert "invalid action" in episode_html({"turns": [{"valid": False}]})


def test_comparison_aligns_turns_of_unequal_episodes():
    html = compare_html(DREAM, REAL)
    assert html.count("state A") == 2 and html.count("state B") == 1 and "dg-dream" in html and "dg-real" in html


def test_list_reads_a_run_and_says_what_it_leaves_out(tmp_path):
    with RunDir(tmp_path) as run:
        run.append("episodes.jsonl", [DREAM, REAL] * 15)
    episodes = load_episodes(tmp_path)
    html = episodes_html(episodes)
    assert html.count("<details>") == 20 and "10 more episodes" in html and html._repr_html_() == html


def test_a_list_keeps_to_its_size():
    """Long episodes are left out, shorter ones after them are not."""
    long = DREAM | {"turns": DREAM["turns"] * 40}
    html = episodes_html([DREAM, long, REAL], size=3000)
    assert html.count("<details>") == 2 and "1 more episodes" in html and len(html) < 3000 + len(episodes_html([]))
    assert len(repr(html)) < 40 and html._repr_html_() == html  # a notebook stores the text once
    assert "no episodes" not in episodes_html([long], size=10) and "1 more" in episodes_html([long], size=10)


def test_final_states_stand_under_the_last_turn_only():
    dream, real = DREAM | {"final_state": "end A"}, REAL | {"final_state": "end B"}
    first, second = compare_html(dream, real, 1), compare_html(dream, real, 2)
    assert "end A" not in first and "end B" in first and "end A" in second and "end A" in compare_html(dream, real)


def test_browser_controls():
    pytest.importorskip("ipywidgets")
    top, middle, pane = browse_episodes([DREAM, REAL]).children
    (source, turn), (picker, beside) = top.children, middle.children
    assert "state A" in pane.value and "state B" in pane.value and turn.max == 2
    turn.value = 1
    assert "state A" in pane.value and "state B" not in pane.value
    turn.value, beside.value = 0, 1
    assert "dg-pair" in pane.value
    beside.value, source.value = -1, "real"
    assert [value for _, value in picker.options] == [1] and 'dg-dream"' not in pane.value and turn.max == 1
    assert len(browse_episodes([DREAM]).children[0].children[0].options) == 3
    source.value = "dream"
    assert [value for _, value in picker.options] == [0] and turn.max == 2


def test_browser_of_one_source_can_be_empty():
    pytest.importorskip("ipywidgets")
    top, _, pane = browse_episodes([DREAM]).children
    top.children[0].value = "real"
    assert "no episodes" in pane.value


def test_without_widgets_the_list_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert browse_episodes([DREAM]) == episodes_html([DREAM])
    assert "no episodes" in browse_episodes([])
