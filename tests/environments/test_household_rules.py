"""The rules of a household: no false alarm on real transitions, and planted errors are found."""

import random
from collections import Counter

import pytest

from dreamgym.environments.household_rules import (
    expected_state,
    goal_holds,
    is_determined,
    judge,
    read_command,
    read_instruction,
    reasoning_trace,
    violations,
)
from dreamgym.environments.household_state import HouseholdMapper
from dreamgym.environments.household_text import VARIANTS, Receptacle, in_order, name_of, parse_state

KINDS = {"small": 400, "full": 150, "official": 150}  # games
SHARE = {"small": 0.99, "full": 0.92, "official": 0.88}  # planted errors that are found, at least
STATE = """task: put a clean mug in cabinet.
at: drawer 1
hold: nothing
countertop 1: mug 1, plate 1
drawer 1: open, mug 2 clean
drawer 2: closed, cup 1
unseen: cabinet 1, cabinet 2, fridge 1
last: ok"""


def walks(kind, games_of, walk):
    """Every step of expert, noisy and random walks in games of a kind."""
    for n, game in enumerate(games_of(kind, KINDS[kind])):
        yield from walk(game, kind, (0.0, 0.4, 1.0)[n % 3], 1000 + n)


@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm_on_real_transitions(kind, games_of, walk):
    count, variant = Counter(), VARIANTS[kind]
    for _, state, action, observation, after, reward, done, _ in walks(kind, games_of, walk):
        found = violations(state, action, after, reward, done, variant)
        assert not found, (found, state, action, observation)
        count[judge(parse_state(state), action, variant).ok] += 1
    assert count.total() >= 3000
    assert count[None] / count.total() < {"small": 0.02, "full": 0.6, "official": 0.6}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_traces_end_with_what_happened(kind, games_of, walk):
    """'fail' or 'done' as in reality; hidden facts (a thing that was cool) fulfil a goal once in thousands of steps."""
    wrong = count = 0
    for _, state, action, _, after, reward, _, _ in walks(kind, games_of, walk):
        trace = reasoning_trace(state, action, after, VARIANTS[kind])
        assert "\n" not in trace and trace.endswith("fail") == (after.rpartition("\n")[2] != "last: ok")
        wrong += trace.endswith("; done") != (reward > 0)
        count += 1
    assert wrong <= (0 if kind == "small" else 0.002 * count)


HOT = """task: put a hot apple in fridge.
at: microwave 1
hold: apple 2 hot
fridge 1: closed ?
unseen: countertop 1
microwave 1: open, nothing
last: ok"""


@pytest.mark.parametrize(
    ("action", "trace"),
    [
        ("heat apple 1 with microwave 1", "at microwave 1; hold apple 2 not apple 1; fail"),
        ("move apple 2 to fridge 1", "at microwave 1 not fridge 1; fail"),
        ("take apple 1 from microwave 1", "at microwave 1; hold apple 2 not nothing; fail"),
        ("go to sofa 1", "at microwave 1; sofa 1 missing; fail"),
        (
            "move apple 2 to microwave 1",
            "at microwave 1; hold apple 2; apple fits microwave; microwave 1 open, nothing; ok; goal hot apple in fridge; "
            "apple 2 hot; apple is apple; is hot; microwave not fridge; not yet",
        ),
    ],
)
def test_a_trace_ends_at_the_first_condition_that_fails(action, trace):
    after = HOT.replace("last: ok", f"last: fail {action}")
    if trace.endswith("not yet"):
        after = HOT.replace("hold: apple 2 hot", "hold: nothing").replace("open, nothing", "open, apple 2 hot")
    assert reasoning_trace(HOT, action, after) == trace
    wrong = HOT.replace("apple 2 hot", "mug 2 hot")
    put = wrong.replace("hold: mug 2 hot", "hold: nothing").replace("open, nothing", "open, mug 2 hot")
    assert reasoning_trace(wrong, "move mug 2 to microwave 1", put).endswith("mug 2 hot; mug not apple; not yet")


@pytest.mark.parametrize("kind", KINDS)
def test_determined_steps_are_what_the_rules_expect(kind, games_of, walk):
    variant, mapper, determined, count = VARIANTS[kind], HouseholdMapper(VARIANTS[kind]), 0, 0
    for _, state, action, _, after, *_ in walks(kind, games_of, walk):
        count += 1
        if is_determined(state, action, variant):
            works = judge(parse_state(state), action, variant).ok
            text = (
                expected_state(parse_state(state), action, variant)[0].text() if works else mapper.fail(state, action)
            )
            assert text == after, (state, action)
            determined += 1
    assert determined / count > {"small": 0.55, "full": 0.3, "official": 0.3}[kind]


# ---- planted errors


def naive(state, action):
    """What someone would predict who never says no."""
    verb, names = read_command(action)
    after = parse_state(state)
    after.last, known = "ok", after.receptacles
    r = known.get(names[-1]) if names else None
    if verb == "go":
        after.at = names[0]
    elif verb in ("open", "close") and r:
        known[names[0]] = Receptacle(True, "open" if verb == "open" else "closed", r.contents or ())
    elif verb == "take" and r:
        after.hold = names[0]
        rest = tuple(i for i in r.contents or () if name_of(i) != names[0])
        known[names[1]] = Receptacle(r.visited, r.status, rest if r.seen else rest or None)
    elif verb == "move" and r:
        after.hold, known[names[1]] = "nothing", Receptacle(True, r.status, in_order((*(r.contents or ()), names[0])))
    elif verb in ("heat", "cool", "clean"):
        after.hold = f"{names[0]} {'hot' if verb == 'heat' else verb}"
    return after.text()


def edited(text, change):
    after = parse_state(text)
    return None if change(after) is False else after.text()


def wrong_item(after, rng, places, old=None):
    """Another thing in a place that is known: instead of an old one, or one more."""
    options = [p for p in places if old is None or after.receptacles[p].contents]
    if not options:
        return False
    place = rng.choice(options)
    r = after.receptacles[place]
    rest = list(r.contents)
    if old is not None:
        rest.remove(rng.choice(rest))
    new = old if isinstance(old, str) else f"{rng.choice(['mug', 'book', 'pen'])} {rng.randint(20, 30)}"
    after.receptacles[place] = Receptacle(True, r.status, in_order([*rest, new] if new else rest))


def planted(state, action, after, reward, variant, rng):
    """kind of error -> predicted state and reward; only errors that contradict what is known."""
    mapper, works = HouseholdMapper(variant), after.endswith("\nlast: ok")
    if not works:
        wrong = {"accepted an impossible action": (naive(state, action), 0.0)}
        changed = edited(state, lambda s: wrong_item(s, rng, [p for p, r in s.receptacles.items() if r.seen]))
        place = (read_command(action)[1] or ("",))[-1]
        if variant.shared_places and place in parse_state(state).receptacles:
            wrong["accepted, as if it were near"] = (expected_state(parse_state(state), action, variant)[0].text(), 0.0)
        if changed:
            wrong["failed but changed"] = (mapper.fail(changed, action), 0.0)
        return wrong | {"false reward": (after, 1.0)}
    free = expected_state(parse_state(state), action, variant)[1]
    known = [p for p, r in parse_state(after).receptacles.items() if r.seen and p != free]
    items = [i for p in known for i in parse_state(after).receptacles[p].contents]
    wrong = {"rejected a possible action": (mapper.fail(state, action), 0.0)}
    wrong["wrong reward"] = (after, 1.0 - reward)
    wrong["one thing more"] = (edited(after, lambda s: wrong_item(s, rng, known)), reward)
    wrong["one thing less"] = (edited(after, lambda s: wrong_item(s, rng, known, "")), reward)
    wrong["swapped object"] = (edited(after, lambda s: wrong_item(s, rng, known, 1)), reward)
    wrong["duplicate"] = (edited(after, lambda s: duplicate(s, rng, [free] if free else known, items)), reward)
    wrong["wrong place"] = (edited(after, lambda s: elsewhere(s, rng)), reward)
    wrong["wrong hands"] = (
        edited(after, lambda s: setattr(s, "hold", "nothing" if s.hold != "nothing" else "cup 9")),
        reward,
    )
    wrong["wrong door"] = (edited(after, lambda s: other_door(s, rng, known)), reward)
    wrong["malformed"] = (malformed(after, rng), reward)
    return {name: case for name, case in wrong.items() if case[0] is not None and (case[0], case[1]) != (after, reward)}


def duplicate(after, rng, places, items):
    seen = [p for p in places if after.receptacles[p].seen]
    if not seen or not items:
        return False
    place, item = rng.choice(seen), rng.choice(items)
    r = after.receptacles[place]
    after.receptacles[place] = Receptacle(True, r.status, in_order([*r.contents, item]))


def elsewhere(after, rng):
    after.at = rng.choice([name for name in after.receptacles if name != after.at])


def other_door(after, rng, places):
    doors = [p for p in places if after.receptacles[p].status]
    if not doors:
        return False
    place = rng.choice(doors)
    r = after.receptacles[place]
    after.receptacles[place] = Receptacle(True, {"open": "closed", "closed": "open"}[r.status], r.contents)


def malformed(after, rng):
    lines = after.split("\n")
    at = rng.randrange(1, len(lines))
    cases = [lines[:at] + lines[at + 1 :], lines[:at] + [lines[at].replace(": ", " ", 1)] + lines[at + 1 :]]
    cases += [lines[:-1], [*lines, "mug"], [*lines[:3], "drawer ? mug", *lines[3:]], lines[:at] + [lines[at] + ", x"]]
    return "\n".join(rng.choice(cases))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_errors_are_found(kind, games_of, walk):
    rng, variant, cases, caught = random.Random(0), VARIANTS[kind], Counter(), Counter()
    for n, (_, state, action, _, after, reward, _, _) in enumerate(walks(kind, games_of, walk)):
        if n % 2:
            continue
        for name, (text, r) in planted(state, action, after, reward, variant, rng).items():
            cases[name] += 1
            caught[name] += bool(violations(state, action, text, r, r > 0, variant))
    shares = {name: caught[name] / cases[name] for name in cases}
    assert cases.total() > 8000 and caught.total() / cases.total() >= SHARE[kind], shares
    assert kind != "small" or min(shares.values()) >= 0.95, shares
    weak = {"rejected a possible action": 0.35} | (
        {"duplicate": 0.6} if kind == "official" else {}
    )  # hidden facts decide
    assert all(share >= weak.get(name, 0.85) for name, share in shares.items()), shares


@pytest.mark.parametrize("kind", VARIANTS)
def test_nonsense_is_judged_and_never_raises(kind, games_of, walk):
    """A dream goes on from its own predictions, so both states may be strange."""
    rng, variant = random.Random(1), VARIANTS[kind]
    steps = [step for n, game in enumerate(games_of("small", 40)) for step in walk(game, "small", 0.5, n)]
    for _, state, action, _, after, reward, done, _ in steps:
        words, other = action.split(), rng.choice(steps)[2]
        rng.shuffle(words)
        before = strange(state, rng)
        for act in (action, other, " ".join(words)):
            for text in (after, strange(after, rng), malformed(after, rng), before, ""):
                assert isinstance(violations(before, act, text, reward, done, variant), list)


def strange(text, rng):
    """A state that can be read and could be predicted, but makes little sense."""
    state = parse_state(text)
    names = [*state.receptacles, "drawer 77", "nowhere"]
    state.at, state.hold = rng.choice(names), rng.choice([state.hold, "nothing", "mug 3 hot", "pen 1"])
    for name in rng.sample(list(state.receptacles), 3):
        contents = rng.choice([None, (), ("mug 3",), ("desklamp 1 on", "pen 1")])
        state.receptacles[name] = Receptacle(rng.random() < 0.7, rng.choice(["", "open", "closed"]), contents)
    state.near = (
        {state.at: rng.choice(["nothing", f"{rng.choice(names[:-2])}, ?"])} if state.at in state.receptacles else {}
    )
    return state.text() if "  ?" not in state.text() else text


# ---- by hand


@pytest.mark.parametrize(
    "action, small, full, official",
    [
        ("take mug 2 from drawer 1", True, True, True),
        ("take mug 1 from countertop 1", False, None, None),
        ("take mug 9 from drawer 1", False, False, False),
        ("take mug 2 from cabinet 1", False, False, None),  # it was seen in drawer 1
        ("take cup 1 from drawer 2", False, False, False),  # closed
        ("take mug 9 from fridge 1", False, False, False),
        ("open cabinet 1", False, None, None),
        ("open countertop 1", False, False, False),
        ("close drawer 1", True, True, True),
        ("open drawer 1", False, False, False),
        ("go to cabinet 1", True, None, None),
        ("go to drawer 1", False, False, False),
        ("go to cabinet 9", False, False, False),
        ("examine mug 2", False, False, False),  # only in the hand
        ("use mug 2", False, False, False),
        ("use floorlamp 1", False, False, None),
        ("put mug 2 in/on drawer 1", False, False, False),
        ("help", True, True, None),
        (" look ", True, True, True),
    ],
)
def test_verdicts(action, small, full, official):
    state = parse_state(STATE)
    assert [judge(state, action, variant).ok for variant in VARIANTS.values()] == [small, full, official]


def test_verdicts_after_look():
    """What `look` told decides: the countertop is near, or it is not."""
    action = "take mug 1 from countertop 1"
    for near, ok in (("countertop 1", True), ("countertop 1, ?", True), ("cabinet 1, ?", None), ("nothing", False)):
        state = parse_state(STATE.replace("last", f"near drawer 1: {near}\nlast"))
        assert judge(state, action, VARIANTS["full"]).ok is ok
        assert judge(state, "go to countertop 1", VARIANTS["full"]).ok is (None if ok is None else not ok)
    assert judge(parse_state(STATE), "move mug 1 to drawer 1", VARIANTS["full"]).ok is False  # not in the hand


def test_hidden_facts_may_fulfil_a_goal():
    """A thing that was cool from the start, a lamp left on nearby, a second thing at a neighbour never seen."""
    cool = "\n".join(
        (
            "task: put a cool mug in shelf.",
            "at: shelf 1",
            "hold: mug 1",
            "shelf 1: nothing",
            "unseen: desk 1",
            "last: ok",
        )
    )
    mapper, action = HouseholdMapper(VARIANTS["full"]), "move mug 1 to shelf 1"
    put = mapper.update(cool, action, "You move the mug 1 to the shelf 1.")
    for variant, found in (("small", ["false reward"]), ("full", []), ("official", [])):
        assert violations(cool, action, put, 1.0, True, VARIANTS[variant]) == found
        assert violations(cool, action, put, 0.0, False, VARIANTS[variant]) == []
    lamp = STATE.replace("put a clean mug in cabinet.", "look at mug under the desklamp.").replace(
        "cup 1", "desklamp 1 on"
    )
    taken = mapper.update(lamp, "take mug 2 from drawer 1", "You pick up the mug 2 from the drawer 1.")
    for variant, found in (("small", ["false reward"]), ("full", [])):
        assert violations(lamp, "take mug 2 from drawer 1", taken, 1.0, True, VARIANTS[variant]) == found
    near = parse_state(taken.replace("last", "near drawer 2: drawer 1\nlast"))
    assert goal_holds(near, read_instruction(near.task)) and not goal_holds(
        parse_state(taken), read_instruction(near.task)
    )


def test_commands_and_instructions():
    assert read_command("put mug 1 in/on desk 1", "put") == ("move", ("mug 1", "desk 1"))
    assert read_command("put mug 1 in/on desk 1") == read_command("move mug 1 in desk 1") == ("", ())
    assert read_instruction("cool some tomato and put it in microwave.").text() == "cool tomato in microwave"
    with pytest.raises(ValueError, match="tidy up"):
        read_instruction("tidy up")
