"""Properties of generated household games."""

import pytest

from dreamgym.core.errors import ConfigError, DataError, MissingExtra
from dreamgym.environments.household import HouseholdEngine
from dreamgym.environments.household_files import load_game
from dreamgym.environments.household_games import (
    MAX_TURNS,
    TASK_TYPES,
    export_game,
    game_of,
    generate_game,
    household_tasks,
    solve,
)


@pytest.mark.parametrize(("size", "receptacles", "objects"), [("small", (9, 12), (7, 11)), ("full", (6, 54), (8, 70))])
def test_sizes(size, receptacles, objects):
    games = [game_of(task) for task in household_tasks("unseen", 200, size)]
    assert all(receptacles[0] <= len(game.receptacles) <= receptacles[1] for game in games)
    assert all(objects[0] <= len(game.objects) <= objects[1] for game in games)
    mean = sum(len(game.receptacles) for game in games) / len(games)
    assert size == "small" or 20 < mean < 26  # officially 24
    assert size == "full" or len({kind for game in games for kind in game.object_types}) == 18


@pytest.mark.parametrize("size", ["small", "full"])
def test_every_game_is_open_and_solved(size):
    won = 0
    for task in household_tasks("train", 300, size):
        game = game_of(task)
        engine = HouseholdEngine(game)
        assert not engine.won
        for command in game.walkthrough:
            assert command in engine.admissible_commands()
            engine.step(command)
        assert engine.won and len(game.walkthrough) <= MAX_TURNS[size]
        won += len(solve(game, MAX_TURNS[size], explore=True)) > 0
    assert won >= 0.98 * 300


def test_same_seed_same_game_and_more_tasks_only_add():
    for size in MAX_TURNS:
        tasks = household_tasks("train", 50, size, rooms=20)
        assert tasks[:20] == household_tasks("train", 20, size, rooms=20)
        assert [game_of(task) for task in tasks[:5]] == [game_of(task) for task in tasks[:5]]
        assert all(game_of(task).task == task.instruction for task in tasks)
    assert household_tasks("train", 9) != household_tasks("train", 9, seed=1)


def test_splits_are_apart():
    def goals(split):
        return {(task.world_id, game_of(task).goal) for task in household_tasks(split, 400, rooms=40)}

    worlds = {
        s: {task.world_id for task in household_tasks(s, 200, rooms=40)} for s in ("train", "seen", "valid", "unseen")
    }
    assert worlds["seen"] == worlds["train"] and len(worlds["train"]) == 40
    assert not worlds["train"] & worlds["valid"] and not worlds["train"] & worlds["unseen"]
    assert not worlds["valid"] & worlds["unseen"]
    assert not goals("train") & goals("seen")  # the rooms are shared, the tasks are not


def test_tasks_of_a_room_share_its_first_contents():
    rooms = {}
    for task in household_tasks("train", 60, "full", rooms=10):
        game = game_of(task)
        rooms.setdefault(task.world_id, set()).add((game.receptacles, game.objects, game.contents, game.place_of))
    assert len(rooms) == 10 and all(len(first) == 1 for first in rooms.values())


def test_all_task_types_occur_and_can_be_asked_for():
    tasks = household_tasks("unseen", 300)
    count = {kind: sum(task.task_type == kind for task in tasks) for kind in TASK_TYPES}
    assert min(count.values()) >= 15
    for kind in TASK_TYPES:
        assert generate_game(4, task_type=kind).task_type == kind


def test_wrong_names_and_impossible_wishes():
    for wrong in ({"split": "test"}, {"size": "tiny"}, {"task_type": "pick"}):
        with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
            generate_game(0, **wrong)
    with pytest.raises(ConfigError, match="tests"):
        household_tasks("tests", 1)
    with pytest.raises(DataError, match="bathroom|bedroom"):
        generate_game(0, task_type="pick_heat_then_place_in_recep", room_seed=1)


def test_export_reads_back_or_names_the_extra():
    game = generate_game(6, size="full")
    try:
        data = export_game(game)
    except MissingExtra as error:
        assert "dreamgym[alfworld]" in str(error)
        return
    again = load_game(data, game.id)
    assert again == game
