"""WebShop: official files, search, reward, pages, human sessions, and what bad input is answered."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.environments.base_env import check_env, make_environment
from dreamgym.environments.offline import EXPERT, RANDOM, record
from dreamgym.environments.webshop import build, oracle_action
from dreamgym.environments.webshop_pages import ShopEngine, indexed_text, open_shop
from dreamgym.environments.webshop_products import Product, exact_price, read_shop
from dreamgym.environments.webshop_reward import plain_nouns, purchase_reward, similarity, type_reward
from dreamgym.environments.webshop_search import Bm25Index, stored_length, terms
from dreamgym.environments.webshop_sessions import recomputed_parts, replay_session


@pytest.fixture(scope="module")
def files(test_data):
    folder = test_data / "webshop"
    if not folder.is_dir():
        pytest.skip("no WebShop files")
    return read_shop(folder)


@pytest.fixture(scope="module")
def shop(files):
    return open_shop(files.products)


def test_official_counts(files):
    assert (len(files.products), len(files.goals), files.kind) == (1000, 6910, "synthetic")
    assert len({goal.asin for goal in files.goals}) == 415
    assert all(exact_price(p) <= 1e6 and 1 <= len(p.price) <= 2 for p in files.products)
    assert files.goals[0] == read_shop(files.where).goals[0]  # the same order and limits in every process


def test_oracle_buys_what_was_asked_for(shop, files):
    rewards, turns = [], []
    for goal in files.goals[:300]:
        engine, over, played = ShopEngine(shop, goal), False, 0
        engine.reset()
        while not over and played < 15:
            over, played = engine.step(oracle_action(engine))[2], played + 1
        rewards.append(engine.reward)
        turns.append(played)
    assert sum(reward == 1 for reward in rewards) == 300 and max(turns) < 15


def naive_scores(query, texts):
    """BM25 with Lucene's lengths, term by term, in float64."""
    documents = [terms(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for term in terms(query):
            with_term = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - with_term + 0.5) / (with_term + 0.5))
            f = document.count(term)
            total += idf * f / (f + 0.9 * (0.6 + 0.4 * stored_length(len(document)) / mean))
        scores.append(total)
    return scores


def test_search_is_the_formula(files):
    products = files.products[:60]
    texts = [indexed_text(product) for product in products]
    index = Bm25Index(texts, [product.asin for product in products])
    for goal in files.goals[:4]:
        scores = dict(zip(index.names, naive_scores(goal.instruction, texts), strict=True))
        found = index.search(goal.instruction, 60)
        assert set(found) == {name for name, score in scores.items() if score > 0}
        assert all(scores[a] >= scores[b] - 1e-5 for a, b in zip(found, found[1:]))


def test_search_against_lucene(root):
    """The ten best of 195 queries over 487 generated products, as Anserini 0.22.1 (Lucene 9.5) ranks them."""
    recorded = json.loads((Path(root) / "tests" / "data" / "webshop_lucene.json").read_text())
    from dreamgym.environments.webshop_catalogue import make_catalogue

    texts, names = [], []
    for seed in recorded["shops"]:
        for product in make_catalogue(seed, "full"):
            texts.append(indexed_text(product))
            names.append(f"{seed}-{product.asin}")
    index = Bm25Index(texts, names)
    same = [len(set(index.search(query, 10)) & set(top)) / len(top) for query, top in recorded["queries"].items()]
    assert len(same) >= 190 and sum(same) / len(same) > 0.99


def test_similarity_is_thefuzz(files):
    fuzz = pytest.importorskip("thefuzz.fuzz")
    attributes = sorted({attribute for product in files.products for attribute in product.attributes})
    values = sorted({v for product in files.products for vs in product.options.values() for v in vs})
    pairs = [(a, b) for a in attributes[::7] for b in attributes[::5]] + [
        (a, b) for a in values[::40] for b in values[::40]
    ]
    assert len(pairs) > 1000 and all(similarity(a, b) == fuzz.token_set_ratio(a, b) for a, b in pairs)


def test_type_reward_of_real_products(files):
    """The same product is of its own type; a random other one is mostly not."""
    own = [type_reward(files.products[i], goal)["r_type"] for i, goal in _own_goals(files)]
    assert set(own) == {1.0}
    other = Counter(type_reward(files.products[i - 500], goal)["r_type"] for i, goal in _own_goals(files))
    assert other[1.0] < 0.2 * sum(other.values())


def _own_goals(files):
    where = {product.asin: i for i, product in enumerate(files.products)}
    first = {goal.asin: goal for goal in files.goals}
    return [(where[asin], goal) for asin, goal in first.items()]


def test_reward_counts_each_part():
    product = Product(
        "B1",
        "Slim Shirt",
        (30.0,),
        "shirts",
        "A › B › C",
        {"color": ("dark navy", "red")},
        ("slim fit",),
        "",
        ("machine wash",),
    )
    from dreamgym.environments.webshop_products import ShopGoal

    goal = ShopGoal("B1", "", ("slim fit", "machine wash"), ("navy", "x"), 30.0, "Slim Shirt", "shirts", "A › B › C")
    reward, parts = purchase_reward(product, goal, 30.0, {"color": "dark navy"}, plain_nouns)
    # 'dark' comes before 'navy' in WebShop's list of colours, so 'dark navy' is 'dark' and no match
    assert reward == pytest.approx(3 / 5) and parts["r_option"] == 0
    assert purchase_reward(product, goal, 30.01, {"color": "navy"}, plain_nouns)[0] == pytest.approx(3 / 5)
    assert purchase_reward(product, goal, 30.0, {"size": "NAVY"}, plain_nouns)[0] == pytest.approx(3 / 5)


def test_nine_human_sessions_are_replayed(test_data):
    folder = test_data / "webshop" / "human_trajs_agentgym"
    if not folder.is_dir():
        pytest.skip("no WebShop sessions")
    parts, steps = Counter(), 0
    for path in sorted(folder.glob("*.jsonl")):
        pages = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = replay_session(pages, path.stem)
        steps += len(rows)
        assert rows[-1].terminated and rows[-1].reward == pages[-1]["reward"]
        assert all(a.next_state == b.state for a, b in zip(rows, rows[1:]))
        for name, (logged, ours) in recomputed_parts(pages[-1]).items():
            parts[name] += abs(logged - ours) < 1e-9
    assert steps == 51 and parts == {"r_type": 9, "r_price": 9, "r_option": 6, "reward": 9}
    broken = [pages[0], *pages[2:]]  # the page of results is missing
    with pytest.raises(ValueError):
        replay_session(broken, "broken")


def test_official_environment(files):
    env = make_environment("webshop", EnvironmentConfig(name="webshop", data_dir=files.where))
    assert (
        env.name == "webshop" and env.info["products"] == 1000 and env.info["nouns"] in ("stand-in", "en_core_web_sm")
    )
    assert [len(env.tasks(split)) for split in ("unseen", "valid", "train", "seen")] == [500, 1000, 4910, 500]
    check_env(env.make(3), env.tasks("unseen")[:3], ["search[shirt]", "click[next >]", "click[no]"], env.max_turns)
    for behaviour, least, most in ((EXPERT, 1.0, 1.0), (RANDOM, 0.0, 0.05)):
        episodes = record(env, env.tasks("unseen")[:40], behaviour)
        success = sum(bool(episode[-1].success) for episode in episodes) / 40
        assert least <= success <= most
        for row in (row for episode in episodes for row in episode):
            assert env.mapper.merge(row.state, env.mapper.diff(row.state, row.next_state)) == row.next_state
            assert env.verify(row.state, row.action, row.next_state, row.reward, row.terminated) == []


def test_raw_observations_too(files):
    env = build(EnvironmentConfig(name="webshop", data_dir=files.where, mapper=False))
    batch = env.make(1)
    (first,) = batch.reset([0], [env.tasks("unseen")[0]])
    (after,) = batch.step([0], ["search[shoes]"])
    assert first.observation.startswith("WebShop [SEP] Instruction: [SEP] ") and env.annotate is None
    assert re.search(
        r"Back to Search \[SEP\] Page 1 \(Total results: \d+\) \[SEP\] Next > \[SEP\] B", after.observation
    )


# ---- bad input


def test_unknown_products_and_options(shop, files):
    with pytest.raises(DataError, match="'B000000000' is not among the 1000"):
        shop.product("B000000000")
    engine = ShopEngine(shop, files.goals[0])
    before = engine.reset()
    for action in ("click[B000000000]", "click[buy now]", "search[]", "buy", "click[", "", "CLICK[buy now] now"):
        page, reward, over, problem = engine.step(action)
        assert (page, reward, over) == (before, 0.0, False) and problem
    engine.step("search[zzzzqqq]")
    assert engine.visit.found == [] and "Total results: 0" in engine.step("click[next >]")[0]
    engine.step(f"search[{files.goals[0].name}]")
    engine.step(f"click[{files.goals[0].asin}]")
    assert engine.visit.page == "item" and engine.step("click[a colour that nobody makes]")[3]


@pytest.mark.parametrize(
    "content", ["[{", "{}", "[3]", '[{"asin": "B1"}]', '[{"asin": "B1", "name": "x", "pricing": "a$b"}]']
)
def test_corrupt_product_files(tmp_path, content):
    (tmp_path / "items_shuffle_1000.json").write_text(content)
    (tmp_path / "items_ins_v2_1000.json").write_text("{}")
    with pytest.raises(DataError, match="items_shuffle_1000.json"):
        read_shop(tmp_path)


def test_missing_and_broken_files(tmp_path, files):
    with pytest.raises(DataError, match=r"items_shuffle\*.json\* and no items_ins_v2"):
        build(EnvironmentConfig(name="webshop", data_dir=str(tmp_path)))
    packed = next(Path(files.where).glob("products*.xz")).read_bytes()
    (tmp_path / "products_1000.json.xz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "items_ins_v2_1000.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        read_shop(tmp_path)
    (tmp_path / "products_1000.json.xz").write_bytes(packed)
    (tmp_path / "items_ins_v2_1000.json").write_text(json.dumps({files.products[0].asin: {"instruction": "x"}}))
    with pytest.raises(DataError, match="an instruction is malformed"):
        read_shop(tmp_path)


def test_a_stray_task_ends_alone(files):
    env = build(EnvironmentConfig(name="webshop", data_dir=files.where))
    stray, good = env.make(2).reset([0, 1], [Task("webshop-0", "a car"), env.tasks("unseen")[0]])
    assert "none of the 6910 official goals" in stray.aborted and good.aborted is None
    with pytest.raises(ConfigError, match="split"):
        env.tasks("test")
