"""Fidelity on real household steps, on planted errors, and on numbers worked by hand."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from dreamgym.core.config import BufferConfig, EnvironmentConfig, ReasoningModelConfig, load_config
from dreamgym.core.data_structures import Experience, Task, Trajectory, Turn
from dreamgym.core.llm import Reply
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.dream_env import DreamEnv
from dreamgym.environments.household_rules import expected_state, is_determined, judge, reasoning_trace, violations
from dreamgym.environments.household_text import parse_state
from dreamgym.environments.offline import EXPERT, RANDOM, Behaviour, record
from dreamgym.models.experience_sft import training_queries
from dreamgym.models.reasoning_model import ReasoningExperienceModel, render_target
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training import arms
from dreamgym.training.fidelity import (
    FidelityReport,
    beside_real,
    divergence,
    html_table,
    measure_fidelity,
    on_policy,
    plot_hazard_by_depth,
    reality_gap,
    wm2real,
)
from dreamgym.training.teacher_forced import (
    CopyNearest,
    Detection,
    calibration,
    changed_facts,
    chrf,
    copied,
    detect,
    facts_f1,
    score_predictions,
    teacher_forced,
    variety,
)


def determined(e):
    return is_determined(e.state, e.action)


FIRST = "task: put a mug in shelf.\nat: nowhere\nhold: nothing\nunseen: desk 1, shelf 1\nlast: ok"


@pytest.fixture(scope="module")
def env():
    built = make_environment("alfworld", EnvironmentConfig(data_dir="generated"))
    return replace(built, annotate=reasoning_trace, verify=violations)


@pytest.fixture(scope="module")
def real(env):
    """About 1,500 real steps: expert, noisy, random."""
    tasks, noisy = env.tasks("train"), Behaviour("noisy", 0.4)
    episodes = record(env, tasks[:40], EXPERT) + record(env, tasks[40:70], noisy) + record(env, tasks[:15], RANDOM)
    return [row for episode in episodes for row in episode]


class Oracle:
    """Answers with what really happened, except that some answers are replaced."""

    def __init__(self, rows, mapper, replaced=None):
        self.answers = [render_target(row, mapper) for row in rows]
        for i, text in (replaced or {}).items():
            self.answers[i] = text
        self.at = 0

    def complete(self, requests):
        self.at += len(requests)
        return [Reply(text) for text in self.answers[self.at - len(requests) : self.at]]


def oracle_model(env, rows, replaced=None):
    config = ReasoningModelConfig(history=0)
    return ReasoningExperienceModel(config, Oracle(rows, env.mapper, replaced), mapper=env.mapper)


def dream(env, states, actions, success=False, task=None, broken=(), aborted=None):
    """A trajectory through given states; a reward at the end where it succeeds."""
    turns = []
    for i, action in enumerate(actions):
        info = {"malformed": "no change is written"} if i in broken else {}
        reward = float(success and i == len(actions) - 1)
        turns.append(Turn([], [], [], reward, states[i], action, action, info=info))
    task = task or Task("t", "put a mug in shelf.")
    return Trajectory(turns, task, 0, "dream", 0, success, not success, success, aborted, final_state=states[-1])


def as_dream(episode, task=None):
    """A real episode dressed as a dream that predicted everything right."""
    states = [row.state for row in episode] + [episode[-1].next_state]
    task = task or Task(episode[0].task_id, episode[0].instruction)
    return dream(None, states, [row.action for row in episode], bool(episode[-1].reward), task)


# ---- recorded steps


def test_the_truth_scores_perfectly(env, real):
    scores = teacher_forced(oracle_model(env, real), real, violations, determined, batch=100)
    assert scores.n == len(real) > 1000 and scores.determined.n > 400
    assert scores.exact.value == scores.determined.value == scores.facts.value == 1
    assert scores.violating.value == scores.malformed.value == scores.false_alarms.value == 0
    assert scores.kinds == {}
    for detection in (scores.reward, scores.terminated, scores.works):
        assert detection.fp == detection.fn == 0 and detection.tp > 20 and detection.tn > 20
    assert scores.reward.tp == sum(row.reward > 0 for row in real)


def test_determined_steps_follow_from_the_rules(env, real):
    known = [row for row in real if determined(row)]
    assert len(known) > 0.3 * len(real)
    for row in known:
        before = parse_state(row.state)
        works = judge(before, row.action).ok
        after = (
            expected_state(before, row.action)[0].text() if works else env.mapper.merge(row.state, f"fail {row.action}")
        )
        assert after == row.next_state


def test_planted_errors_are_counted_one_by_one(env, real):
    wins = [i for i, row in enumerate(real) if row.reward][:7]
    fails = [i for i, row in enumerate(real) if "\nlast: fail" in row.next_state and determined(row)]
    broken = [i for i, row in enumerate(real) if not row.reward and determined(row) and i not in fails][:11]
    replaced = {i: "banana" for i in broken}
    replaced |= {i: render_target(replace(real[i], reward=0.0, terminated=False), env.mapper) for i in wins}
    replaced |= {i: "x; ok\nno change\nreward 0" for i in fails[:5]}
    scores = teacher_forced(oracle_model(env, real, replaced), real, violations, determined)
    n, perfect = len(real), teacher_forced(oracle_model(env, real), real, violations, determined)
    assert scores.malformed.value == 11 / n and scores.kinds["malformed"] == 11
    assert scores.reward == replace(perfect.reward, tp=perfect.reward.tp - 7, fn=7) == scores.terminated
    assert scores.kinds["missed reward"] == 7 and scores.kinds["accepted an impossible action"] == 5
    assert round(scores.exact.value * n) == n - 11 - 5
    assert scores.works.fp == 5 and scores.works.fn == 11  # nothing is accepted by a reply that cannot be read
    assert scores.determined.value < 1 and scores.facts.value < 1


def test_imagined_contents_are_no_violation_but_no_match_either(env, real):
    looks = [i for i, row in enumerate(real) if row.action.startswith("go to") and not determined(row)]
    i = next(i for i in looks if env.mapper.diff(real[i].state, real[i].next_state).endswith(": closed ?"))
    imagined = next(j for j in looks if ": nothing" in env.mapper.diff(real[j].state, real[j].next_state))
    place = real[imagined].action[6:]
    scores = score_predictions([replace(real[i])], [real[i]], env.mapper, violations, determined)
    assert scores.determined.n == 0 and math.isnan(scores.determined.value)
    guess = replace(real[imagined], next_state=env.mapper.merge(real[imagined].state, f"at: {place}\n{place}: fork 77"))
    scores = score_predictions([guess], [real[imagined]], env.mapper, None, determined)
    assert scores.exact.value == 0 and math.isnan(scores.violating.value)


def test_one_prediction_for_each_step(env, real):
    with pytest.raises(ValueError, match="2 predictions for 3 steps"):
        score_predictions(real[:2], real[:3], env.mapper)


def test_detection_against_a_loop():
    rng = random.Random(0)
    pairs = [(rng.random() < 0.3, rng.random() < 0.2) for _ in range(500)]
    found = detect((p for p, _ in pairs), (t for _, t in pairs))
    assert found.tp == sum(p and t for p, t in pairs) and found.tn == sum(not p and not t for p, t in pairs)
    assert found.tp + found.fp + found.fn + found.tn == 500
    assert found.precision.value == found.tp / sum(p for p, _ in pairs) and found.recall.n == sum(t for _, t in pairs)


def test_facts_f1_interval_covers():
    rng = np.random.default_rng(0)

    def sample(episodes):
        """Episodes of different skill: errors come together."""
        predicted, true, names = [], [], []
        for episode in range(episodes):
            skill = rng.beta(8, 2)
            for _ in range(rng.integers(3, 20)):
                facts = [("+", str(k)) for k in range(rng.integers(1, 4))]
                true.append(frozenset(facts))
                predicted.append(frozenset(f if rng.random() < skill else ("+", "x" + f[1]) for f in facts))
                names.append(str(episode))
        return facts_f1(predicted, true, names)

    hits = [sample(60) for _ in range(300)]
    assert 0.89 < np.mean([e.low <= 0.8 <= e.high for e in hits]) < 0.99


def test_a_fact_that_should_have_stayed_is_a_false_change(env, real):
    row = next(r for r in real if r.action.startswith("go to") and "\nlast: ok" in r.next_state and r.turn > 2)
    truth = changed_facts(env.mapper, row.state, row.next_state)
    vandal = env.mapper.merge(row.next_state, "hold: spoon 99")
    worse = changed_facts(env.mapper, row.state, vandal)
    assert truth < worse and facts_f1([worse], [truth], ["a"]).value < 1


# ---- the baseline


def test_copy_nearest_never_sees_the_own_episode(env, real):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    buffer.add_many(real)
    asked = []

    class Watched:
        def retrieve(self, queries, k, **how):
            found = buffer.retrieve(queries, k, **how)
            asked.extend(zip(queries, found, strict=True))
            return found

    scores = teacher_forced(CopyNearest(Watched(), env.mapper), real[:300], violations, determined)
    assert {query.exclude_episode for query, _ in asked} == {row.episode_id for row in real[:300]}
    assert all(row.episode_id != query.exclude_episode for query, rows in asked for row in rows)
    assert scores.n == 300 and 0 < scores.exact.value < 0.9 and scores.false_alarms.value == 0


def test_copy_nearest_prefers_the_same_world_and_falls_back(env, real):
    one = real[0]
    elsewhere = replace(one, world_id="far away", episode_id="other")
    buffer = ExperienceReplayBuffer(BufferConfig())
    buffer.add_many([elsewhere])
    assert teacher_forced(CopyNearest(buffer, env.mapper), [one]).exact.value == 1  # copied from another world
    empty = teacher_forced(CopyNearest(ExperienceReplayBuffer(BufferConfig()), env.mapper), [one])
    assert empty.malformed.value == 1 and empty.exact.value == 0


def test_a_change_that_does_not_fit_is_malformed_not_raised(env, real):
    pairs = random.Random(0).choices(range(len(real)), k=2000)
    queries = training_queries(real)
    copies = [copied(queries[i], real[j], env.mapper) for i, j in zip(pairs[::2], pairs[1::2], strict=True)]
    assert {c.valid for c in copies} == {True, False}
    assert all(c.error for c in copies if not c.valid)
    assert all(c.reward == 0 and not c.terminated for c in copies if not c.valid)


def test_the_baseline_can_be_dreamt_in(env, real):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    buffer.add_many(real)
    first = next(row for row in real if row.turn == 0)
    batch = DreamEnv(CopyNearest(buffer, env.mapper), 1, env.max_turns)
    batch.reset([0], [Task(first.task_id, first.instruction, world_id=first.world_id, initial_state=first.state)])
    (result,) = batch.step([0], [first.action])
    assert result.aborted is None and result.state


# ---- text and calibration


def test_chrf_is_that_of_sacrebleu():
    said = ["desk 1: -mug 1\nhold: mug 1", "fail", "at: shelf 1\nshelf 1: nothing"]
    true = ["hold: mug 1\ndesk 1: -mug 1", "fail", "at: shelf 1\nshelf 1: mug 2, pen 1"]
    assert math.isclose(100 * chrf(said, true), 72.91022966446661)  # sacrebleu.corpus_chrf(said, [true]), 2.6.0
    assert chrf(["x"], ["abc"]) == 0 and math.isnan(chrf(["", ""], ["", "a"]))


def test_variety_is_between_the_same_and_all_different():
    assert variety(["a b c"] * 50) == 2 / 100 and variety(["a b", "c d"]) == 1


def test_calibration_of_honest_and_of_sure_probabilities():
    rng = np.random.default_rng(0)
    p = rng.choice([0.05, 0.35, 0.65, 0.95], 20_000)
    y = rng.random(20_000) < p
    honest, sure = calibration(p, y), calibration(p > 0.5, y)
    assert honest.ece < 0.02 < 0.15 < sure.ece and sum(b.n for b in honest.bins) == honest.n == 20_000
    assert honest.brier < sure.brier and math.isclose(sure.brier, np.mean((p > 0.5) != y))
    assert calibration([1.0, 0.0], [True, False]).ece == 0


def test_calibration_asks_for_further_samples(env, real):
    model = oracle_model(env, real[:40])
    model.client.answers += [text for text in model.client.answers for _ in range(3)]
    scores = teacher_forced(model, real[:40], violations, determined, votes=3)
    assert {k: (c.ece, c.n) for k, c in scores.calibration.items()} == dict.fromkeys(
        ("reward", "terminated", "works"), (0, 40)
    )
    assert scores.chrf == 1 and scores.variety[0] == scores.variety[1] > 0


# ---- on-policy


def test_hazard_equals_counting(env, real):
    """Random dreams with random violations, counted by a plain loop."""
    rng, dreams, expected = random.Random(1), [], []
    for _ in range(50):
        n = rng.randint(1, 12)
        bad = [rng.random() < 0.15 for _ in range(n)]
        dreams.append(
            dream(env, [f"s{i}" for i in range(n + 1)], ["bad" if b else "good" for b in bad], rng.random() < 0.5)
        )
        expected.append((bad.index(True) + 1, True) if any(bad) else (n, False))
    seen = on_policy(dreams, lambda s, action, *rest: ["broke it"] if action == "bad" else [])
    assert seen.hazard.violations == sum(v for _, v in expected) == sum(seen.kinds.values()) == len(seen.first)
    assert seen.hazard.steps == sum(n for n, _ in expected) == sum(d.at_risk for d in seen.depths)
    assert sum(d.violations for d in seen.depths) == seen.hazard.violations
    for depth in seen.depths:
        assert depth.at_risk == sum(n > depth.turn for n, _ in expected)
    assert [v.step.turn + 1 for v in seen.first] == [n for n, v in expected if v]
    won = [bool(d.success) for d in dreams]
    clean = sum(w and not v for w, (_, v) in zip(won, expected, strict=True))
    assert seen.reward.tp == clean and seen.reward.fp == sum(won) - clean and seen.success.n == 50


def test_the_checker_is_not_asked_after_the_first_violation():
    asked = []

    def check(state, action, *rest):
        asked.append(state)
        return ["wrong"] if state == "s2" else []

    two = [dream(None, ["s0", "s1", "s2", "s3", "s4"], ["a"] * 4), dream(None, ["s0", "s1"], ["a"])]
    assert on_policy(two, check).hazard.steps == 4
    assert asked == ["s0", "s1", "s2", "s0"]


def test_real_episodes_are_dreams_without_violation(env, real):
    episodes = {}
    for row in real:
        episodes.setdefault(row.episode_id, []).append(row)
    seen = on_policy([as_dream(episode) for episode in episodes.values()], violations)
    assert seen.hazard.violations == 0 and seen.hazard.steps == len(real)
    assert seen.reward.fp == seen.reward.fn == 0 and 0 < seen.hazard.estimate.high < 0.01


def test_malformed_replies_count_although_the_state_is_possible():
    fine = [FIRST, FIRST.replace("last: ok", "last: fail open shelf 1")]
    dreams = [dream(None, fine, ["open shelf 1"], broken=[0]), dream(None, fine, ["open shelf 1"])]
    seen = on_policy(dreams, violations)
    assert seen.kinds == {"malformed": 1} and seen.malformed.value == 1 / 2


def test_missed_reward_is_a_false_negative():
    states = [FIRST, "won but not told"]
    dreams = [dream(None, states, ["a"]), dream(None, states, ["a"], True), dream(None, states, ["a"])]
    verdicts = iter([["missed reward"], [], []])
    assert on_policy(dreams, lambda *step: next(verdicts)).reward == Detection(tp=1, fp=0, fn=1, tn=1)


def test_aborted_and_empty_dreams_are_left_out():
    good = dream(None, ["a", "b"], ["x"])
    dreams = [good, good, dream(None, ["a", "b"], ["x"], aborted="server died"), dream(None, ["a"], [])]
    seen = on_policy(dreams, lambda *step: [])
    assert seen.hazard.dreams == 2 and seen.aborted == 1
    with pytest.raises(ValueError, match="two or more"):
        on_policy(dreams[1:], lambda *step: [])


def test_terminated_only_on_the_last_step():
    flags = []
    two = [dream(None, ["a", "b", "c"], ["x", "y"], True)] * 2
    on_policy(two, lambda s, a, n, reward, terminated: flags.append((reward, terminated)) or [])
    assert flags == [(0.0, False), (1.0, True)] * 2


# ---- against the real environment


def outcomes(values, source="dream"):
    return [
        Trajectory([], Task(name, ""), 0, source, 0, won is True, False, won, None if won is not None else "died")
        for name, won in values
    ]


def test_gap_is_the_paired_difference():
    rng = random.Random(2)
    names = [f"t{i}" for i in range(40)]
    dreamt = {n: rng.random() < 0.8 for n in names}
    happened = {n: rng.random() < 0.5 for n in names}
    gap = reality_gap(outcomes(dreamt.items()), outcomes(list(happened.items())[::-1], "real"))
    theirs = ttest_rel([float(dreamt[n]) for n in names], [float(happened[n]) for n in names]).confidence_interval(0.95)
    assert math.isclose(gap.gap.low, theirs.low) and math.isclose(gap.gap.high, theirs.high) and gap.gap.n == 40
    assert math.isclose(gap.gap.value, gap.dream.value - gap.real.value)


def test_gap_averages_repeats_and_drops_aborted():
    dreamt = outcomes([("a", True), ("a", False), ("b", True), ("c", True), ("c", None)])
    happened = outcomes([("a", False), ("b", True), ("c", None)])
    gap = reality_gap(dreamt, happened)
    assert gap.gap.n == 2 and gap.gap.value == 0.25  # a: 1/2 - 0, b: 1 - 1; c has no real outcome
    with pytest.raises(ValueError, match="one side only, such as 'c'"):
        reality_gap(dreamt, happened[:2])


def test_expert_actions_win_for_real_and_shortened_ones_do_not(env):
    tasks = env.tasks("seen")[:12]
    episodes = record(env, tasks, EXPERT)
    by_id = {task.id: task for task in tasks}
    dreams = [as_dream(episode, by_id[episode[0].task_id]) for episode in episodes]
    won = [d for d in dreams if d.success]
    assert len(won) >= 10
    replay = wm2real(dreams, env)
    assert replay.success.value == 1 and replay.success.n == len(won) and replay.aborted == 0
    assert replay.transitions == sum(len(d.turns) for d in won)
    cut = [replace(d, turns=d.turns[:-1]) for d in won]
    assert wm2real(cut, env).success.value == 0
    assert math.isnan(wm2real([replace(d, success=False) for d in won], env).success.value)
    rows = beside_real(won[0], env)
    assert all(row["agree"] and not row["violations"] for row in rows) and "reward 1" in rows[-1]["real"]
    with pytest.raises(ValueError, match="is generated"):
        wm2real([replace(won[0], task=replace(won[0].task, source="generated"))], env)


def test_an_evaluation_in_training_tells_honest_dreams_from_others(env, monkeypatch):
    """Half of the dreams claims its success one turn early: half of the wins is real, and as many rewards deserved."""
    tasks = env.tasks("seen")[:8]
    by_id = {task.id: task for task in tasks}
    dreams = [as_dream(e, by_id[e[0].task_id]) for e in record(env, tasks, EXPERT) if e[-1].reward][:6]
    early = [replace(d, turns=[*d.turns[:-2], replace(d.turns[-2], reward=1.0)]) for d in dreams[3:]]
    early = [replace(d, final_state=full.turns[-1].state) for d, full in zip(early, dreams[3:], strict=True)]
    config = load_config(None, "alfworld", "smoke", "training.gap_episodes=6")
    loop = SimpleNamespace(config=config, ready=SimpleNamespace(env=env), player=None, iteration=1, device="cpu")

    def half_won(policy, env, tasks, *_, **__):
        games = [SimpleNamespace(success=i < 3, aborted=None, turns=[None] * 5) for i in range(len(tasks))]
        return SimpleNamespace(trajectories=games)

    monkeypatch.setattr(arms, "evaluate_policy", half_won)
    rows = []
    for played in (dreams, dreams[:3] + early, [replace(d, success=False, terminated=False) for d in early]):
        rows.append({})
        arms.measure_dream(loop, rows[-1], played)
    honest, half, lost = ({k.removeprefix("dream/"): v for k, v in row.items()} for row in rows)
    assert honest["gap"] == 0.5 and honest["hazard"] == 0
    assert honest["wm2real"] == honest["reward_precision"] == honest["reward_recall"] == 1
    assert honest["gap_transitions"] == 30 and honest["replayed"] == sum(len(dream.turns) for dream in dreams)
    assert half["wm2real"] == half["reward_precision"] == 0.5 and half["hazard"] > 0
    assert lost["success"] == 0 and "wm2real" not in lost and "reward_precision" not in lost


def test_a_dream_that_goes_on_after_the_real_end(env):
    task = env.tasks("seen")[0]
    won = as_dream(record(env, [task], EXPERT)[0], task)
    longer = replace(won, turns=[*won.turns, *won.turns[-1:]])
    rows = beside_real(longer, env)
    assert rows[-1]["real"] == "(over)" and not rows[-1]["agree"] and len(rows) == len(longer.turns)


# ---- the report


def test_report_is_escaped_and_json_ready(env, real):
    hostile = Experience("<img src=x>", "<script>alert(1)</script>", 0.0, "", False)
    rows = [{"turn": 0, "action": hostile.action, "dream": "a\nb", "agree": False}]
    scores = teacher_forced(oracle_model(env, real[:50]), real[:50], violations, determined, name="<b>model</b>")
    seen = on_policy([dream(None, [FIRST, FIRST], [hostile.action])] * 30, lambda *step: ["<i>bad</i>"])
    report = FidelityReport([scores], [seen], beside=rows)
    html = report._repr_html_()
    assert "&lt;script&gt;" in html and "&lt;b&gt;model" in html and "&lt;i&gt;bad" in html
    assert not any(tag in html for tag in ("<script", "<img", "<b>model", "<i>"))
    assert "a<br>b" in html and "<td>no</td>" in html
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["on_policy"][0]["hazard"]["violations"] == 30 and len(stored["on_policy"][0]["first"]) == 20
    assert stored["teacher_forced"][0]["exact"]["n"] == 50 and stored["gap"] is None
    assert html_table([]) == ""


def test_divergence_counts_turn_by_turn(env, real):
    """Real episodes do not diverge; one state that is changed on the way does, at that turn only."""
    tasks = {task.id: task for task in env.tasks("train")[:40]}
    episodes = {}
    for row in real:
        if row.policy == "expert" and row.task_id in tasks and "expert" in row.episode_id:
            episodes.setdefault(row.episode_id, []).append(row)
    chosen = [e for e in episodes.values() if len(e) > 4][:5]
    dreams = [as_dream(e, tasks[e[0].task_id]) for e in chosen]
    found = divergence(dreams, env)
    assert all(d.same.value == d.facts == 1 for d in found.depths) and found.transitions == sum(map(len, chosen))
    dreams[0].turns[2] = replace(dreams[0].turns[2], state=env.mapper.merge(dreams[0].turns[2].state, "hold: spoon 99"))
    at = [d for d in divergence(dreams, env).depths if d.same.value < 1]
    assert [(d.turn, d.same.value) for d in at] == [(2, 4 / 5)] and 0.9 < at[0].facts < 1


def test_one_call_measures_all_that_is_given(env, real):
    tasks = {task.id: task for task in env.tasks("train")[:40]}
    episodes = {}
    for row in real:
        episodes.setdefault(row.episode_id, []).append(row)
    dreams = [as_dream(e, tasks[e[0].task_id]) for e in list(episodes.values())[:6]]
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    buffer.add_many(real[:200])
    config = ReasoningModelConfig(history=0)
    model = ReasoningExperienceModel(config, Oracle(real[:50], env.mapper), buffer, env.mapper)
    model.demos = lambda queries: [[] for _ in queries]
    real_side = [replace(t, source="real") for t in dreams]
    report = measure_fidelity(model, env, {"seen": real[:50]}, {"policy": dreams}, real_side, replays=3)
    assert [m.name for m in report.teacher_forced] == ["experience model, seen", "copy nearest, seen"]
    assert report.on_policy[0].hazard.violations == 0 and report.gap.gap.value == 0
    assert report.wm2real.success.value == 1 and report.divergence.depths[0].same.n == 3 and report.beside
    html = report._repr_html_()
    assert all(title in html for title in ("Recorded steps", "own dreams", "dreamt and real", "played for real"))
    assert len(report.figures()) == 2 and json.dumps(report.to_dict(), allow_nan=False)


def test_plot_bins_add_up():
    seen = on_policy(
        [dream(None, [str(i) for i in range(13)], ["a"] * 12)] * 5, lambda s, *rest: ["x"] if s == "7" else []
    )
    axes = plot_hazard_by_depth(seen, width=4).axes[0]
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 4] and line.get_ydata().tolist() == [0, 5 / 20]
