"""Steps per CPU-second of shops, the oracle on official goals, floors of generated shops, and search beside Lucene's.

    python tests/benchmarks/bench_webshop.py [--data FOLDER] [--seconds 3] [--run FILE --topics FILE]

`--data` is a folder of WebShop's files. `--run` is a run of Anserini over their products in TREC's format, `--topics` its
queries, one 'number<TAB>text' a line. With pyserini 0.22.1's jar and Java:

    java -cp anserini-0.22.1-fatjar.jar io.anserini.index.IndexCollection -collection JsonCollection -input DOCS \\
        -index INDEX -generator DefaultLuceneDocumentGenerator -threads 1
    java -cp anserini-0.22.1-fatjar.jar io.anserini.search.SearchCollection -index INDEX -topics FILE \\
        -topicreader TsvInt -output RUN -bm25 -hits 50

where DOCS holds one JSON object a line, 'id' and 'contents' (`--docs FILE` writes it). Exits with 1 below 2,000 steps per
CPU-second.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict

from dreamgym.core.config import EnvironmentConfig
from dreamgym.environments.base_env import Environment
from dreamgym.environments.offline import EXPERT, RANDOM, Behaviour, record
from dreamgym.environments.webshop import build, oracle_action
from dreamgym.environments.webshop_pages import ShopEngine, indexed_text, open_shop
from dreamgym.environments.webshop_products import ShopFiles, read_shop
from dreamgym.environments.webshop_search import Bm25Index

TARGET = 2_000


def steps_per_second(env: Environment, seconds: float) -> float:
    """Random admissible actions in 16 visits at once: pages, states, lists of actions; resets count."""
    tasks, batch, rng = env.tasks("train")[:64], env.make(16), random.Random(0)
    batch.reset(range(16), tasks[:16])  # shops of the first tasks are made
    results = batch.reset(range(16), tasks[:16])
    start, steps = time.process_time(), 0
    while time.process_time() - start < seconds:
        results = batch.step(range(16), [rng.choice(result.admissible_actions) for result in results])
        steps += 16
        over = [slot for slot, result in enumerate(results) if result.done]
        for slot, result in zip(over, batch.reset(over, [rng.choice(tasks) for _ in over]) if over else []):
            results[slot] = result
    return steps / (time.process_time() - start)


def oracle(files: ShopFiles) -> str:
    """Every official goal, bought by who knows its product."""
    shop, rewards, turns = open_shop(files.products), [], 0
    start = time.process_time()
    for goal in files.goals:
        engine, over, played = ShopEngine(shop, goal), False, 0
        engine.reset()
        while not over and played < 15:
            over, played = engine.step(oracle_action(engine))[2], played + 1
        rewards.append(engine.reward)
        turns += played
    speed = turns / (time.process_time() - start)
    won = sum(reward == 1 for reward in rewards)
    mean = sum(rewards) / len(rewards)
    return f"mean reward {mean:.4f}, success {won}/{len(rewards)}, {turns / len(rewards):.2f} turns, {speed:,.0f} steps/CPU-s"


def agent_line(env: Environment, behaviour: Behaviour, n: int = 400) -> str:
    """Success and mean reward of a recorded behaviour on unseen tasks."""
    episodes = record(env, env.tasks("unseen")[:n], behaviour)
    won, reward = sum(bool(e[-1].success) for e in episodes), sum(e[-1].reward for e in episodes)
    turns = sum(map(len, episodes)) / len(episodes)
    return f"success {won}/{len(episodes)}, mean reward {reward / len(episodes):.3f}, {turns:.1f} turns"


def beside_lucene(index: Bm25Index, run: str, topics: str) -> str:
    """Overlap of the ten best with a run file."""
    best: dict[str, list[str]] = defaultdict(list)
    with open(run, encoding="utf-8") as lines:
        for line in lines:
            number, _, name, *_ = line.split()
            best[number].append(name)
    with open(topics, encoding="utf-8") as lines:
        queries = dict(line.rstrip("\n").split("\t", 1) for line in lines)
    overlap = same = first = 0.0
    for number, query in queries.items():
        ours, theirs = index.search(query, 10), best[number][:10]
        overlap += len(set(ours) & set(theirs)) / max(len(theirs), 1)
        same, first = same + (ours == theirs), first + (ours[:1] == theirs[:1])
    n = len(queries)
    return f"n={n}: overlap of ten {overlap / n:.4f}, same order {same / n:.3f}, same first {first / n:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--docs")
    parser.add_argument("--run")
    parser.add_argument("--topics")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    speeds = []
    for size in ("small", "full"):
        env = build(EnvironmentConfig(name="webshop", size=size))
        speeds.append(steps_per_second(env, args.seconds))
        print(f"webshop-generated, {size}: {speeds[-1]:,.0f} steps per CPU-second")
        for behaviour in (EXPERT, RANDOM):
            print(f"webshop-generated, {size}, {behaviour.name}: {agent_line(env, behaviour)}")
    if args.data:
        files = read_shop(args.data)
        print(f"official files: {len(files.products):,} products, {len(files.goals):,} {files.kind} goals")
        official = build(EnvironmentConfig(name="webshop", data_dir=args.data))
        speeds.append(steps_per_second(official, args.seconds))
        print(f"webshop: {speeds[-1]:,.0f} steps per CPU-second; nouns by {official.info['nouns']}")
        print(f"webshop, oracle: {oracle(files)}")
        print(f"webshop, random: {agent_line(official, RANDOM)}")
        documents = {product.asin: indexed_text(product) for product in files.products}
        if args.docs:
            with open(args.docs, "w", encoding="utf-8") as out:
                out.writelines(json.dumps({"id": k, "contents": text}) + "\n" for k, text in documents.items())
        if args.run and args.topics:
            index = Bm25Index(list(documents.values()), list(documents))
            print(f"search beside Lucene, {beside_lucene(index, args.run, args.topics)}")
    return 0 if min(speeds) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
