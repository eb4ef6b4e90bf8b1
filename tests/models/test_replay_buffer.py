"""The replay buffer: admission, exact retrieval, capacity, stepping back, files, and a killed writer."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience, to_row
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.models import retrieval
from dreamgym.models.encoders import HashingEncoder
from dreamgym.models.replay_buffer import (
    EVICTION,
    ExperienceReplayBuffer,
    RetrievalQuery,
    content_key,
    new_words,
    read_rows,
    weighted_sample,
)

WORDS = "mug pen book drawer desk shelf open closed 1 2 3 empty hold".split()


def random_row(rng: random.Random, **fields) -> Experience:
    """A row of a small random world, with many equal actions and some equal states."""
    state, after = (" ".join(rng.choices(WORDS, k=rng.choice([3, 8]))) for _ in range(2))
    action = f"{rng.choice(['open', 'take'])} {rng.choice(WORDS[:5])}"
    defaults = {
        "env": rng.choice(["a", "b"]),
        "world_id": f"w{rng.randrange(5)}",
        "episode_id": f"e{rng.randrange(12)}",
    }
    defaults |= {"split": rng.choice(["train", "seen"]), "source": rng.choice(["real", "synthetic"])}
    defaults |= {"success": rng.choice([True, False, None]), "task_type": rng.choice(["x", "y"])}
    return Experience(state, action, 0.0, after, False, **(defaults | fields))


def make(capacity: int = 1000, path=None, eviction: str = "fifo", **options) -> ExperienceReplayBuffer:
    config = BufferConfig(capacity=capacity, top_k=3, eviction=eviction)
    return ExperienceReplayBuffer(config, path, encoder=HashingEncoder(64), dedup=False, **options)


def brute_force(buffer, query, k, weight=0.5, same_world=True, same_action=False, informative=False, **masks):
    """The definition of retrieval, one candidate at a time."""

    def cosine(a, b):
        a, b = buffer.encoder.encode([a, b])
        length = np.sqrt(np.float32(a @ a)) * np.float32(1)
        return a @ b / (np.sqrt(b @ b) or np.float32(1)) / (length or np.float32(1))

    ranked = []
    for id_, e in read_rows(buffer.db, "evicted_at IS NULL"):
        wrong_world = same_world and e.world_id != query.world_id
        if wrong_world or (same_action and e.action != query.action) or (query.env and e.env != query.env):
            continue
        if (query.exclude_episode and e.episode_id == query.exclude_episode) or any(
            getattr(e, name) != value for name, value in masks.items()
        ):
            continue
        state, action = np.float32(cosine(query.state, e.state)), np.float32(cosine(query.action, e.action))
        score = np.float32(weight) * action + np.float32(1 - weight) * state
        steps = [np.rint((score + np.float32(1)) * np.float32(1e5)), np.rint((state + action + 2) * np.float32(1e5))]
        ranked.append((-steps[0], -new_words(e) if informative else 0, -steps[1], id_, e))
    return [row[-1] for row in sorted(ranked, key=lambda row: row[:-1])[:k]]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("same_world", [True, False])
@pytest.mark.parametrize(
    "how", [{}, {"same_action": True, "informative": True}, {"split": "train", "source": "real"}, {"success": False}]
)
def test_retrieval_equals_brute_force(weight, same_world, how):
    rng, buffer = random.Random(1), make(capacity=150)
    for _ in range(6):  # rows arrive, and old ones leave, between retrievals
        buffer.add_many(random_row(rng) for _ in range(40))
        rows = [random_row(rng) for _ in range(8)]
        queries = [RetrievalQuery(e.state, e.action, e.world_id, rng.choice(["", e.env]), e.episode_id) for e in rows]
        queries.append(RetrievalQuery("", "unknown thing", "nowhere"))
        found = buffer.retrieve(queries, 3, action_weight=weight, same_world=same_world, **how)
        for query, got in zip(queries, found):
            assert got == brute_force(buffer, query, 3, weight, same_world, **how)


def test_batches_order_and_index_age_do_not_matter(tmp_path):
    rng, path = random.Random(2), tmp_path / "experience.db"
    rows = [random_row(rng) for _ in range(3000)]
    buffer = make(2000, path)
    buffer.add_many(rows[:10])
    queries = [RetrievalQuery(e.state, e.action, e.world_id) for e in rows[:40]]
    buffer.retrieve(queries)  # an index that grows from ten rows
    for start in range(10, 3000, 130):
        buffer.add_many(rows[start : start + 130])
        buffer.retrieve(queries[:1])
    for same_world in (True, False):
        together = buffer.retrieve(queries, same_world=same_world)
        assert together == [buffer.retrieve([q], same_world=same_world)[0] for q in queries]
        assert together == buffer.retrieve(queries[::-1], same_world=same_world)[::-1]
        assert together == make(2000, path).retrieve(queries, same_world=same_world)  # built anew


@pytest.mark.parametrize("tile", [40, 300])
def test_tiles_change_nothing(tile, monkeypatch):
    """Candidates in parts of a few rows each, tails, masks and ties included: the same rows as all at once."""
    rng, buffer = random.Random(4), make(3000)
    buffer.add_many(random_row(rng, world_id=f"w{rng.randrange(3)}") for _ in range(1500))
    rows = [random_row(rng, world_id=f"w{rng.randrange(3)}") for _ in range(30)]
    queries = [RetrievalQuery(e.state, e.action, e.world_id, exclude_episode=e.episode_id) for e in rows]
    buffer.retrieve(queries[:1])
    buffer.add_many(rows)  # the tail of the index
    ways = [{"action_weight": w, "same_world": same} for w in (0.0, 0.5, 1.0) for same in (True, False)]
    ways += [{"same_world": False, "success": True}, {"same_world": False, "same_action": True, "informative": True}]
    whole = [buffer.retrieve(queries, 5, **how) for how in ways]
    monkeypatch.setattr(retrieval, "TILE", tile)
    assert [buffer.retrieve(queries, 5, **how) for how in ways] == whole
    assert whole[2][:4] == [brute_force(buffer, query, 5) for query in queries[:4]]


def test_own_episode_never_comes_back():
    rng, buffer = random.Random(3), make()
    rows = [random_row(rng, world_id="w") for _ in range(200)]
    buffer.add_many(rows)
    queries = [RetrievalQuery(e.state, e.action, "w", exclude_episode=e.episode_id) for e in rows]
    for query, found in zip(queries, buffer.retrieve(queries, 200)):
        assert found and all(e.episode_id != query.exclude_episode for e in found)


def test_lookup_prefers_the_first_look_then_the_most_similar_state():
    def row(state, after, **fields):
        return Experience(state, "open drawer 1", 0.0, after, False, world_id="home", **fields)

    again = row("at drawer 1 | drawer 1: pen 1", "at drawer 1 | drawer 1: pen 1")
    first = row("at drawer 1 | drawer 1: ?", "at drawer 1 | drawer 1: pen 1 book 2")
    closer = replace(
        first, state="at drawer 1 | hold mug 1 | drawer 1: ?", next_state=first.next_state + " | hold mug 1"
    )
    other_home, other_action = replace(first, world_id="elsewhere"), replace(first, action="open drawer 2")
    buffer = ExperienceReplayBuffer(BufferConfig())
    buffer.add_many([again, other_home, other_action, first, closer])
    query = RetrievalQuery("at drawer 1 | hold mug 1 | drawer 1: ?", "open drawer 1", "home")
    assert buffer.lookup([query], k=5) == [[closer, first, again]]
    assert buffer.retrieve([query], 1, action_weight=1.0) == [[closer]]  # the same action, the most similar state
    assert buffer.lookup([replace(query, action="open shelf 9")]) == [[]]


def test_admission_counts_what_it_refuses():
    config = BufferConfig(quality_threshold=0.6)
    buffer = ExperienceReplayBuffer(config)
    row = Experience("s", "a", 0.0, "t", False)
    assert buffer.add_trajectory([row, replace(row, policy="expert"), replace(row, next_state="u")]) == 2
    assert not buffer.add_experience(row)
    for bad in (
        replace(row, valid=False),
        replace(row, error="no reward"),
        replace(row, action=""),
        replace(row, reward=float("nan")),
        replace(row, state="torn \udce4 text"),
        replace(row, source="synthetic", reward=1.0),  # below the threshold
    ):
        assert not buffer.add_experience(bad)
    stats = buffer.stats()
    assert (len(buffer), stats["size"], stats["duplicate"], stats["quality"]) == (2, 2, 2, 6)
    assert ExperienceReplayBuffer(config, dedup=False).add_many([row, row]) == 2
    assert content_key(row) != content_key(replace(row, world_id="other"))


def test_oldest_rows_leave_and_come_back_on_rewind(tmp_path):
    rng = random.Random(4)
    iterations = [[random_row(rng, iteration=i) for _ in range(40)] for i in range(6)]
    buffer, straight = make(100, tmp_path / "a.db"), make(100, tmp_path / "b.db")
    for rows in iterations[:4]:
        straight.add_many(rows)
    for rows in iterations:
        buffer.add_many(rows)
    assert len(buffer) == 100 and buffer.stats()["tombstones"] == 140
    query = [RetrievalQuery(e.state, e.action, e.world_id) for e in iterations[5]]
    assert all(e.iteration >= 3 for found in buffer.retrieve(query, 10) for e in found)
    buffer.rewind(3)
    dump = [list(store.db.iterdump()) for store in (buffer, straight)]
    assert dump[0] == dump[1] and len(buffer) == len(straight) == 100
    assert buffer.retrieve(query) == straight.retrieve(query)
    for store in (buffer, straight):
        store.add_many(iterations[4])
    assert list(buffer.db.iterdump()) == list(straight.db.iterdump())
    assert buffer.purge(before=4) == 60
    buffer.rewind(3)
    with pytest.raises(DataError, match="purged"):
        buffer.rewind(2)


def doubtful(rng: random.Random, **fields) -> Experience:
    """A random row, or with even chance one of half quality."""
    row = random_row(rng, **fields)
    return replace(row, source="synthetic", reward=1.0) if rng.random() < 0.5 else row


def evicted_by_hand(live: list[tuple], n: int, eviction: str) -> list[tuple]:
    """What stays of (id, row, quality, repeats)."""
    orders = {"fifo": lambda r: r[0], "quality": lambda r: (r[2], r[0]), "novelty": lambda r: (-r[3], r[0])}
    gone = {row[0] for row in sorted(live, key=orders[eviction])[:n]}
    return [row for row in live if row[0] not in gone]


@pytest.mark.parametrize("eviction", EVICTION)
def test_eviction_follows_its_rule_and_retrieval_follows_eviction(eviction):
    rng, buffer, live = random.Random(11), make(100, eviction=eviction), []
    for iteration in range(8):
        rows = [doubtful(rng, iteration=iteration) for _ in range(45)]
        buffer.add_many(rows)
        for e in rows:
            place = (e.env, e.world_id, e.action)
            repeats = sum((o.env, o.world_id, o.action) == place for _, o, *_ in live)
            live.append((buffer.db.execute("SELECT max(id) FROM experiences").fetchone()[0] - 44 + rows.index(e), e))
            live[-1] += (0.5 if e.reward else 1.0, repeats)
        live = evicted_by_hand(live, max(0, len(live) - 100), eviction)
        assert list(read_rows(buffer.db, "evicted_at IS NULL")) == [row[:2] for row in live]
        queries = [RetrievalQuery(e.state, e.action, e.world_id) for e in rows[:6]]
        found = buffer.retrieve(queries, 3)  # the index lives through evictions
        assert found == [brute_force(buffer, query, 3) for query in queries]


@pytest.mark.parametrize("eviction", ["quality", "novelty"])
def test_every_eviction_can_step_back(eviction, tmp_path):
    rng = random.Random(12)
    iterations = [[doubtful(rng, iteration=i) for _ in range(40)] for i in range(6)]
    buffer, straight = (make(100, tmp_path / name, eviction) for name in ("a.db", "b.db"))
    for rows in iterations[:4]:
        straight.add_many(rows)
    for rows in iterations:
        buffer.add_many(rows)
    buffer.close()
    buffer = make(100, tmp_path / "a.db", eviction)
    buffer.rewind(3)
    for rows in ([], *iterations[4:]):
        for store in (buffer, straight):
            store.add_many(rows)
        assert list(buffer.db.iterdump()) == list(straight.db.iterdump()) and len(buffer) == 100


def test_eviction_can_change_between_runs(tmp_path):
    rng = random.Random(13)
    rows = [random_row(rng) for _ in range(300)]
    one, two = make(300, tmp_path / "a.db"), make(300, tmp_path / "b.db", "novelty")
    one.add_many(rows[:200])
    one.close()
    one = make(300, tmp_path / "a.db", "novelty")  # repeats are counted now
    for start in range(0, 200, 50):
        two.add_many(rows[start : start + 50])
    repeats = [store.db.execute("SELECT id, repeats FROM experiences").fetchall() for store in (one, two)]
    assert repeats[0] == repeats[1] and max(n for _, n in repeats[0]) > 3


def test_stores_of_the_first_version_are_brought_up_to_date(tmp_path):
    buffer, row = make(path=tmp_path / "a.db"), Experience("s", "a", 0.0, "t", False)
    dreamt = replace(row, source="synthetic", reward=1.0)
    buffer.add_many([row, dreamt, replace(dreamt, terminated=True)])
    for column in ("quality", "repeats"):
        buffer.db.execute(f"ALTER TABLE experiences DROP COLUMN {column}")
    buffer.db.execute("PRAGMA user_version = 1")
    buffer.close()
    buffer = make(path=tmp_path / "a.db")
    assert buffer.db.execute("SELECT quality FROM experiences ORDER BY id").fetchall() == [(1.0,), (0.5,), (1.0,)]
    assert buffer.add_experience(row) and len(buffer) == 4


def test_balanced_sample():
    rng, buffer = random.Random(5), make()
    buffer.add_many(random_row(rng, success=i % 50 == 0, source="real", task_type="x") for i in range(500))
    sample = buffer.sample_balanced(batch_size=16, seed=1)
    assert sum(e.success for e in sample) == 8 and sample == buffer.sample_balanced(16, seed=1)
    assert sum(e.success for e in buffer.sample_balanced(64, seed=1)) == 10  # all there are
    assert buffer.sample_balanced() != buffer.sample_balanced()
    assert len(buffer.sample_balanced(10_000, seed=0)) == 500 and make().sample_balanced() == []
    worlds = Counter(e.world_id for e in buffer.sample_balanced(50, seed=0, by=["world_id"]))
    assert set(worlds.values()) == {10} and len(worlds) == 5
    with pytest.raises(ConfigError, match="world_id"):
        buffer.sample_balanced(by=["world"])


def test_prioritized_sample():
    rng, buffer = random.Random(14), make()
    buffer.add_many(random_row(rng, turn=i % 4) for i in range(400))
    assert buffer.sample_prioritized(16, seed=1) == buffer.sample_prioritized(16, seed=1)
    assert len(buffer.sample_prioritized(500, seed=1)) == 400 and make().sample_prioritized() == []
    only = buffer.sample_prioritized(500, priority=lambda e: float(e.turn == 2), seed=1)
    assert len(only) == 100 and {e.turn for e in only} == {2}
    drawn = [new_words(e) for seed in range(30) for e in buffer.sample_prioritized(10, alpha=3.0, seed=seed)]
    plain = [new_words(e) for seed in range(30) for e in buffer.sample_prioritized(10, alpha=0.0, seed=seed)]
    assert np.mean(drawn) > np.mean(plain) + 1
    with pytest.raises(ConfigError, match="information"):
        buffer.sample_prioritized(priority="informatoin")
    with pytest.raises(ValueError, match="finite"):
        buffer.sample_prioritized(priority=lambda e: float("nan"))


def test_weighted_sample_has_its_probabilities():
    weights, rng, n = np.array([1.0, 2.0, 5.0]), np.random.default_rng(0), 20_000
    firsts, pairs = Counter(), Counter()
    for _ in range(n):
        one, two = weighted_sample(weights, 2, rng).tolist()
        firsts[one] += 1
        pairs[one, two] += 1
    for i in range(3):
        assert abs(firsts[i] / n - weights[i] / 8) < 0.012
    assert abs(pairs[0, 1] / n - 1 / 8 * 2 / 7) < 0.005


def test_jsonl_round_trip_and_bad_lines(tmp_path):
    rng, buffer, path = random.Random(6), make(), tmp_path / "rows.jsonl"
    rows = [random_row(rng, observation="Ü \u2028 \x00 '\";--") for _ in range(50)]
    buffer.add_many(rows)
    assert buffer.export_jsonl(path) == 50 and os.listdir(tmp_path) == ["rows.jsonl"]
    lines, good = path.read_bytes().splitlines(keepends=True), to_row(rows[0])
    broken = [b'{"state": "to', b"\xff\xfe", b"3", json.dumps(good | {"turn": "x"}).encode(), b"[" * 100_000]
    broken += [json.dumps(good | {"rewrad": 1}).encode(), json.dumps({"state": "s"}).encode()]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(b"".join(lines[:7]) + b"\n".join(broken) + b"\n\n" + b"".join(lines[7:]))
    other = make()
    report = other.import_jsonl(mixed)
    assert (report.read, report.added) == (50, 50)
    assert [number for number, _ in report.bad] == list(range(8, 15))
    assert "'turn'" in report.bad[3][1] and "rewrad" in report.bad[5][1]
    assert [e for _, e in read_rows(other.db, "1")] == rows
    with pytest.raises(DataError, match=r"mixed\.jsonl, line 8"):
        make().import_jsonl(mixed, strict=True)


def test_whole_numbers_in_files_are_the_rewards_that_come_back(tmp_path):
    """An export of imported rows adds nothing; numbers that no column holds make a row bad."""
    buffer, mine, back = ExperienceReplayBuffer(BufferConfig()), tmp_path / "mine.jsonl", tmp_path / "back.jsonl"
    step = {"state": "s", "action": "a", "next_state": "t", "terminated": True}
    mine.write_text("\n".join(json.dumps(step | {"reward": reward}) for reward in (0, 1, 10**400)))
    report = buffer.import_jsonl(mine)
    assert report.added == 2 and [number for number, _ in report.bad] == [3] and "'reward'" in report.bad[0][1]
    buffer.export_jsonl(back)
    assert buffer.import_jsonl(back).added == 0 and buffer.import_jsonl(mine).added == 0
    mine.write_text(json.dumps(step | {"turn": 2**63}))
    with pytest.raises(DataError, match="'turn'"):
        buffer.import_jsonl(mine, strict=True)


def test_parquet_and_datasets_round_trip(tmp_path):
    rng, buffer = random.Random(15), make()
    rows = [random_row(rng, observation="Ü \u2028 '\";--", success=[None, True, False][i % 3]) for i in range(60)]
    buffer.add_many(rows)
    assert buffer.export_parquet(tmp_path / "rows.parquet") == 60 and os.listdir(tmp_path) == ["rows.parquet"]
    dataset = buffer.to_dataset()
    assert dataset.num_rows == 60 and dataset.column_names == list(to_row(rows[0]))
    for report, other in ((lambda b: b.import_file(tmp_path / "rows.parquet"), make()),
                          (lambda b: b.import_dataset(dataset), make())):  # fmt: skip
        assert report(other).added == 60
        assert [e for _, e in read_rows(other.db, "1")] == rows
    torn = [to_row(e) for e in rows[:5]] + [{"state": None, "action": "a", "next_state": "t"}, {"turn": 1}]
    report = make().import_dataset(torn)
    assert (report.read, report.added) == (5, 5) and [number for number, _ in report.bad] == [6, 7]
    assert "'state'" in report.bad[0][1]
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="expected a parquet file"):
        make().import_file(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        make().import_file(tmp_path / "rows.csv")


def test_strict_import_adds_nothing(tmp_path):
    path, rng, buffer = tmp_path / "late.jsonl", random.Random(16), make(20_000)
    good = (json.dumps(to_row(random_row(rng))) + "\n").encode()
    path.write_bytes(good * 6000 + b"{torn")
    with pytest.raises(DataError, match="line 6001"):
        buffer.import_file(path, strict=True)
    assert len(buffer) == 0 and buffer.import_file(path).added == 6000


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to have a header " * 9)
    with pytest.raises(DataError, match="notes.txt"):
        make(path=tmp_path / "notes.txt")
    with pytest.raises(DataError, match="expected an experience database"):
        make(path=tmp_path / "notes.txt" / "a.db")
    make(path=tmp_path / "a.db").db.execute("PRAGMA user_version = 9")
    with pytest.raises(DataError, match="version 9"):
        make(path=tmp_path / "a.db")


def test_full_disk_names_path_and_free_bytes(tmp_path):
    rng, buffer = random.Random(7), make(path=tmp_path / "a.db")
    buffer.add_many(random_row(rng) for _ in range(100))
    pages = buffer.db.execute("PRAGMA page_count").fetchone()[0]
    buffer.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(DataError, match=r"a\.db: not written.*bytes free"):
        buffer.add_many(random_row(rng) for _ in range(1000))
    assert len(buffer) == 100 == buffer.stats()["size"] == len(make(path=tmp_path / "a.db"))
    buffer.db.execute("PRAGMA max_page_count = 100000")
    assert buffer.add_many(random_row(rng) for _ in range(1000)) == 1000


WRITER = """
import sys
from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
buffer = ExperienceReplayBuffer(BufferConfig(capacity=100_000), sys.argv[1])
for batch in range(10**6):
    rows = [Experience(f"state {batch} {i}", "look", 0.0, "next", False, iteration=batch) for i in range(16)]
    buffer.add_many(rows)
    sys.stdout.write(f"{len(buffer)}\\n")
    sys.stdout.flush()
"""


def test_kill_nine_loses_no_acknowledged_row(tmp_path):
    rng = random.Random(8)
    repeats = int(os.environ.get("DREAMGYM_KILLS", 3))
    for attempt in range(repeats):
        path = tmp_path / f"{attempt}.db"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "16\n"
        time.sleep(rng.uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        acknowledged = int(([16] + writer.stdout.read().split("\n")[:-1])[-1])
        writer.wait()
        buffer = ExperienceReplayBuffer(BufferConfig(), path)
        assert len(buffer) >= acknowledged and len(buffer) % 16 == 0
        assert buffer.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = [e.state for _, e in read_rows(buffer.db, "evicted_at IS NULL")]
        assert stored == [f"state {i // 16} {i % 16}" for i in range(len(buffer))]
        query = [RetrievalQuery(f"state 0 {i}", "look") for i in range(16)]
        before = buffer.retrieve(query, 4)
        buffer.close()
        assert before == ExperienceReplayBuffer(BufferConfig(), path).retrieve(query, 4)


def test_other_encoders_fit():
    class Lengths:
        dim = 2

        def encode(self, texts):
            return np.array([[len(text), 1] for text in texts], np.float32).reshape(-1, 2)

    buffer = ExperienceReplayBuffer(BufferConfig(top_k=1), encoder=Lengths())
    buffer.add_many(Experience("x" * n, "go", 0.0, "y", False) for n in (1, 5, 30))
    assert [len(found[0].state) for found in buffer.retrieve([RetrievalQuery("z" * 4, "go")])] == [5]
