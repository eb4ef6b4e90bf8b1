"""The ALFWorld adapter: finding games, splits, the batch environment, bad input."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from types import SimpleNamespace

import pytest

from dreamgym.core.data_structures import Task
from dreamgym.core.errors import ConfigError, DataError, MissingExtra
from dreamgym.environments import alfworld
from dreamgym.environments.alfworld import (
    HouseholdEnv,
    archive_games,
    build,
    engine_maker,
    explorer,
    find_games,
    generated_tasks,
    official_tasks,
    split_ids,
)
from dreamgym.environments.base_env import TranscriptMapper, check_env
from dreamgym.environments.household_games import HELP_TEXT, TASK_TYPES, generate_game, problem_text
from dreamgym.environments.household_text import VARIANTS


def config(**changes):
    """The fields of EnvironmentConfig that the adapter reads."""
    known = {"data_dir": None, "mapper": False, "max_episode_steps": None, "engine": "native", "size": "small"}
    return SimpleNamespace(**(known | {"num_train_worlds": 8} | changes))


def file_of(seed: int) -> bytes:
    """A game file as the official data has them."""
    game = generate_game(seed)
    grammar = f'"rhs": "Your task is to: {game.task}" action help {{ template :: "help"; feedback :: "\n{HELP_TEXT}" }}'
    data = {"pddl_domain": "(domain alfred)", "grammar": grammar, "pddl_problem": problem_text(game)}
    return json.dumps(data | {"solvable": True, "walkthrough": list(game.walkthrough)}).encode()


def names(count: int = 12) -> list[str]:
    """Paths of game files, in several splits and floor plans."""
    plans = sorted(alfworld.HELD_OUT) + list(range(1, 31))
    splits = ["train", "valid_seen", "train"]
    return [
        f"{splits[n % 3]}/{TASK_TYPES[n % 6]}-A-None-B-{plans[n * 5 % len(plans)]}/trial_{n}/game.tw-pddl"
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    """A small data folder as alfworld-download leaves it."""
    for n, name in enumerate(names()):
        path = tmp_path / "data" / "json_2.1.1" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(file_of(n))
        (path.parent / "traj_data.json").write_text("{}")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def no_usual_places(monkeypatch, tmp_path):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def pack(path, members, mode="w:xz"):
    """A tar archive with the given (name, content) members."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_folder_archives_and_variable_give_the_same_games(folder, tmp_path, monkeypatch):
    members = [(f"json_2.1.1/{name}", file_of(n)) for n, name in enumerate(names())]
    tar = pack(tmp_path / "games.tar.xz", members)
    packed = tmp_path / "games.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    found = find_games(folder)
    assert found.version == "json_2.1.1" and list(found.ids) == sorted(names())
    for other in (tar, packed, pack(tmp_path / "games.tar.gz", members, "w:gz")):
        again = find_games(other)
        assert (again.ids, again.digest, again.version) == (found.ids, found.digest, found.version)
        assert again.read(found.ids[3]) == found.read(found.ids[3])
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    assert find_games().digest == found.digest
    assert find_games("generated") is None


def test_no_games_anywhere_means_generated():
    assert find_games() is None
    env = build(config())
    assert env.name == "alfworld-generated" and env.max_turns == 30 and env.info["data"] == "generated"
    assert build(config(size="full")).max_turns == 50


def test_official_environment_covers_each_split_once(folder):
    env = build(config(data_dir=str(folder)))
    assert env.name == "alfworld" and env.max_turns == 50
    assert env.info["version"] == "json_2.1.1" and env.info["command_style"] == "move" and env.info["digest"]
    ids = {
        split: [task.id for task in env.tasks(split)]
        for split in ("train", "valid", "unseen", "train_all", "valid_seen")
    }
    assert all(len(listed) == len(set(listed)) for listed in ids.values())
    assert sorted(ids["train"] + ids["valid"] + ids["unseen"]) == sorted(ids["train_all"])
    task = env.tasks("train_all")[0]
    assert task.instruction and task.world_id.startswith("FloorPlan") and task.task_type in TASK_TYPES
    batch = env.make(1)
    result = batch.reset([0], [task])[0]
    while not result.done:
        result = batch.step([0], [env.expert(batch, 0)])[0]
    assert result.success


def test_the_first_official_games_are_of_all_types():
    """Ids begin with the type of task, and training and validation take games from the front."""
    ids = [f"train/{kind}-A-None-B-1/trial_{n}/game.tw-pddl" for kind in TASK_TYPES for n in range(100)]
    content = file_of(0)
    games = alfworld.GameFiles("here", "unknown", tuple(sorted(ids)), lambda game_id: content)
    tasks = official_tasks(games, "train")
    first = Counter(task.id.split("/")[1].split("-")[0] for task in tasks[:120])
    assert set(first) == set(TASK_TYPES) and min(first.values()) >= 8
    assert sorted(task.id for task in tasks) == sorted(ids)  # each once
    assert [task.id for task in official_tasks(games, "train")] == [task.id for task in tasks]
    assert len({task.world_id for task in tasks}) == len({game_id.split("/")[-2] for game_id in ids})


def test_split_errors(folder):
    games = find_games(folder)
    with pytest.raises(DataError, match="valid_unseen"):
        split_ids(games, "valid_unseen")
    with pytest.raises(ConfigError, match="did you mean 'unseen'"):
        split_ids(games, "unsen")
    with pytest.raises(ConfigError, match="split"):
        generated_tasks("tests")


def test_official_data_has_the_counts_that_we_report(test_data):
    games = archive_games(test_data / "alfworld" / "games.tar.xz")
    counts = {
        s: len(split_ids(games, s))
        for s in ("train", "seen", "valid", "unseen", "train_all", "valid_seen", "valid_train")
    }
    assert counts["train_all"] == 3553 == counts["train"] + counts["valid"] + counts["unseen"]
    assert (counts["valid_seen"], counts["valid_train"]) == (140, 200)
    plans = {alfworld.floor_plan(game_id) for game_id in split_ids(games, "train")}
    assert not plans & alfworld.HELD_OUT and len(plans) == 108 - 32
    assert official_tasks(games, "unseen")[0].instruction


@pytest.mark.parametrize("cut", [40, 400, 2000])
@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w"])
def test_truncated_archives(tmp_path, cut, mode):
    path = pack(tmp_path / "games.tar", [(name, file_of(n)) for n, name in enumerate(names(4))], mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut if mode != "w" else cut + 3000])
    with pytest.raises(DataError, match="truncated or broken"):
        find_games(path)


def test_truncated_zip_and_no_archive_at_all(tmp_path):
    path = tmp_path / "games.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(names()[0], file_of(0))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="games.zip"):
        find_games(path)
    path.write_text("hello")
    with pytest.raises(DataError, match="truncated or broken"):
        find_games(path)


@pytest.mark.parametrize("offset, value, said", [(6, 1, "encrypted"), (8, 99, "NotImplementedError")])
def test_locked_zips_and_unknown_compression(tmp_path, offset, value, said):
    path = tmp_path / "games.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(names()[0], file_of(0))
    content = bytearray(path.read_bytes())
    content[offset] = content[content.index(b"PK\1\2") + offset + 2] = value  # in the member's head and in the list
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"games.zip.*{said}.*get a whole copy"):
        find_games(path)


def test_of_two_data_versions_the_newer_is_read(tmp_path, monkeypatch):
    """In whatever order the file system lists them."""
    name, walk = names()[0], alfworld.os.walk
    for number, version in enumerate(("json_2.1.1", "json_2.1.2")):
        path = tmp_path / version / name
        path.parent.mkdir(parents=True)
        path.write_bytes(file_of(number))
    for backwards in (False, True):

        def listed(top, backwards=backwards):
            for root, folders, files in walk(top):
                folders.sort(reverse=backwards)
                yield root, folders, files

        monkeypatch.setattr(alfworld.os, "walk", listed)
        found = find_games(tmp_path)
        assert found.version == "json_2.1.2" and found.read(name) == file_of(1)


@pytest.mark.parametrize("name", ["../../evil/a/b/game.tw-pddl", "/etc/a/b/game.tw-pddl", "train/../../b/game.tw-pddl"])
def test_members_that_point_outside(tmp_path, name):
    path = pack(tmp_path / "games.tar.xz", [(names()[0], file_of(0)), (name, b"{}")])
    with pytest.raises(DataError, match="points outside"):
        find_games(path)
    assert not list(tmp_path.glob("**/evil"))


def test_links_and_huge_members(tmp_path, monkeypatch):
    path = tmp_path / "games.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo(names()[0])
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="link"):
        find_games(path)
    monkeypatch.setattr(alfworld, "MEMBER_LIMIT", 1000)
    with pytest.raises(DataError, match="bytes"):
        find_games(pack(tmp_path / "big.tar.xz", [(names()[0], file_of(0))]))


def test_missing_and_empty_places(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for place, words in (("empty", "found none"), ("nowhere", "does not exist")):
        with pytest.raises(DataError, match=words):
            find_games(tmp_path / place)
        monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / place))
        with pytest.raises(DataError, match="ALFWORLD_DATA"):
            find_games()
    monkeypatch.setenv(
        "ALFWORLD_DATA", str(tmp_path / "home" / ".cache" / "alfworld")
    )  # as the alfworld package sets it
    assert find_games() is None


def test_batch_env_keeps_its_promises():
    tasks = generated_tasks("train", rooms=4)
    env = HouseholdEnv(4, engine_maker(None), max_turns=7)
    assert check_env(env, tasks[:3], ["look", "inventory", "fly", "go to garbagecan 1"], max_turns=7)
    env.reset([3], [tasks[0]])
    results = [env.step([3], ["fly"])[0] for _ in range(7)]
    assert [r.truncated for r in results] == [False] * 6 + [True]
    assert results[-1].success is False and results[0].info["action_error"] and not results[0].terminated
    with pytest.raises(ValueError, match="over"):
        env.step([3], ["look"])
    with pytest.raises(ValueError, match="reset"):
        HouseholdEnv(1, engine_maker(None)).step([0], ["look"])


def test_a_win_on_the_last_turn_is_not_truncated():
    task = generated_tasks("train", rooms=4)[0]
    turns = len(generate_game(**task.metadata).walkthrough)
    env = HouseholdEnv(1, engine_maker(None), max_turns=turns)
    env.reset([0], [task])
    results = [env.step([0], [command])[0] for command in generate_game(**task.metadata).walkthrough]
    assert results[-1].terminated and not results[-1].truncated and results[-1].success and results[-1].reward == 1.0


def test_a_broken_game_or_engine_never_ends_its_siblings(folder):
    games = find_games(folder)
    broken = games.ids[0]
    (folder / "json_2.1.1" / broken).write_bytes(b'{"pddl_domain": "(dom')
    env = HouseholdEnv(2, engine_maker(games), max_turns=50)
    bad, good = env.reset([0, 1], [Task(broken, ""), Task(games.ids[1], "")])
    assert "broken or truncated" in bad.aborted and bad.done and good.aborted is None

    class Failing:
        won = False

        def reset(self):
            return "fine"

        def step(self, command):
            raise OSError("the engine died")

        def admissible_commands(self):
            return ["look"]

    native = engine_maker(None)
    tasks = generated_tasks("train", rooms=4)
    env = HouseholdEnv(2, lambda task: Failing() if task.id == "failing" else native(task))
    env.reset([0, 1], [Task("failing", ""), tasks[0]])
    failed, alive = env.step([0, 1], ["look", "look"])
    assert "engine died" in failed.aborted and not failed.terminated and not failed.truncated
    assert alive.aborted is None and alive.observation.startswith("You are in the middle")


@pytest.mark.parametrize("size", ["small", "full", "official"])
def test_rules_annotate_and_verify_every_kind_of_game(size, folder):
    """`build` binds the rules to the games' kind; what they may not know differs."""
    env = build(config(mapper=True, data_dir=str(folder)) if size == "official" else config(mapper=True, size=size))
    assert env.mapper.variant == VARIANTS[size]
    split = "train_all" if size == "official" else "train"
    batch, count = env.make(1), 0
    for task in env.tasks(split)[:3]:
        before = batch.reset([0], [task])[0]
        while not before.done:
            action = env.expert(batch, 0)
            after = batch.step([0], [action])[0]
            assert env.verify(before.state, action, after.state, after.reward, after.terminated) == []
            assert env.annotate(before.state, action, after.state).endswith(("ok", "fail", "done", "not yet"))
            before, count = after, count + 1
    assert before.success and count > 5
    assert env.verify(before.state, "fly", before.state, 0.0, False) == ["accepted an impossible action"]


def test_raw_observations_are_a_transcript_without_rules():
    env = build(config())
    assert isinstance(env.mapper, TranscriptMapper) and env.annotate is None and env.verify is None
    batch = env.make(1)
    first = batch.reset([0], env.tasks("train")[:1])[0]
    second = batch.step([0], ["look"])[0]
    assert second.state == first.state + "\nlook = " + " ".join(second.observation.split())
    assert second.admissible_actions == batch.engine(0).admissible_commands()


def test_mapper_is_shared_by_reset_and_step():
    env = build(config(mapper=True))
    tasks = env.tasks("train")
    batch = env.make(3)
    assert check_env(batch, tasks[:3], ["look", "go to garbagecan 1", "fly"], env.max_turns)
    batch = env.make(1)
    first = batch.reset([0], [tasks[0]])[0]
    assert first.state == env.mapper.start(tasks[0], first.observation) != first.observation
    second = batch.step([0], [explorer(batch, 0)])[0]
    assert second.admissible_actions == env.mapper.admissible_actions(second.state)


def test_official_engine_or_the_command_that_installs_it():
    """With the extra, the official engine plays the same episode; without, the error names the pip command."""
    settings = config(engine="textworld")
    try:
        env = build(settings)
    except MissingExtra as error:
        assert "pip install 'dreamgym[alfworld]'" in str(error)
        return
    task = env.tasks("train")[0]
    batch, ours = env.make(1), build(config()).make(1)
    one, two = batch.reset([0], [task])[0], ours.reset([0], [task])[0]
    for command in generate_game(**task.metadata).walkthrough:
        assert one == two
        one, two = batch.step([0], [command])[0], ours.step([0], [command])[0]
    assert one == two and one.success
