"""WebShop: official files, search, reward, pages, human sessions, and what bad input is answered."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.data_structures import Experience, Task
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.environments.base_env import check_env, had_effect, make_environment
from dreamgym.environments.offline import EXPERT, RANDOM, record
from dreamgym.environments.webshop import build, oracle_action
from dreamgym.environments.webshop_catalogue import make_catalogue
from dreamgym.environments.webshop_pages import ShopEngine, indexed_text, open_shop
from dreamgym.environments.webshop_products import Product, ShopGoal, exact_price, read_shop
from dreamgym.environments.webshop_reward import matched_options, plain_nouns, purchase_reward, similarity, type_reward
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
    goal = ShopGoal("B1", "", ("slim fit", "machine wash"), ("navy", "x"), 30.0, "Slim Shirt", "shirts", "A › B › C")
    reward, parts = purchase_reward(product, goal, 30.0, {"color": "dark navy"}, plain_nouns)
    # 'dark' comes before 'navy' in WebShop's list of colours, so 'dark navy' is 'dark' and no match
    assert reward == pytest.approx(3 / 5) and parts["r_option"] == 0
    assert purchase_reward(product, goal, 30.01, {"color": "navy"}, plain_nouns)[0] == pytest.approx(3 / 5)
    assert purchase_reward(product, goal, 30.0, {"size": "NAVY"}, plain_nouns)[0] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    "wanted, chosen, matches",
    [  # the first five are WebShop's own
        (["grey", "XL", "pack of 12"], ["pack of 12", "grey", "XL"], 3),
        (["grey", "XL", "pack of 12"], ["pack of 12", "blue", "XL"], 2),
        (["cool powder snow", "XL", "pack of 12"], ["pack of 12", "powder snow", "XL"], 3),
        ([], ["goal 1", "goal 2"], 0),
        (["goal 1", "goal 2"], [], 0),
        (["blue"], ["navy blue", "light blue", "blue"], 1),  # each wish once
        (["10"], ["10 wide"], 1),  # sizes are phrases like all others
    ],
)
def test_options_that_count(wanted, chosen, matches):
    assert matched_options(wanted, {f"option {i}": value for i, value in enumerate(chosen)}) == matches


def test_a_wrong_option_that_the_title_names_is_wrong():
    texts = {"description": "Also in 7 and 9", "features": ("7 holes",)}
    shoe = Product("B1", "Loafers 7", (30.0,), "loafers", "A › B", {"size": ("7", "8")}, ("soft",), **texts)
    goal = ShopGoal("B1", "", ("soft",), ("8",), 40.0, shoe.title, shoe.query, shoe.category)
    reward, parts = purchase_reward(shoe, goal, 30.0, {"size": "7"})
    assert parts["r_option"] == 0 and reward == pytest.approx(2 / 3)
    assert purchase_reward(shoe, goal, 30.0, {"size": "8"})[0] == 1
    goal = ShopGoal("B1", "", ("soft",), (), 40.0, shoe.title, shoe.query, shoe.category)
    assert purchase_reward(shoe, goal, 30.0, {"size": "7"})[0] == 1  # never above


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


@pytest.fixture
def own_shop(tmp_path):
    """Four products in WebShop's files, with instructions made by rule and by people as asked for -> (folder, products)."""
    products = make_catalogue(1)[:4]

    def write(made, human):
        texts = {
            "description": "full_description",
            "category": "product_category",
            "title": "name",
            "price_tag": "pricing",
        }
        rows = [{theirs: getattr(p, ours) for ours, theirs in texts.items()} for p in products]
        more = [{"asin": p.asin, "query": p.query, "options": dict(p.options)} for p in products]
        (tmp_path / "items_shuffle_4.json").write_text(json.dumps([a | b for a, b in zip(rows, more, strict=True)]))
        ins = {p.asin: {"attributes": list(p.attributes)} for p in products}
        for p in products[:made]:
            ins[p.asin] |= {"instruction": f"Find me {p.query}", "instruction_attributes": [p.attributes[0]]}
        (tmp_path / "items_ins_v2_4.json").write_text(json.dumps(ins))
        asked = {}
        for asin, p in [*((p.asin, p) for p in products), *((f"X{i}", products[0]) for i in range(9))]:
            said = {"instruction": f"i am looking for a {p.attributes[0]} {p.query}."}
            asked[asin] = [said | {"instruction_attributes": [p.attributes[0]], "instruction_options": []}]
        kept = {asin: asked[asin] for asin in human}
        (tmp_path / "items_human_ins.json").write_text(json.dumps(kept))
        return str(tmp_path), products

    return write


def test_few_human_goals_do_not_replace_the_synthetic_ones(own_shop, caplog, monkeypatch):
    """setup.sh always leaves people's instructions, of which few are for the 1,000 products."""
    foreign = [f"X{i}" for i in range(9)]
    folder, products = own_shop(4, foreign)
    found = read_shop(folder)
    assert found.kind == "synthetic" and len(found.goals) > 4 and "0 human goals" in caplog.text
    folder, _ = own_shop(4, [*foreign, products[0].asin])
    assert read_shop(folder).kind == "synthetic" and "1 human goals" in caplog.text
    assert f"{len(found.goals)} synthetic" in caplog.text
    monkeypatch.setattr("dreamgym.environments.webshop_products.ENOUGH", 1)
    assert [goal.asin for goal in read_shop(folder).goals] == [products[0].asin]


def test_a_split_without_goals_is_an_error(own_shop):
    folder, _ = own_shop(0, ["X0"])
    env = build(EnvironmentConfig(name="webshop", data_dir=folder))
    for split in ("unseen", "valid", "train", "seen"):
        with pytest.raises(DataError, match=f"0 goals leave none for split '{split}'"):
            env.tasks(split)
    folder, products = own_shop(0, [])
    folder, _ = own_shop(0, [p.asin for p in products[:3]])
    env = build(EnvironmentConfig(name="webshop", data_dir=folder))
    assert len(env.tasks("train")) == 3
    with pytest.raises(DataError, match="3 goals leave none for split 'unseen'"):
        env.tasks("unseen")


def test_the_expert_buys_what_people_ask_for(own_shop):
    """Their words are no generated wish: the oracle acts, and the rules accuse nobody."""
    folder, products = own_shop(0, [])
    folder, _ = own_shop(0, [p.asin for p in products])
    env = build(EnvironmentConfig(name="webshop", data_dir=folder))
    episodes = record(env, [env.tasks(split)[0] for split in ("unseen", "valid", "train", "seen")], EXPERT)
    assert env.info["instructions"] == "human" and all(episode[-1].success for episode in episodes)
    for row in (row for episode in episodes for row in episode):
        assert env.verify(row.state, row.action, row.next_state, row.reward, row.terminated) == []


@pytest.mark.parametrize("data", ["official", "generated"])
def test_raw_pages_tell_what_can_be_clicked(data, request):
    """Each text on each kind of page is clicked for real."""
    where = request.getfixturevalue("files").where if data == "official" else "generated"
    env = make_environment("webshop", EnvironmentConfig(name="webshop", data_dir=where, mapper=False))
    batch, task, seen = env.make(1), env.tasks("unseen")[3], set()

    def after(*actions):
        (result,) = batch.reset([0], [task])
        for action in actions:
            (result,) = batch.step([0], [action])
        return result

    after()
    goal = batch.engine(0).goal
    found = (f"search[{goal.name}]",)
    product = (*found, f"click[{goal.asin.lower()}]")
    for way in ((), found, (*found, "click[next >]"), product, (*product, "click[features]")):
        for text in dict.fromkeys([*after(*way).observation.split(" [SEP] "), "no such thing"]):
            before, action = after(*way), f"click[{' '.join(text.lower().split())}]"
            (result,) = batch.step([0], [action])
            works = had_effect(Experience(before.state, action, 0.0, result.state, result.done), env.mapper)
            assert works == (result.info["action_error"] is None), (action, before.observation)
            seen.add((batch.engine(0).visit.page, works))
    assert {("search", False), ("results", False), ("item", True), ("item", False), ("bought", True)} <= seen


def test_a_raw_page_that_nobody_can_read_has_no_clicks():
    env = build(EnvironmentConfig(name="webshop", mapper=False))
    for page in (
        "Back to Search",
        "Back to Search [SEP] Page one [SEP] x",
        "Back to Search [SEP] < Prev [SEP] hue [SEP] Buy Now",
    ):
        state = f"task: x\nWebShop\nsearch[x] = {page}"
        e = Experience(state, "click[hue]", 0.0, env.mapper.merge(state, f"click[hue] = {page}"), False)
        assert not had_effect(e, env.mapper)


def test_the_expert_plays_on_raw_pages():
    env = build(EnvironmentConfig(name="webshop", mapper=False))
    assert all(episode[-1].success for episode in record(env, env.tasks("unseen")[:4], EXPERT))


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
