"""Household games of the three kinds, and walks through them, for the tests of states and rules."""

import random
import sys
from pathlib import Path

import pytest

from dreamgym.core.data_structures import Task
from dreamgym.environments.household import HouseholdEngine, expert_action
from dreamgym.environments.household_files import decode_game
from dreamgym.environments.household_games import MAX_TURNS, game_of, household_tasks
from dreamgym.environments.household_state import HouseholdMapper
from dreamgym.environments.household_text import VARIANTS

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests of this folder import `pages`


@pytest.fixture(scope="session")
def official_games(request):
    """Official games, one in twenty-five of all."""
    from dreamgym.environments.alfworld import archive_games

    files = archive_games(request.getfixturevalue("test_data") / "alfworld" / "games.tar.xz")
    return [decode_game(files.read(game_id), game_id) for game_id in files.ids[::25]]


@pytest.fixture(scope="session")
def games_of(request):
    """kind, number -> games; official ones are skipped where there are no test data."""

    def games(kind, n):
        if kind == "official":
            return request.getfixturevalue("official_games")[:n]
        return [game_of(task) for task in household_tasks("train", n, kind)]

    return games


def guess(game, engine, rng):
    """A command about any two things, mostly impossible."""
    here, thing = rng.choice(game.receptacles), rng.choice(game.objects)
    held = game.objects[engine.held] if engine.held >= 0 else thing
    about = [f"take {thing} from {here}", f"use {thing}", f"examine {thing}", f"slice {thing} with {held}"]
    about += [f"{verb} {held} with {here}" for verb in ("heat", "cool", "clean")]
    about += [f"move {held} to {here}", f"move {thing} to {here}", f"put {held} in/on {here}"]
    about += [f"{verb} {here}" for verb in ("go to", "open", "close", "examine")]
    return rng.choice([*about, "foo bar", "help", " look "])


@pytest.fixture(scope="session")
def walk():
    """game, kind, noise, seed -> steps (engine before its move, state, action, observation, next state, reward, done)."""

    def steps(game, kind, noise, seed=0):
        rng, mapper, engine = random.Random(seed), HouseholdMapper(VARIANTS[kind]), HouseholdEngine(game)
        state = mapper.start(Task("test", ""), engine.reset())
        for _ in range(MAX_TURNS.get(kind, 50)):
            action, dice = expert_action(engine, explore=True, seed=seed), rng.random()
            if dice < noise:
                lists = [engine.admissible_commands(), mapper.admissible_actions(state), [guess(game, engine, rng)]]
                action = rng.choice(rng.choice(lists))
            offered = mapper.admissible_actions(state), engine.admissible_commands()
            observation, reward, done = engine.step(action)
            after = mapper.update(state, action, observation)
            yield engine, state, action, observation, after, reward, done, offered
            if done:
                return
            state = after

    return steps
