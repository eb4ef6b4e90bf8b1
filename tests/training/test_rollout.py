"""Batched rollouts: every task once, right to the token, and a failed episode never takes the others with it."""

import math
import random

import pytest
import torch

from dreamgym.core.data_structures import StepResult, Task
from dreamgym.core.errors import ConfigError
from dreamgym.core.generators import Generation, TransformersGenerator, derive_seed
from dreamgym.core.language_model import LanguageModel, build_model, make_rows, train_tokenizer
from dreamgym.core.llm import GeneratorClient
from dreamgym.environments.base_env import CountingEnv
from dreamgym.training.policy import Policy, TurnCodec, append_only_rows
from dreamgym.training.rollout import RolloutConfig, rollout, rollout_metrics


def shaken(model, tokenizer):
    """As after some training: no weight is zero."""
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.1 * torch.randn_like(weights)
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*(f"count {i}" for i in range(13)), "+1", "noop"])


@pytest.fixture(scope="module")
def codec(tokenizer):
    return TurnCodec(tokenizer)


class Chooses:
    """A 'generator' that picks actions by a rule on the prompt's text; remembers what it was asked."""

    def __init__(self, codec, rule, version=0):
        self.codec, self.rule, self.version, self.asked = codec, rule, version, []

    def generate(self, prompts, sampling, sessions=None):
        self.asked.append((len(prompts), sampling))
        texts = [self.codec.tokenizer.decode(p) for p in prompts]
        ids = [self.codec.response(self.rule(text)) for text in texts]
        return [Generation(i, [-0.5] * len(i), "stop", self.version) for i in ids]


class Watched(CountingEnv):
    """Checks the promises that the caller of a batch environment makes; some tasks abort."""

    def __init__(self, slots, max_turns=6):
        super().__init__(slots, max_turns)
        self.live, self.steps, self.resets = set(), 0, []

    def reset(self, slots, tasks, seeds=None):
        assert not self.live & set(slots) and len(set(slots)) == len(slots)
        results = super().reset(slots, tasks, seeds)
        broken = [task.id.startswith("broken") for task in tasks]
        self.live |= {slot for slot, b in zip(slots, broken, strict=True) if not b}
        self.resets += [(task.id, seed) for task, seed in zip(tasks, seeds, strict=True)]
        return [StepResult("", aborted="no such game") if b else r for b, r in zip(broken, results, strict=True)]

    def _step(self, slot, action):
        assert slot in self.live, "a step in a slot whose episode is over"
        self.steps += 1
        result = super()._step(slot, action)
        if self._tasks[slot].id.startswith("dying") and self._count[slot][1] == 2:
            result = StepResult(result.state, aborted="server died")
        if result.done:
            self.live.discard(slot)
        return result


def always(codec, action="+1", version=0):
    return Chooses(codec, lambda text: action, version)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_every_task_once_in_order_whatever_the_slots(codec, slots):
    goals = random.Random(0).choices(range(1, 9), k=25)
    tasks = [Task(f"t{i}", str(goal), seed=i) for i, goal in enumerate(goals)]
    env = Watched(slots)
    played = rollout(always(codec), env, tasks, codec, RolloutConfig(slots=slots))
    assert [t.task for t in played] == tasks
    assert sorted(env.resets) == sorted((task.id, task.seed) for task in tasks)
    assert env.steps == sum(len(t.turns) for t in played) == sum(min(goal, 6) for goal in goals)
    for trajectory, goal in zip(played, goals, strict=True):
        assert trajectory.terminated == trajectory.success == (goal <= 6) and trajectory.truncated == (goal > 6)
        assert trajectory.episode_return == float(goal <= 6)
        assert [turn.state for turn in trajectory.turns] == [f"count {i}" for i in range(min(goal, 6))]
        assert trajectory.final_state == f"count {min(goal, 6)}"


def test_the_slots_never_wait_for_the_longest(codec):
    """A free slot takes the next task at once: one call of the generator for each round."""
    tasks = [Task(f"t{i}", "1") for i in range(5)] + [Task("long", "5")]
    generator = always(codec)
    rollout(generator, Watched(2), tasks[::-1], codec, RolloutConfig(slots=2))
    assert [n for n, _ in generator.asked] == [2] * 5


def test_tokens_are_kept_as_sampled(tokenizer):
    """Ids and log-probabilities are the sampler's; prompts are what the policy would be given again."""
    policy = Policy(LanguageModel(build_model(tokenizer, hidden_size=32, layers=1, seed=0), tokenizer))
    generator = TransformersGenerator(policy.language_model)
    tasks = [Task(f"t{i}", str(1 + i % 4)) for i in range(12)]
    config = RolloutConfig(slots=5, max_new_tokens=3)
    played = rollout(generator, CountingEnv(5), tasks, policy.codec, config, seed=7)
    turns = [turn for t in played for turn in t.turns]
    assert {turn.stop_reason for turn in turns} == {"stop", "length"} and len(turns) > 40
    with torch.no_grad():
        scores = policy(make_rows([t.prompt_ids for t in turns], [t.response_ids for t in turns]))
    for turn, logprobs in zip(turns, scores.logprobs.split([len(t.response_ids) for t in turns]), strict=True):
        assert turn.prompt_ids == policy.codec.prompts([turn.state])[0]
        assert torch.allclose(logprobs, torch.tensor(turn.logprobs), atol=1e-5)
        assert turn.action == policy.codec.action(turn.response_ids)
        ended = turn.response_ids[-1] == tokenizer.eos_token_id
        assert ended == (turn.stop_reason == "stop") and len(turn.response_ids) <= 3


def test_a_rollout_does_not_depend_on_the_slots(tokenizer):
    """Random numbers belong to the episode and the turn, not to the batch that they are sampled in."""
    policy = Policy(shaken(build_model(tokenizer, hidden_size=32, layers=1, seed=0), tokenizer))
    tasks = [Task(f"t{i}", str(2 + i % 4)) for i in range(9)]

    def said(slots):
        generator = TransformersGenerator(policy.language_model)
        played = rollout(generator, CountingEnv(slots), tasks, policy.codec, RolloutConfig(slots=slots), seed=3)
        return [[turn.response_ids for turn in t.turns] for t in played]

    assert said(1) == said(4) == said(9)


def test_seeds_of_neighbouring_iterations_do_not_overlap(codec):
    """Turn 1 of seed 5 is not turn 0 of seed 6."""
    seeds = []
    for seed in (5, 6, 7):
        generator = always(codec)
        rollout(generator, Watched(2), [Task("a", "5"), Task("b", "5")], codec, RolloutConfig(slots=2), seed=seed)
        seeds += [s for _, sampling in generator.asked for s in sampling.seed]
    assert len({*seeds}) == len(seeds) == 30


def test_same_seed_same_rollout(tokenizer):
    policy = Policy(LanguageModel(build_model(tokenizer, hidden_size=32, layers=1, seed=0), tokenizer))
    tasks = [Task(f"t{i}", "3") for i in range(10)]

    def actions(seed):
        generator = TransformersGenerator(policy.language_model)
        played = rollout(generator, CountingEnv(4), tasks, policy.codec, RolloutConfig(slots=4), seed=seed)
        return [[turn.response_ids for turn in t.turns] for t in played]

    assert actions(1) == actions(1) != actions(2)


def test_truncated_episodes_carry_the_prompt_of_their_last_state(codec):
    cut, won = rollout(always(codec), Watched(2), [Task("a", "9"), Task("b", "2")], codec, RolloutConfig(slots=2))
    assert list(cut.final_prompt_ids) == codec.prompts(["count 6"])[0] and not cut.terminated
    assert won.final_prompt_ids == () and won.terminated and not won.truncated


def test_failed_episodes_leave_the_others_alone(codec):
    tasks = [Task("broken 1", "1"), Task("a", "3"), Task("dying", "4"), Task("broken 2", "1"), Task("b", "4")]
    played = rollout(always(codec), Watched(2), tasks, codec, RolloutConfig(slots=2))
    assert [t.task.id for t in played] == [task.id for task in tasks]
    assert [t.aborted for t in played] == ["no such game", None, "server died", "no such game", None]
    assert [t.success for t in played] == [None, True, None, None, True] and played[0].turns == []
    metrics = rollout_metrics(played)
    assert (metrics["episodes"], metrics["aborted"], metrics["success"], metrics["turns"]) == (2, 3, 1.0, 3.5)
    only_broken = rollout(always(codec), Watched(2), tasks[:1] * 5, codec, RolloutConfig(slots=2))
    assert [t.aborted for t in only_broken] == ["no such game"] * 5
    assert rollout_metrics(only_broken)["success"] == 0 and rollout(always(codec), Watched(2), [], codec) == []


@pytest.mark.parametrize("call", ["reset", "step"])
def test_an_environment_that_answers_too_little_is_named(codec, call):
    class Forgetful(CountingEnv):
        pass

    setattr(Forgetful, call, lambda self, *given: getattr(CountingEnv, call)(self, *given)[:-1])
    with pytest.raises(ValueError, match=rf"Forgetful\.{call}: expected 2 results, one a slot, got 1; try check_env"):
        rollout(always(codec), Forgetful(2), [Task("a", "2"), Task("b", "2")], codec, RolloutConfig(slots=2))


def test_groups_are_the_rollouts_of_one_task(codec):
    tasks = [Task(name, "2") for name in "abacba"]
    groups = [t.group for t in rollout(always(codec), Watched(4), tasks, codec, RolloutConfig(slots=4))]
    assert [groups.index(g) for g in groups] == [0, 1, 0, 3, 1, 0]


def test_penalty_and_version_are_recorded(codec):
    rule = Chooses(codec, lambda text: "noop" if "count 1" in text else "+1", version=3)
    config = RolloutConfig(slots=1, invalid_action_penalty=0.25, source="dream")
    (played,) = rollout(rule, Watched(1), [Task("a", "2")], codec, config)
    assert played.version == 3 and played.source == "dream" and played.truncated
    assert [turn.penalty for turn in played.turns] == [0.0] + [0.25] * 5
    assert [turn.valid for turn in played.turns] == [True] + [False] * 5
    assert played.episode_return == 0 and rollout_metrics([played])["invalid_actions"] == 5 / 6


def test_sampling_settings_reach_the_generator(codec):
    generator = always(codec)
    config = RolloutConfig(slots=1, temperature=0.3, max_new_tokens=5)
    rollout(generator, Watched(1), [Task("a", "3")], codec, config, seed=10)
    assert [(s.max_new_tokens, s.temperature) for _, s in generator.asked] == [(5, 0.3)] * 3
    assert [s.seed for _, s in generator.asked] == [[derive_seed(10, 0, turn)] for turn in range(3)]


def test_a_dream_that_could_not_be_read_is_marked(codec):
    class Dreams(CountingEnv):
        def _step(self, slot, action):
            result = super()._step(slot, action)
            broken = result.state == "count 2"
            info = {"malformed": broken, "action_error": "malformed prediction" if broken else None, "reasoning": "so"}
            return StepResult(
                result.state, "", result.reward, result.terminated, result.truncated, result.success, info=info
            )

    (played,) = rollout(always(codec), Dreams(1), [Task("a", "3")], codec, RolloutConfig(slots=1, source="dream"))
    assert [bool(turn.info.get("malformed")) for turn in played.turns] == [False, True, False]
    assert {turn.info["reasoning"] for turn in played.turns} == {"so"}


def test_progress_is_told(codec):
    told = []
    tasks = [Task(f"t{i}", str(1 + i % 3)) for i in range(7)]
    rollout(always(codec), Watched(3), tasks, codec, RolloutConfig(slots=3), on_step=told.append)
    assert told == sorted(told) and told[-1] == 7


def test_metrics_of_nothing_are_finite():
    assert all(math.isfinite(value) for value in rollout_metrics([]).values())


# ---- contexts


CONTEXTS = {
    "state": {},
    "history": {"context": "history", "history": 2},
    "conversation": {"context": "conversation"},
}


def test_a_text_level_client_is_no_policy(codec, tokenizer):
    client = GeneratorClient(LanguageModel(build_model(tokenizer, hidden_size=16, layers=1), tokenizer))
    with pytest.raises(ConfigError, match="token ids and log-probabilities.*GeneratorClient"):
        rollout(client, Watched(1), [Task("a", "3")], codec)


@pytest.mark.parametrize("context", CONTEXTS)
def test_checklist_01_token_in_token_out(tokenizer, context):
    """What the policy said stands in later prompts as it was sampled, though encoding its text again gives other ids."""
    codec = TurnCodec(tokenizer, **CONTEXTS[context])
    generator = TransformersGenerator(shaken(build_model(tokenizer, hidden_size=32, layers=1, seed=2), tokenizer))
    config = RolloutConfig(slots=24, max_new_tokens=6, temperature=4.0)
    played = rollout(generator, CountingEnv(24), [Task(f"t{i}", "9") for i in range(24)], codec, config, seed=1)
    changed = 0
    for trajectory in played:
        for earlier, later in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            said, text = list(earlier.response_ids), tokenizer.decode(earlier.response_ids)
            changed += tokenizer.encode(text, add_special_tokens=False) != said
            places = range(len(later.prompt_ids) - len(said))
            if context == "state":
                assert later.prompt_ids == codec.prompts([later.state])[0]
            else:
                assert any(list(later.prompt_ids[i : i + len(said)]) == said for i in places)
    assert changed > 5  # the test would not notice anything otherwise


def test_checklist_02_append_only_or_a_new_row(tokenizer):
    """A conversation is one row; a window is a new row once it moves; states are rows of their own. Rows are counted."""
    rows = {}
    for context, options in CONTEXTS.items():
        generator = TransformersGenerator(shaken(build_model(tokenizer, hidden_size=32, layers=1, seed=2), tokenizer))
        codec = TurnCodec(tokenizer, **options)
        config = RolloutConfig(slots=3, max_new_tokens=6)
        played = rollout(generator, CountingEnv(3), [Task(f"t{i}", "9") for i in range(3)], codec, config, seed=1)
        rows[context] = rollout_metrics(played)["rows"] / 3
        for row in (row for t in played for row in append_only_rows(t.turns)):
            for earlier, later in zip(row, row[1:], strict=False):
                said = [*earlier.prompt_ids, *earlier.response_ids]
                assert list(later.prompt_ids[: len(said)]) == said and len(later.prompt_ids) > len(said)
    assert rows == {"state": 6, "history": 4, "conversation": 1}  # of six turns; the first three fit the window


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_show_what_they_promise(tokenizer, context):
    codec = TurnCodec(tokenizer, **CONTEXTS[context])
    (played,) = rollout(always(codec), Watched(1), [Task("a", "9")], codec, RolloutConfig(slots=1))
    shown = {"state": 0, "history": 2, "conversation": 9}[context]
    prompts = [*(turn.prompt_ids for turn in played.turns), played.final_prompt_ids]
    for number, prompt in enumerate(prompts):
        states = range(max(0, number - shown), number)
        chat = [m for i in states for m in (("user", f"count {i}"), ("assistant", "+1"))] + [
            ("user", f"count {number}")
        ]
        messages = [{"role": role, "content": content} for role, content in chat]
        assert list(prompt) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_a_conversation_is_read_once(tokenizer, family):
    """Carried from turn to turn, with slots that end and begin: the same episodes, and little is read twice."""
    model = shaken(build_model(tokenizer, family, hidden_size=32, layers=2, seed=1), tokenizer)
    codec, config = TurnCodec(tokenizer, context="conversation"), RolloutConfig(slots=4, max_new_tokens=5)
    tasks = [Task(f"t{i}", str(1 + i % 3)) for i in range(10)]
    carried, afresh = TransformersGenerator(model), TransformersGenerator(model)
    reused = []

    class Noted:
        def generate(self, prompts, sampling, sessions):
            replies = carried.generate(prompts, sampling, sessions)
            reused.append(carried.conversations.reused)
            return replies

    class Plain:
        def generate(self, prompts, sampling, sessions):
            return afresh.generate(prompts, sampling)

    one, two = (rollout(g, CountingEnv(4), tasks, codec, config, seed=2) for g in (Noted(), Plain()))
    for mine, its in zip(one, two, strict=True):
        assert [t.response_ids for t in mine.turns] == [t.response_ids for t in its.turns]
        for a, b in zip(mine.turns, its.turns, strict=True):
            assert list(a.logprobs) == pytest.approx(b.logprobs, abs=1e-5)
    # each prompt was read but for what its conversation had read before: everything up to the last token of a response
    expected = sum(
        len(earlier.prompt_ids) + len(earlier.response_ids) - 1
        for t in one
        for earlier, _ in zip(t.turns, t.turns[1:], strict=False)
    )
    assert reused[-2] == expected > 0 and carried.conversations.state is None


def test_checklist_05_the_stop_reason_of_each_turn(tokenizer):
    """Stored per turn; an end token is in the response only if it was sampled, else it is part of the next prompt."""
    generator = TransformersGenerator(shaken(build_model(tokenizer, hidden_size=32, layers=1, seed=2), tokenizer))
    codec = TurnCodec(tokenizer, context="conversation")
    tasks = [Task(f"t{i}", "9") for i in range(8)]
    played = rollout(
        generator, CountingEnv(8), tasks, codec, RolloutConfig(slots=8, max_new_tokens=8, temperature=4.0), seed=1
    )
    reasons = set()
    for trajectory in played:
        following = [*(t.prompt_ids for t in trajectory.turns[1:]), trajectory.final_prompt_ids]
        for turn, prompt in zip(trajectory.turns, following, strict=True):
            reasons.add(turn.stop_reason)
            assert (turn.response_ids[-1] == tokenizer.eos_token_id) == (turn.stop_reason == "stop")
            said = len(turn.prompt_ids) + len(turn.response_ids)
            rest = tokenizer.decode(prompt[said - 1 if turn.stop_reason == "stop" else said :])
            assert rest.startswith("<|end|><|user|>count")  # never <|end|><|end|>, never none
    assert reasons == {"stop", "length"}


# ---- the limit of the context


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_limit_truncates(tokenizer, context):
    """An episode whose next prompt leaves no room ends as truncated, with its reason, and its slot goes on."""
    codec = TurnCodec(tokenizer, **CONTEXTS[context])
    (prompt,) = codec.prompts(["count 0"])
    limit = 3 * len(prompt) + 8  # room for two turns and their answers
    tasks = [Task(f"t{i}", "5") for i in range(5)]
    config = RolloutConfig(slots=2, max_new_tokens=4, context_length=limit)
    played = rollout(always(codec), CountingEnv(2), tasks, codec, config)
    cut = context != "state"
    for t in played:
        assert (t.truncated, t.terminated, t.success, t.aborted) == (cut, not cut, not cut, None)
        assert [turn.info.get("truncated") for turn in t.turns][-1] == ("context" if cut else None)
        assert all(len(turn.prompt_ids) + config.max_new_tokens <= limit for turn in t.turns)
        if cut:
            whole = codec.next_prompts([(t.turns, t.final_state)])[0]
            assert len(whole) + 4 > limit and list(t.final_prompt_ids) == whole[-limit:]
    assert rollout_metrics(played)["context_limit"] == cut and len(played) == 5


def test_a_first_prompt_without_room_is_aborted(codec):
    tasks = [Task("a", "2"), Task("b", "2")]
    played = rollout(always(codec), CountingEnv(1), tasks, codec, RolloutConfig(slots=1, context_length=13))
    assert all("leaves no room" in t.aborted and t.turns == [] for t in played)
    assert rollout_metrics(played)["aborted"] == 2


# ---- accounting


def test_responses_without_a_command_are_counted_and_cost(tokenizer):
    words = train_tokenizer([*(f"count {i}" for i in range(9)), "+1", "<think>so it is</think><action></action>"])
    codec = TurnCodec(words, response_format="think")

    def answer(text):
        return words.encode(text, add_special_tokens=False) + [words.eos_token_id]

    class Rambles(Chooses):
        def generate(self, prompts, sampling, sessions=None):
            texts = [self.codec.tokenizer.decode(p) for p in prompts]
            said = [
                "<think>so it is" if "count 1" in text else "<think>so</think><action>+1</action>" for text in texts
            ]
            return [Generation(answer(s), [-0.5] * len(answer(s)), "stop") for s in said]

    config = RolloutConfig(slots=1, invalid_action_penalty=0.25)
    (played,) = rollout(Rambles(codec, None), Watched(1), [Task("a", "2")], codec, config)
    assert [turn.action for turn in played.turns] == ["+1"] + [""] * 5
    assert [turn.valid for turn in played.turns] == [True] + [False] * 5
    assert played.turns[1].info["unparsed"] == "the thought is not closed" and played.turns[1].response
    assert [turn.penalty for turn in played.turns] == [0.0] + [0.25] * 5 and played.episode_return == 0.0
    metrics = rollout_metrics([played])
    assert (metrics["unparsed"], metrics["invalid_actions"], metrics["penalty"]) == (5 / 6, 5 / 6, 1.25)


def test_admissible_is_told_where_it_is_known(codec):
    rule = Chooses(codec, lambda text: "noop" if "count 1" in text else "+1")
    (played,) = rollout(rule, CountingEnv(1), [Task("a", "2")], codec, RolloutConfig(slots=1))
    assert [turn.admissible for turn in played.turns] == [True] + [False] * 5


def test_checklist_19_every_trajectory_carries_its_version(codec):
    """The oldest version of its turns; each turn has its own."""

    class Synced(Chooses):
        def generate(self, prompts, sampling, sessions=None):
            self.version += 1
            return super().generate(prompts, sampling)

    played = rollout(Synced(codec, lambda text: "+1"), Watched(2), [Task("a", "2"), Task("b", "3")], codec)
    assert [[turn.info["version"] for turn in t.turns] for t in played] == [[1, 2], [1, 2, 3]]
    assert [t.version for t in played] == [1, 1]
