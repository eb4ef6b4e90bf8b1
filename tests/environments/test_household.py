"""The household engine against recorded states of the official one, and its own promises."""

import json
import lzma
import random
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from dreamgym.core.errors import DataError
from dreamgym.environments.alfworld import archive_games
from dreamgym.environments.household import HouseholdEngine, expert_action, list_commands, object_text
from dreamgym.environments.household_files import (
    CLEAN,
    COOL,
    HOT,
    SLICED,
    TOGGLED,
    Game,
    decode_game,
    load_game,
    parse_game,
)
from dreamgym.environments.household_games import HELP_TEXT, generate_game, problem_text

RECORDED = Path(__file__).resolve().parents[1] / "data" / "household_conformance.jsonl.xz"


def replay(game: Game, rows: list) -> None:
    """Plays the commands of a trace and compares every state."""
    engine = HouseholdEngine(game)
    for turn, (command, observation, admissible, reward, done, won) in enumerate(rows):
        if command is None:
            got = engine.reset(), float(engine.won), engine.won
        else:
            got = engine.step(command)
        where = f"{game.id}, turn {turn}, {command!r}"
        assert got == (observation, float(reward), done), where
        assert engine.admissible_commands() == admissible, where
        assert engine.won == won, where


def play(game: Game, explore: bool, turns: int = 50) -> int:
    """Turns until the expert wins; 0 if it does not."""
    engine = HouseholdEngine(game)
    for turn in range(turns):
        observation, _, done = engine.step(expert_action(engine, explore))
        assert observation != "Nothing happens.", game.id
        if done:
            return turn + 1
    return 0


def stub(game: Game, problem: str, grammar: str = "") -> dict:
    """A game file with a minimal domain and grammar."""
    text = f'"rhs": "Your task is to: {game.task}" action help {{ template :: "help"; feedback :: "\n{HELP_TEXT}" }}'
    return {"pddl_domain": "(define (domain alfred))", "grammar": text + grammar, "pddl_problem": problem}


@pytest.fixture(scope="session")
def official(test_data):
    """The official games, read from their archive."""
    return archive_games(test_data / "alfworld" / "games.tar.xz")


def test_official_traces_are_identical(test_data, official):
    with lzma.open(test_data / "alfworld" / "conformance.jsonl.xz", "rt") as lines:
        traces = [json.loads(line) for line in lines]
    states = 0
    for trace in traces:
        game = decode_game(official.read(trace["game"]), trace["game"])
        for kind in ("rand", "walk"):
            replay(game, trace[kind])
            states += len(trace[kind])
    assert len(traces) * 2 == 280 and states == 4452


def test_official_games_are_won_by_walkthrough_and_experts(official):
    explored = 0
    for game_id in official.ids:
        game = decode_game(official.read(game_id), game_id)
        engine = HouseholdEngine(game)
        for command in game.walkthrough:
            engine.step(command)
        assert engine.won, f"walkthrough of {game_id}"
        assert play(game, explore=False), f"expert in {game_id}"
        explored += play(game, explore=True) > 0
    assert len(official.ids) == 3893
    assert explored >= 0.99 * 3893


def test_generated_games_recorded_by_the_official_engine_are_identical():
    lines = lzma.decompress(RECORDED.read_bytes()).decode().splitlines()
    seen = set()
    for line in lines:
        trace = json.loads(line)
        kind, _, rest = trace["game"].split("/")[1].partition("-")
        seen.add((kind, "-full-" in rest))
        blank = generate_game(0)
        game = parse_game(stub(replace(blank, task=trace["task"]), trace["problem"]), trace["game"])
        replay(game, trace["rand"])
        replay(game, trace["walk"])
    assert len(lines) >= 100 and len(seen) == 12  # six task types in two sizes


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("explore", [False, True])
def test_expert_replans_from_any_state(size, explore):
    for seed in range(60):
        game, rng = generate_game(seed, size=size), random.Random(seed)
        engine = HouseholdEngine(game)
        for _ in range(20):
            engine.step(rng.choice(engine.admissible_commands()))
        for _ in range(60):
            engine.step(expert_action(engine, explore))
            if engine.won:
                break
        assert engine.won, game.id


def test_explorer_takes_only_what_it_was_shown():
    for seed in range(80):
        engine = HouseholdEngine(generate_game(seed, size="full"))
        shown = engine.reset()
        while not engine.won:
            command = expert_action(engine, explore=True, seed=seed)
            if command.startswith("take "):
                assert command[5:].split(" from ")[0] in shown
            shown += engine.step(command)[0]


def test_admissible_commands_are_exactly_the_possible_ones():
    rng = random.Random(0)
    for seed in range(20):
        engine = HouseholdEngine(generate_game(seed, size="full"))
        for _ in range(40):
            possible = engine.admissible_commands()
            assert possible == sorted(set(possible)) == list_commands(engine)
            command = rng.choice(possible)
            assert engine.step(command)[0] != "Nothing happens.", command


def test_impossible_commands_change_nothing():
    engine = HouseholdEngine(generate_game(3))
    before = engine.admissible_commands()
    for command in (
        "",
        "fly",
        "go to moon 1",
        "take apple 1 from",
        "OPEN drawer 1",
        "use",
        "examine",
        "go to desk 1 to desk 2",
    ):
        assert engine.step(command) == ("Nothing happens.", 0.0, False)
    assert engine.admissible_commands() == before
    assert engine.step("  look ")[0] == engine.step("look")[0]  # blanks at the ends are stripped, as officially


def test_engines_of_one_game_do_not_share_state():
    game = generate_game(5)
    one, two = HouseholdEngine(game), HouseholdEngine(game)
    for command in game.walkthrough:
        one.step(command)
    assert one.won and not two.won and two.reset() == one.reset() and not one.won
    one.admissible_commands().clear()
    assert one.admissible_commands() == two.admissible_commands()
    with pytest.raises(FrozenInstanceError):
        game.task = "other"


def test_old_data_says_put():
    game = replace(generate_game(1, task_type="pick_and_place_simple"), style="put")
    engine = HouseholdEngine(game)
    while not engine.won:
        command = expert_action(engine)
        assert command in engine.admissible_commands()
        observation = engine.step(command)[0]
    assert command.startswith("put ") and " in/on " in command and observation.startswith("You put the ")
    engine.reset()
    for command in game.walkthrough:  # recorded in the other style
        engine.step(command)
    assert not engine.won
    assert parse_game(stub(game, problem_text(game), "put {o} in/on {r}"), "old").style == "put"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0, "There's nothing special about apple 1."),
        (COOL, "This is a cold apple 1."),
        (HOT | CLEAN, "This is a hot and clean apple 1."),
        (COOL | SLICED, "This is a cool sliced apple 1."),
        (CLEAN | COOL | SLICED, "This is a cool and clean sliced apple 1."),
        (SLICED, "This is a sliced apple 1."),
    ],
)
def test_examine_follows_the_grammar(flags, text):
    game = next(g for g in (generate_game(n) for n in range(99)) if "apple 1" in g.objects)
    engine = HouseholdEngine(game)
    engine.flags[game.objects.index("apple 1")] = flags
    assert object_text(engine, game.objects.index("apple 1")) == text


def test_lamp_goal_needs_lamp_and_object():
    game = generate_game(2, task_type="look_at_obj_in_light")
    engine = HouseholdEngine(game)
    for command in game.walkthrough[:-1]:
        assert not engine.step(command)[2]
    assert engine.step(game.walkthrough[-1]) == (f"You turn on the {game.walkthrough[-1][4:]}.", 1.0, True)
    assert any(flags & TOGGLED for flags in engine.flags)


BROKEN = {
    "no init": lambda text: text.replace("(:init", "(:start"),
    "no goal": lambda text: text.replace("(:goal", "(:aim"),
    "cut": lambda text: text[: len(text) - 40],
    "nested fact": lambda text: text.replace("(objectType ", "(not (objectType ").replace(
        ")\n(objectAt", "))\n(objectAt", 1
    ),
    "unknown goal": lambda text: text.replace("(exists", "(forall"),
    "no agent": lambda text: text.replace("(atLocation agent1", "(near agent1"),
    "unknown object": lambda text: text.replace("(objectType ", "(kind "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pddl_is_a_clear_error(name):
    game = generate_game(0)
    with pytest.raises(DataError, match="some/game"):
        parse_game(stub(game, BROKEN[name](problem_text(game))), "some/game")


def test_a_file_without_an_agent_or_a_type_says_so():
    game = generate_game(0)
    text = problem_text(game)
    with pytest.raises(DataError, match=r"some/game: expected a fact \(atLocation agent place\)"):
        parse_game(stub(game, BROKEN["no agent"](text)), "some/game")
    inside = re.search(r"\(inReceptacle (\S+) ", text)[1]
    with pytest.raises(DataError, match=rf"some/game: '{re.escape(inside.lower())}' lies in a receptacle, but no fact"):
        parse_game(stub(game, re.sub(rf"\(objectType {re.escape(inside)} \w+\)", "", text)), "some/game")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"pddl_domain": "(def', "broken or truncated"),
        (b"\xff\xfe\x00", "broken or truncated"),
        (b"[1, 2]", "JSON object"),
        (b"{}", "'pddl_domain'"),
        (b'{"pddl_domain": "(domain alfred)", "grammar": 3}', "'grammar'"),
        (b'{"pddl_domain": "(domain x)", "grammar": "", "pddl_problem": ""}', "alfred"),
        (b'{"pddl_domain": "(domain alfred)", "grammar": "", "pddl_problem": ""}', "Your task is to"),
    ],
)
def test_broken_files_are_clear_errors(tmp_path, raw, words):
    path = tmp_path / "game.tw-pddl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=words) as caught:
        load_game(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="no-game"):
        load_game(tmp_path / "no-game")
