"""Offline data of others: good lines kept, bad ones named, walkthroughs that win, human sessions of WebShop."""

import json
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Experience, to_row
from dreamgym.core.errors import DataError
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.offline_readers import (
    read_trajectories,
    walkthrough_experiences,
    webshop_action,
    webshop_experiences,
)

STEPS = [{"state": "s0", "action": "a0"}, {"state": "s1", "action": "a1", "reward": 1}]


def test_transitions_and_episodes_in_one_file(tmp_path):
    row = Experience("s", "a", 0.0, "t", False, success=True)
    short = {"state": "s", "action": "a", "next_state": "t"}
    lines = [
        to_row(row),
        {"steps": STEPS, "final_state": "s2", "success": True, "env": "theirs"},
        {"steps": STEPS},
        {"steps": [*STEPS[:1], {"state": "s1", "action": "a1", "truncated": True}], "final_state": "s2"},
        short,
        {"steps": []},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    rows, bad = read_trajectories(tmp_path, strict=True)
    assert not bad and len(rows) == 1 + 2 + 1 + 2 + 1 and replace(rows[0], episode_id="") == row
    episode = rows[1:3]
    assert [e.next_state for e in episode] == ["s1", "s2"] and [e.turn for e in episode] == [0, 1]
    assert [e.terminated for e in episode] == [False, True] and {e.env for e in episode} == {"theirs"}
    assert len({e.episode_id for e in rows}) == 5 and episode[1].reward == 1  # one alone is an episode of its own
    assert rows[3].next_state == "s1" and not rows[3].terminated  # the last step has no end
    assert rows[5].truncated and not rows[5].terminated
    assert replace(rows[6], episode_id="") == Experience("s", "a", 0.0, "t", False)


def test_bad_lines_are_counted_and_named(tmp_path):
    good = json.dumps({"steps": STEPS, "final_state": "s2"})
    wrong = ["{", "3", '{"steps": 3}', '{"steps": [3]}', '{"steps": [{"state": "s"}, {"state": "t", "action": "a"}]}']
    wrong += ['{"steps": [{"state": "s", "action": "a", "reward": "1"}], "final_state": "t"}', '{"stepz": []}']
    (tmp_path / "a.jsonl").write_text("\n".join([good, *wrong, good]))
    rows, bad = read_trajectories(tmp_path / "a.jsonl")
    assert len(rows) == 4 and [line.split(":")[1] for line in bad] == [str(n) for n in range(2, 9)]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        read_trajectories(tmp_path, strict=True)
    with pytest.raises(DataError, match="expected a .jsonl file"):
        read_trajectories(tmp_path / "none.jsonl")


def test_generated_walkthroughs_win():
    env = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    tasks = env.tasks("train")[:8]
    episodes, lost = walkthrough_experiences(env, tasks)
    assert not lost and [e[0].task_id for e in episodes] == [task.id for task in tasks]
    for episode in episodes:
        assert episode[-1].terminated and {e.success for e in episode} == {True} and episode[-1].reward == 1
        assert {e.policy for e in episode} == {"walkthrough"}
        assert all(a.next_state == b.state for a, b in zip(episode, episode[1:]))
    assert walkthrough_experiences(env, tasks[:2], lambda task: ["look"]) == ([], [task.id for task in tasks[:2]])


def test_official_walkthroughs_win(test_data, tmp_path):
    archive = test_data / "alfworld" / "games.tar.xz"
    if not archive.is_file():
        pytest.skip("no official games")
    with tarfile.open(archive, "r|*") as stream:  # the first games of the archive, not all of it
        found = islice((m for m in stream if m.name.endswith("/game.tw-pddl")), 12)
        for member in found:
            target = tmp_path.joinpath(*Path(member.name).parts[-4:])
            target.parent.mkdir(parents=True)
            target.write_bytes(stream.extractfile(member).read())
    split = next(tmp_path.iterdir()).name.replace("train", "train_all").replace("valid_train_all", "valid_train")
    env = make_environment("alfworld", EnvironmentConfig(data_dir=str(tmp_path)))
    tasks = env.tasks(split)
    episodes, lost = walkthrough_experiences(env, tasks)
    assert not lost and len(episodes) == len(tasks) > 3 and all(e[-1].success for e in episodes)


def page(kind, **content):
    return {"page": kind, "url": f"http://shop/{kind}/1", "goal": {"instruction_text": "buy"}, "content": content}


def test_actions_between_pages():
    results = page("search_results", keywords=["red", "mug"], page=1, search_result_asins=["B1"])
    more = page("search_results", keywords=["red", "mug"], page=2, search_result_asins=["B2"])
    item, sized = page("item_page", asin="B1", options={}), page("item_page", asin="B1", options={"size": "XL"})
    sub = page("item_sub_page", asin="B1", options={}) | {"url": "http://shop/item_sub_page/1/B1/Features/x"}
    expected = {
        "search[red mug]": (page("index"), results),
        "click[next >]": (results, more),
        "click[< prev]": (more, results),
        "click[b1]": (results, item),
        "click[xl]": (item, sized),
        "click[features]": (item, sub),
        "click[buy now]": (sized, page("done", asin="B1", options={})),
        "click[back to search]": (item, page("index")),
    }
    assert {action: webshop_action(*pair) for action, pair in expected.items()} == {a: a for a in expected}
    assert webshop_action(sub, item) == webshop_action(item, results) == "click[< prev]"
    assert webshop_action(page("index"), page("index")) is None
    for wrong in ((page("index"), item), (item, page("item_page", asin="B1", options={"a": "1", "b": "2"}))):
        with pytest.raises(ValueError):
            webshop_action(*wrong)


def test_human_sessions_of_webshop(test_data, tmp_path):
    folder = test_data / "webshop" / "human_trajs_agentgym"
    if not folder.is_dir():
        pytest.skip("no WebShop sessions")
    episodes, bad = webshop_experiences(folder, strict=True)
    assert not bad and len(episodes) == len(list(folder.glob("*.jsonl"))) == 9
    rewards = {e[0].task_id: e[-1].reward for e in episodes}
    assert sum(r == 1.0 for r in rewards.values()) == 2 and rewards["20220427_1_15"] == 0.75
    for episode in episodes:
        assert episode[-1].action == "click[buy now]" and episode[-1].terminated
        assert {e.success for e in episode} == {episode[-1].reward == 1.0}
        assert all(a.next_state == b.state for a, b in zip(episode, episode[1:]))
        assert all(e.reward == 0 for e in episode[:-1])
    (seven,) = (e for e in episodes if e[0].task_id == "20220427_1_7")
    assert [e.action for e in seven[1:]] == [
        "click[b07xc7gvrk]",
        "click[description]",
        "click[< prev]",
        "click[buy now]",
    ]
    whole = (folder / "20220427_1_7.jsonl").read_text().splitlines()
    (tmp_path / "torn.jsonl").write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:50])
    (tmp_path / "jump.jsonl").write_text("\n".join([whole[0], whole[-1]]))
    (tmp_path / "good.jsonl").write_text("\n".join(whole[:-1]))  # somebody left without buying
    episodes, bad = webshop_experiences(tmp_path)
    assert [line.split(":")[0] for line in bad] == ["jump.jsonl", "torn.jsonl"]
    assert episodes[0][-1].success is None and not episodes[0][-1].terminated
    assert replace(episodes[0][0], task_id="", episode_id="") == replace(
        seven[0], task_id="", episode_id="", success=None
    )
    with pytest.raises(DataError, match="jump.jsonl"):
        webshop_experiences(tmp_path, strict=True)
