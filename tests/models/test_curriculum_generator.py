"""The curriculum: Eq. 7, groups, the bound on generated tasks, switches, bad replies; and the household's own generator."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from dreamgym.core.config import CurriculumConfig, EnvironmentConfig
from dreamgym.core.data_structures import Task, Trajectory, Turn, episode_row
from dreamgym.core.errors import CheckpointError, ConfigError, DataError, EnvironmentFailure
from dreamgym.core.llm import Reply
from dreamgym.environments.alfworld import GameFiles, HouseholdEnv, build, engine_maker, explorer
from dreamgym.environments.household_games import MAX_TURNS, TASK_TYPES, game_of, household_tasks, may_have, solve
from dreamgym.environments.household_rules import read_instruction
from dreamgym.environments.household_tasks import feasible, varied_game, vary
from dreamgym.models.curriculum_generator import (
    CurriculumTaskGenerator,
    Record,
    cluster,
    group_records,
    most_generated,
    pull,
    read_selection,
    reward_variance,
    variation,
)

TAGS = count()
FULL = CurriculumConfig(difficulty_increment=1.0, synthetic_fraction_max=0.5)
SEEDS = [
    Task(f"t{i}", f"put a thing{i} in box{i}.", world_id=f"w{i}", initial_state=f"task: put a thing{i} in box{i}.\nx")
    for i in range(8)
]


def episode(task, outcome, **changes):
    turn = Turn([1], [2], [-0.1], reward=outcome, state="s", response="look", action="look")
    told = {"source": "dream", "version": 0, "terminated": True, "truncated": False} | changes
    return Trajectory([turn], task, group=0, **told)


def other_words(task, n, seed):
    return [f"variation {random.Random(f'{seed} {i}').random():.12f} of {task.id}" for i in range(n)]


class Flat:
    """An encoder that costs nothing and tells nothing."""

    dim = 2

    def encode(self, texts):
        return np.ones((len(texts), 2), np.float32)


class Scripted:
    """A language model that replies by a function of the request's prompt."""

    def __init__(self, answer):
        self.answer, self.prompts = answer, []

    def complete(self, requests):
        self.prompts += [request.prompt for request in requests]
        return [self.answer(request.prompt) for request in requests]


def good_writer(prompt):
    if "selection" in prompt:
        return Reply(json.dumps({"reasoning": "the clearest one", "selection": 2}))
    tag = next(TAGS)
    return Reply(json.dumps({"candidates": [f"tidy shelf {tag} of kind {i}" for i in range(6)]}))


# ---- Eq. 7 and groups


def test_rows_of_episodes_say_which_tasks_are_not_for_training():
    generator = CurriculumTaskGenerator(FULL, SEEDS[:1])
    for task in (replace(SEEDS[1], split="unseen"), replace(SEEDS[2], source="generated"), SEEDS[3]):
        generator.update_performance(json.loads(json.dumps(episode_row(episode(task, 1.0)))))
    assert set(generator.known.seeds) == {"t0", "t3"} and generator.known.counts["not for training"] == 2


def test_reward_variance_by_hand():
    assert reward_variance([1, 0, 0, 0]) == 0.1875  # p (1 - p) at p = 1/4
    assert reward_variance([0.2, 0.4, 0.9]) == pytest.approx(((-0.3) ** 2 + (-0.1) ** 2 + 0.4**2) / 3)
    generator = CurriculumTaskGenerator(FULL, SEEDS)
    for r in (0.2, 0.4, 0.9):
        generator.update_performance(episode(SEEDS[0], r))
    assert group_records(generator.known)["t0"].variance == pytest.approx(np.var([0.2, 0.4, 0.9]))


def test_clusters_equal_groups_when_every_task_is_its_own():
    rng = random.Random(0)
    many = CurriculumConfig(difficulty_increment=1.0, clusters=len(SEEDS))
    grpo = CurriculumTaskGenerator(many, SEEDS)
    ppo = CurriculumTaskGenerator(many, SEEDS, by_cluster=True)
    one = CurriculumTaskGenerator(many.model_copy(update={"clusters": 1}), SEEDS, by_cluster=True)
    outcomes = []
    for _ in range(3):
        assert grpo.generate_tasks(6) == ppo.generate_tasks(6)
        one.generate_tasks(6)
        for task in SEEDS:
            for _ in range(4):
                outcomes.append(float(rng.random() < 0.5))
                for generator in (grpo, ppo, one):
                    generator.update_performance(episode(task, outcomes[-1]))
    assert group_records(grpo.known) == group_records(ppo.known)
    pooled = set(group_records(one.known).values())
    assert len(pooled) == 1 and pooled != set(group_records(grpo.known).values())
    weights = np.repeat([many.decay**2, many.decay, 1.0], 4 * len(SEEDS))
    mean = np.average(outcomes, weights=weights)
    assert pooled.pop().variance == pytest.approx(np.average((np.array(outcomes) - mean) ** 2, weights=weights))


def test_single_rollouts_have_variance_only_in_clusters():
    alike = [Task(f"m{i}", f"put a mug in cabinet number{i % 2}.") for i in range(8)]
    for by_cluster, variance in ((False, 0.0), (True, 0.25)):
        config = CurriculumConfig(clusters=1)
        generator = CurriculumTaskGenerator(config, alike, by_cluster=by_cluster)
        for i, task in enumerate(alike):
            generator.update_performance(episode(task, float(i % 2)))
        assert {group.variance for group in group_records(generator.known).values()} == {variance}


def test_clusters_are_deterministic_and_keep_likes_together():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 32))
    x = np.repeat(centres, 20, axis=0) + 0.05 * rng.normal(size=(80, 32))
    labels = cluster(x, 4)
    assert labels == cluster(x, 4) and len(set(labels)) == 4
    assert all(len(set(labels[i : i + 20])) == 1 for i in range(0, 80, 20))
    assert len(set(cluster(x, 80))) == 80


def test_old_outcomes_fade():
    config = CurriculumConfig(difficulty_increment=1.0, decay=0.5)
    generator = CurriculumTaskGenerator(config, SEEDS)
    for _ in range(6):
        generator.update_performance(episode(SEEDS[0], 0.0))
    for _ in range(10):
        generator.generate_tasks(1)
    generator.update_performance(episode(SEEDS[0], 1.0))
    assert group_records(generator.known)["t0"].mean > 0.99
    for _ in range(60):
        generator.generate_tasks(1)
    assert not group_records(generator.known)["t0"].played


# ---- what is drawn


def test_share_never_exceeds_its_bound():
    rng = random.Random(1)
    used = Counter()
    for i in range(40):
        fraction = rng.choice([0.0, 0.07, 0.1, 0.29, 1 / 3, 0.5, 0.9, 1.0, rng.random()])
        increment = rng.choice([0.01, 0.3, 9.0])
        config = CurriculumConfig(
            difficulty_increment=increment, synthetic_fraction_max=fraction, generated_max=10, candidates=1
        )
        generator = CurriculumTaskGenerator(config, SEEDS, seed=i, vary=other_words, encoder=Flat())
        for _ in range(250):  # 10,000 in all
            n = rng.randint(1, 12)
            tasks = generator.generate_tasks(n)
            share = sum(task.source == "generated" for task in tasks) / n
            assert len(tasks) == n and share <= fraction
            used[share > 0] += 1
            for task in tasks[:2]:
                generator.update_performance(episode(task, float(rng.random() < 0.5)))
    assert used[True] > 4000 and used.total() == 10_000
    assert all(most_generated(n, k / n) == k for n in range(1, 60) for k in range(n + 1))


def test_switches():
    """design: difficulty_increment 0 is uniform over seed tasks; synthetic_fraction_max 0 generates nothing."""
    for off in ({"difficulty_increment": 0.0}, {"synthetic_fraction_max": 0.0}):
        generator = CurriculumTaskGenerator(FULL.model_copy(update=off), SEEDS, vary=other_words)
        client, drawn = Scripted(good_writer), Counter()
        for _ in range(500):
            tasks = generator.generate_tasks(4, client)
            drawn.update(task.id for task in tasks)
            for task in tasks:
                generator.update_performance(episode(task, float(task.id == "t3" and random.random() < 0.4)))
        assert not client.prompts and not generator.known.generated and set(drawn) == {task.id for task in SEEDS}
        expected = 500 * 4 / len(SEEDS)
        uniform = max(abs(n - expected) for n in drawn.values()) < 0.2 * expected
        assert uniform == ("difficulty_increment" in off), drawn
        if not uniform:
            assert drawn["t3"] == max(drawn.values()) > 1.7 * expected
    trainer = random.Random(7 * 100_003 + 1)  # uniform draws are those of the trainer without a curriculum
    assert CurriculumTaskGenerator(CurriculumConfig(), SEEDS, seed=7).generate_tasks(5) == trainer.sample(SEEDS, 5)


def test_larger_increment_pulls_to_harder_tasks():
    """Tasks with success 0.1 ... 0.9: the mean success of what is drawn falls below one half."""
    seeds = [Task(f"p{i}", f"task {i}") for i in range(1, 10)]
    means = []
    for increment in (0.0, 0.5, 2.0):
        config = CurriculumConfig(difficulty_increment=increment, decay=1.0)
        generator, drawn = CurriculumTaskGenerator(config, seeds), []
        for task in seeds:
            for k in range(10):
                generator.update_performance(episode(task, float(k < int(task.id[1:]))))
        for _ in range(300):
            drawn += [int(task.id[1:]) / 10 for task in generator.generate_tasks(2)]
        means.append(np.mean(drawn))
    assert abs(means[0] - 0.5) < 0.03 and means[2] < means[1] < means[0] - 0.05
    assert pull(Record(10, 0, 0)) == pull(Record(10, 10, 10)) == 0 < pull(Record(10, 8, 8)) < pull(Record(10, 2, 2))


def test_seeds_of_variations_have_variance():
    generator = CurriculumTaskGenerator(FULL, SEEDS, vary=other_words)
    for task in SEEDS:  # t0 always succeeds, t7 never, t1 half of the time, the others in one of eight
        for k in range(8):
            rate = {"t0": 8, "t7": 0, "t1": 4}.get(task.id, 1)
            generator.update_performance(episode(task, float(k < rate)))
    for _ in range(40):
        generator.generate_tasks(4)
    bases = Counter(task.metadata["seed_task"] for task in generator.known.generated.values())
    assert not {"t0", "t7"} & set(bases) and bases["t1"] > max(bases[f"t{i}"] for i in range(2, 7))


# ---- variations


def test_a_variation_keeps_world_and_first_state():
    task = replace(SEEDS[2], metadata={"room_seed": 5}, split="train", context="rules")
    new = variation(task, "put a cup in box2.", "g", "a reason")
    assert new.initial_state == "task: put a cup in box2.\nx" and new.world_id == "w2" and new.source == "generated"
    assert (new.split, new.context, new.metadata["seed_task"], new.metadata["room_seed"]) == ("train", "rules", "t2", 5)
    assert variation(replace(task, initial_state=None), "other", "g").initial_state is None


def test_two_stages_with_a_language_model():
    client = Scripted(good_writer)
    config = CurriculumConfig(difficulty_increment=1.0, synthetic_fraction_max=0.5, shown_tasks=2, candidates=3)
    generator = CurriculumTaskGenerator(config, SEEDS)
    generator.update_performance(episode(SEEDS[4], 1.0))
    generator.update_performance(episode(SEEDS[4], 0.0))
    tasks = generator.generate_tasks(num_tasks=10, llm_client=client)
    new = [task for task in tasks if task.source == "generated"]
    assert len(new) == 5 and all(task.metadata["reason"] == "the clearest one" for task in new)
    assert all(task.instruction.endswith("kind 1") for task in new)  # the second one
    assert SEEDS[4].instruction + " (solved: 50%)" in client.prompts[0] and len(client.prompts) == 10
    assert all(task.initial_state.startswith(f"task: {task.instruction}") for task in new)


@pytest.mark.parametrize(
    "text",
    ["", "I would rather not.", "[]", "{}", '{"candidates": "put it"}', '{"candidates": [1, null]}', "NaN", "{" * 9999],
)
def test_garbage_is_counted(text):
    generator = CurriculumTaskGenerator(FULL, SEEDS)
    tasks = generator.generate_tasks(8, Scripted(lambda prompt: Reply(text)))
    assert len(tasks) == 8 and not generator.known.generated and generator.known.counts["malformed"] == 4


def test_failed_requests_and_bad_selections_are_counted():
    generator = CurriculumTaskGenerator(FULL, SEEDS)
    generator.generate_tasks(8, Scripted(lambda prompt: Reply("", "error", error="timeout: no answer")))
    assert generator.known.counts["malformed"] == 4 and not generator.known.generated
    bad = lambda p: Reply('{"reasoning": "", "selection": 99}') if "selection" in p else good_writer(p)  # noqa: E731
    tasks = generator.generate_tasks(8, Scripted(bad))  # the rule of novelty steps in
    assert generator.known.counts["malformed"] == 8 and generator.known.counts["accepted"] == 4
    assert "cosine" in tasks[0].metadata["reason"]


def test_whole_numbers_select_however_they_are_written():
    for number in ("2", "2.0", "2e0"):
        reply = Reply(f'{{"reasoning": "r", "selection": {number}}}')
        assert read_selection(reply, ["a", "b"]) == ("b", "r")


def test_duplicates_ill_formed_and_infeasible_are_counted():
    texts = [SEEDS[0].instruction, SEEDS[0].instruction.upper(), "", "  ", "?", "x" * 501, "go home.", "go  home"]
    client = Scripted(lambda p: Reply(json.dumps({"candidates": texts, "reasoning": "", "selection": 1})))
    client.answer = lambda p: Reply(
        json.dumps({"reasoning": "r", "selection": 1} if "selection" in p else {"candidates": texts})
    )
    checked = []
    config = FULL.model_copy(update={"candidates": 8})
    generator = CurriculumTaskGenerator(config, SEEDS[:1], feasible=lambda tasks: checked.extend(tasks) or [False])
    tasks = generator.generate_tasks(2, client)
    assert [task.source for task in tasks] == ["real"] * 2 and [task.instruction for task in checked] == ["go home."]
    counts = generator.known.counts
    assert (counts["duplicate"], counts["ill-formed"], counts["candidate"], counts["infeasible"]) == (3, 4, 1, 1)


def test_a_task_without_a_first_state_cannot_be_dreamt():
    told = {True: {"reasoning": "r", "selection": 1}, False: {"candidates": ["go home."]}}
    client = Scripted(lambda p: Reply(json.dumps(told["selection" in p])))
    hidden = replace(SEEDS[0], initial_state="<ticket>\nwords that do not name the task\n</ticket>")
    generator = CurriculumTaskGenerator(FULL, [hidden])
    assert [task.source for task in generator.generate_tasks(2, client)] == ["real"] * 2
    assert generator.known.counts["infeasible"] == 1 and not generator.known.generated


def test_random_replies_never_crash():
    rng = random.Random(3)
    pieces = [
        '{"candidates": [',
        '"a b"',
        ",",
        "]}",
        '"selection": 1',
        "```json",
        "\x00",
        "\ud800",
        "<think>",
        "9" * 400,
    ]
    noise = Scripted(lambda p: Reply("".join(rng.choices(pieces, k=rng.randint(0, 7)))))
    generator = CurriculumTaskGenerator(FULL, SEEDS)
    for _ in range(100):
        assert len(generator.generate_tasks(6, noise)) == 6
    assert generator.known.counts["malformed"] > 100
    json.dumps(generator.state_dict())


# ---- episodes and checkpoints


def test_episodes_of_all_kinds():
    generator = CurriculumTaskGenerator(CurriculumConfig())
    with pytest.raises(ConfigError, match="no seed task"):
        generator.generate_tasks(num_tasks=10)
    generator.update_performance(episode(SEEDS[0], 1.0))  # becomes a seed task
    generator.update_performance(episode(SEEDS[0], 1.0, aborted="server died"))
    generator.update_performance(episode(replace(SEEDS[1], split="valid"), 1.0))
    generator.update_performance({"task_id": "t0", "task": "?", "turns": [{"reward": 0.0}], "aborted": None})
    assert [task.id for task in generator.generate_tasks(num_tasks=10)] == ["t0"] * 10
    assert generator.known.counts == {"aborted": 1, "not for training": 1}
    assert generator.known.records["t0"].n == 2 and generator.metrics()["curriculum/reward_variance"] == 0.25


def test_continued_equals_unbroken():
    def play(generator, iterations):
        drawn = []
        for _ in range(iterations):
            tasks = generator.generate_tasks(6)
            drawn += [(task.id, task.instruction) for task in tasks]
            for task in tasks:
                generator.update_performance(episode(task, float(sum(task.id.encode()) % 3 == 0)))
        return drawn

    make = lambda: CurriculumTaskGenerator(FULL, SEEDS, seed=3, vary=other_words, by_cluster=True)  # noqa: E731
    whole, first, second = make(), make(), make()
    expected = play(whole, 8)
    drawn = play(first, 5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drawn + play(second, 3) == expected and second.state_dict() == whole.state_dict()
    for broken in (None, {}, {"version": 3}, first.state_dict() | {"records": {"t0": ["x"]}, "made": "many"}):
        with pytest.raises(CheckpointError):
            make().load_state_dict(broken)


def test_generated_tasks_are_bounded():
    config = FULL.model_copy(update={"generated_max": 10})
    generator = CurriculumTaskGenerator(config, SEEDS, vary=other_words)
    for _ in range(20):
        for task in generator.generate_tasks(8):
            generator.update_performance(episode(task, 1.0))
    assert list(generator.known.generated) == [f"generated-{i:06d}" for i in range(71, 81)]
    assert set(generator.known.records) <= {task.id for task in generator.known.tasks()}


# ---- the household's own generator


@pytest.fixture(scope="module")
def household():
    """An environment, 80 seed tasks with first states, and 240 tasks that were generated from them."""
    built = build(EnvironmentConfig(data_dir="generated"))
    seeds = list(built.tasks("train")[:80])
    states = [result.state for result in built.make(len(seeds)).reset(range(len(seeds)), seeds)]
    seeds = [replace(task, initial_state=state) for task, state in zip(seeds, states, strict=True)]
    generator = CurriculumTaskGenerator(FULL, seeds, vary=built.vary, feasible=built.feasible)
    for _ in range(12):
        generator.generate_tasks(40)
    return built, seeds, generator


def test_household_tasks_are_valid_distinct_and_of_all_types(household):
    built, seeds, generator = household
    made, counts = list(generator.known.generated.values()), generator.known.counts
    assert len(made) >= 200 and counts["accepted"] >= 0.95 * (counts["accepted"] + counts["infeasible"])
    assert set(Counter(task.task_type for task in made)) == set(TASK_TYPES)
    known = {(task.world_id, task.instruction) for task in seeds}
    goals = {(task.world_id, read_instruction(task.instruction)) for task in seeds}
    distinct = sum((t.world_id, t.instruction) not in known for t in made) / len(made)
    new_goal = sum((t.world_id, read_instruction(t.instruction)) not in goals for t in made) / len(made)
    assert distinct == 1.0 and new_goal >= 0.8, (distinct, new_goal)
    assert len({(task.world_id, task.instruction) for task in made}) == len(made)
    for task in made:
        room = game_of(replace(task, metadata={k: task.metadata[k] for k in seeds[0].metadata}))
        goal = varied_game(task).goal
        assert replace(varied_game(task), id="", task="", goal=goal, task_type="", walkthrough=()) == replace(
            room, id="", task="", goal=goal, task_type="", walkthrough=()
        )  # the seed task's world, to the last thing


def test_experts_solve_household_tasks_in_the_real_engine(household):
    built, seeds, generator = household
    made = list(generator.known.generated.values())
    env, states = HouseholdEnv(1, engine_maker(None), built.max_turns, built.mapper), {t.id: t for t in seeds}
    explored = 0
    for task in made:
        assert solve(varied_game(task), MAX_TURNS["small"])
        result = env.reset([0], [task])[0]
        assert result.state == task.initial_state  # what a dream starts from is what the real engine shows
        root = states.get(task.metadata["seed_task"])
        if root:
            assert task.initial_state.split("\n")[1:] == root.initial_state.split("\n")[1:]
        before = result
        while not result.done:
            action = explorer(env, 0)
            result = env.step([0], [action])[0]
            wrong = built.verify(before.state, action, result.state, result.reward, result.terminated)
            assert wrong == [], (task.instruction, action)
            before = result
        explored += bool(result.success)
    assert explored >= 0.95 * len(made), explored / len(made)


def test_household_tasks_of_seen_stay_held_out(household):
    from dreamgym.environments.household_games import furnish

    made = household[2].known.generated.values()
    assert all(may_have("train", furnish(t.metadata["room_seed"]), varied_game(t).goal) for t in made)


def test_household_vary_and_feasible():
    task = household_tasks("valid", 3, "full")[2]
    texts = vary(task, 9, seed=4)
    assert len(set(texts)) == 9 == len(texts) and texts == vary(task, 9, seed=4)
    wishes = [replace(task, instruction=text) for text in (*texts, "put a sofa in mug.", "tidy up", "")]
    checked = feasible(wishes)
    assert all(checked[:9]) and checked[9:] == [None] * 3
    assert all(read_instruction(text) != read_instruction(task.instruction) for text in texts)


def test_official_games_are_not_varied():
    official = GameFiles("somewhere", "unknown", ("a",), lambda game_id: b"")
    with pytest.raises(EnvironmentFailure, match="official game"):
        engine_maker(official)(Task("a", "put a mug in shelf.", source="generated"))


def test_generated_tasks_need_a_recipe():
    with pytest.raises(DataError, match="recipe is missing"):
        vary(Task("x", "put a mug in shelf."))
    with pytest.raises(DataError, match="no instruction for world"):
        varied_game(replace(household_tasks("train", 1)[0], instruction="tidy up"))
