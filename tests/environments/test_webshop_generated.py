"""Generated shops: the same everywhere, goals in reach, states and rules that agree with the engine."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.core.language_model import train_tokenizer
from dreamgym.environments.base_env import check_env, make_environment
from dreamgym.environments.offline import EXPERT, RANDOM, record
from dreamgym.environments.webshop_catalogue import goal_of, make_catalogue, shop_goals, shop_tasks
from dreamgym.environments.webshop_rules import read_wish
from dreamgym.environments.webshop_state import apply_change, read_state, short_task
from dreamgym.models.curriculum_generator import variation
from dreamgym.models.reasoning_model import parse_target, render_target
from dreamgym.training.play import dreamable
from dreamgym.training.preparation import environment_texts, record_offline


@pytest.fixture(scope="module")
def small():
    return make_environment("webshop", EnvironmentConfig(name="webshop", num_train_worlds=60))


@pytest.fixture(scope="module")
def rows(small):
    return record_offline(small, small.tasks("train")[:60])


def test_shops_are_the_same_everywhere():
    catalogue = make_catalogue(7)
    assert [p.asin for p in catalogue] == [f"BA{chr(65 + i)}" for i in range(len(catalogue))]
    assert [(p.title, p.price, dict(p.options)) for p in catalogue[:2]] == [
        (p.title, p.price, dict(p.options)) for p in make_catalogue.__wrapped__(7, "small")[:2]
    ]
    sizes = [len(make_catalogue(seed)) for seed in range(200)]
    assert 4 <= min(sizes) and max(sizes) <= 12 and len(make_catalogue(0, "full")) > 30


def test_splits_do_not_meet():
    worlds = {
        split: {task.world_id for task in shop_tasks(split)[:100]} for split in ("train", "seen", "valid", "unseen")
    }
    assert worlds["train"] == worlds["seen"]
    assert not worlds["train"] & worlds["valid"] and not (worlds["train"] | worlds["valid"]) & worlds["unseen"]
    for seed in range(12):
        assert not set(shop_goals(seed, "small", "train")) & set(shop_goals(seed, "small", "seen"))
    assert {t.instruction for t in shop_tasks("train", shops=20)[:20]} & {
        t.instruction for t in shop_tasks("seen", shops=20)[:20]
    } == set()


def test_interface_and_floors(small):
    actions = ["search[shirt]", "click[baa]", "click[small]", "click[nothing]", "click[< prev]", "buy"]
    assert check_env(small.make(3), small.tasks("train")[:3], actions, small.max_turns) <= 15
    tests = small.tasks("unseen")[:150]
    success = {b.name: sum(bool(e[-1].success) for e in record(small, tests, b)) / 150 for b in (EXPERT, RANDOM)}
    assert success["expert"] >= 0.98 and success["random"] < 0.05
    batch = small.make(1)
    batch.reset([0], [tests[0]])
    for _ in range(15):
        (result,) = batch.step([0], ["look"])
    assert result.truncated and result.success is False and result.reward == 0


def test_full_size_needs_the_features_page():
    env = make_environment("webshop", EnvironmentConfig(name="webshop", size="full"))
    episodes = record(env, env.tasks("unseen")[:60])
    won = [episode for episode in episodes if episode[-1].success]
    assert len(won) >= 54 and all(any(e.action == "click[features]" for e in episode) for episode in won)


def test_rules_never_accuse_reality(small, rows):
    for row in rows:
        assert small.verify(row.state, row.action, row.next_state, row.reward, row.terminated) == []
        assert small.mapper.merge(row.state, small.mapper.diff(row.state, row.next_state)) == row.next_state
    full = make_environment("webshop", EnvironmentConfig(name="webshop", size="full", num_train_worlds=20))
    for row in record_offline(full, full.tasks("train")[:20]):
        assert full.verify(row.state, row.action, row.next_state, row.reward, row.terminated) == []
    kinds = Counter(small.determined(row) for row in rows)
    assert kinds[True] > 0.3 * len(rows)


def test_only_generated_requests_are_read_as_wishes():
    for size in ("small", "full"):
        assert all(read_wish(short_task(task.instruction)) for task in shop_tasks("unseen", size)[:50])
    for text in (
        "i am looking for a black dress",
        "i need a s20 tv sound bar and a wireless speaker",
        "slim, tall shirt",
    ):
        assert read_wish(short_task(f"{text}, and price lower than 40.00 dollars")) is None


def test_determined_steps_are_determined(small, rows):
    """Two real transitions with the same state and action agree wherever the rules say that nothing is open."""
    seen = {}
    for row in (row for row in rows if small.determined(row)):
        outcome = row.next_state, row.reward, row.terminated
        assert seen.setdefault((row.state, row.action), outcome) == outcome
    assert all(row.reward == 0 or row.terminated for row in rows)


def test_rules_find_what_is_wrong(small, rows):
    wrong, rng = Counter(), random.Random(0)
    for row in rng.sample(rows, 400):
        other = rng.choice(rows)
        for name, changed in {
            "reward": replace(row, reward=0.0 if row.reward else 1.0),
            "verdict": replace(row, next_state=apply_change(row.state, f"fail {row.action}")),
            "page": replace(row, next_state=other.next_state),
        }.items():
            if changed != row:
                found = small.verify(row.state, row.action, changed.next_state, changed.reward, changed.terminated)
                wrong[name] += bool(found)
                wrong[f"all {name}"] += 1
    assert wrong["reward"] == wrong["all reward"] and wrong["verdict"] == wrong["all verdict"]
    assert wrong["page"] > 0.95 * wrong["all page"]


def test_a_small_tokenizer_loses_nothing(small, rows):
    tokenizer = train_tokenizer(environment_texts(rows, small))
    for row in rows[::3]:
        written = tokenizer.decode(tokenizer(render_target(row, small.mapper))["input_ids"])
        _, after, reward, end = parse_target(written, row.state, row.action, small.mapper)
        assert (after, end) == (row.next_state, row.terminated) and reward == pytest.approx(row.reward, abs=0.006)
        spelt = tokenizer.decode(tokenizer(row.action)["input_ids"])  # 'click[<prev]' is understood too
        assert small.mapper.silent(row.state, spelt) == small.mapper.silent(row.state, row.action)


def test_state_lists_every_click(small):
    batch, rng = small.make(1), random.Random(1)
    for task in small.tasks("valid")[:40]:
        (result,) = batch.reset([0], [task])
        while not result.done:
            assert result.admissible_actions == small.mapper.admissible_actions(result.state)
            (result,) = batch.step([0], [rng.choice(result.admissible_actions)])
            assert result.info["action_error"] is None and read_state(result.state).last == "ok"


def test_variations_can_be_played(small):
    task = small.tasks("train")[3]
    texts = small.vary(task, 3, 1)
    made = [replace(task, instruction=text, source="generated") for text in [*texts, "buy me a car"]]
    checked = small.feasible(made)
    assert len(texts) == 3 and checked[3] is None and all(checked[:3])
    assert all(episode[-1].success for episode in record(small, checked[:3]))
    with pytest.raises(DataError, match="no goal of shop"):
        goal_of(made[3])


def test_a_generated_task_dreams_of_its_own_request(small):
    """The state says an instruction in fewer words, so that no replacement of words could find it."""
    (task,) = dreamable(small, small.tasks("train")[3:4])
    made = [variation(task, text, f"new {i}") for i, text in enumerate(small.vary(task, 3, 1))]
    checked = small.feasible(made)
    assert [t.initial_state for t in checked] == [t.initial_state for t in dreamable(small, checked)]
    assert len({t.initial_state for t in [task, *checked]}) == 4


def test_wrong_names():
    with pytest.raises(ConfigError, match="split"):
        shop_tasks("test")
    with pytest.raises(ConfigError, match="size"):
        shop_tasks("train", "huge")
    for text in (
        "",
        "task: x",
        "page: item",
        "task: x\npage: cellar\nlast: ok",
        "task: x\nresults 1 of 1 = baa\nlast: ok",
    ):
        with pytest.raises(ValueError, match="webshop"):
            read_state(text + "\nnonsense" if text == "task: x" else text)
    with pytest.raises(ValueError, match="webshop change"):
        apply_change("task: x\npage: search\nlast: ok", "page: moon")
    with pytest.raises(ValueError, match="query"):  # each line is right, but results without a query are no state
        apply_change("task: x\npage: search\nlast: ok", "page: results\nresults 1 of 1 = nothing")
