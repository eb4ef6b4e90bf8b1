"""TRL's SFTTrainer on the experience model's rows: the same loss as our loop, LoRA, and refreshes that are counted."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dreamgym.core.config import BufferConfig, EnvironmentConfig, ReasoningModelConfig
from dreamgym.core.data_structures import Experience, Task
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.core.language_model import END, PAD, LanguageModel, build_model, train_tokenizer
from dreamgym.environments.base_env import TranscriptMapper, make_environment
from dreamgym.environments.offline import EXPERT, record
from dreamgym.models.experience_sft import encode_examples, example_loss, split_experiences
from dreamgym.models.reasoning_model import ExperiencePrompts
from dreamgym.models.replay_buffer import ExperienceReplayBuffer
from dreamgym.training import fine_tuning
from dreamgym.training.fine_tuning import conversation_rows, fine_tune, old_episodes, pays_to_pack, refresh
from dreamgym.training.preparation import check_tokens, environment_texts, lost_targets


@pytest.fixture(scope="module")
def env():
    return make_environment("alfworld", EnvironmentConfig(data_dir="generated"))


@pytest.fixture(scope="module")
def rows(env):
    return [row for episode in record(env, env.tasks("train")[:8], EXPERT) for row in episode]


@pytest.fixture
def small(env, rows):
    tokenizer = train_tokenizer(environment_texts(rows, env))
    return LanguageModel(build_model(tokenizer, "Llama", hidden_size=32, layers=1, seed=0), tokenizer)


def prompts_of(env, **config):
    return ExperiencePrompts(ReasoningModelConfig(**config), mapper=env.mapper)


@pytest.mark.parametrize("pad", [PAD, END])
def test_trl_takes_the_loss_of_our_loop_on_the_same_rows(env, rows, small, pad):
    """One step of rate zero: TRL's training loss of a batch is `example_loss` of that batch; many models pad by the end."""
    small.tokenizer.pad_token = pad
    with torch.no_grad():
        small.model.get_input_embeddings().weight *= 10  # tokens differ in their loss, or a missing one would not show
    model, chosen = prompts_of(env), rows[:8]
    examples = encode_examples(chosen, model, small.tokenizer)
    expected = example_loss(small.model, examples).item()
    endless = example_loss(small.model, [(prompt, target[:-1]) for prompt, target in examples]).item()
    section = ReasoningModelConfig(train_steps=1, batch_size=8, lr=1e-12)
    metrics = fine_tune(model, small, chosen, section, draw=False, warmup_steps=0, logging_steps=1)
    assert math.isclose(metrics["train_loss"], expected, rel_tol=1e-3)
    assert not math.isclose(endless, expected, rel_tol=5e-3)


@pytest.mark.parametrize(
    ("attention", "layers", "pays"),
    [
        ("sdpa", None, False),
        ("flash_attention_2", None, True),
        ("flash_attention_2", ["sliding_attention", "full_attention"], True),
        ("flash_attention_2", ["conv", "full_attention"], False),
    ],
)
def test_packing_where_it_pays_and_keeps_rows_apart(attention, layers, pays):
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention, layer_types=layers))
    assert pays_to_pack(model) == pays


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_batch_teaches_what_a_padded_one_does(env, rows, small, attention):
    start = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    small.model.set_attn_implementation(attention)
    section, found = ReasoningModelConfig(train_steps=3, batch_size=8, lr=1e-2), []
    for packed in (False, True):
        small.model.load_state_dict(start)
        metrics = fine_tune(prompts_of(env), small, rows[:24], section, draw=False, warmup_steps=0, padding_free=packed)
        found.append((metrics["train_loss"], {n: t.clone() for n, t in small.model.state_dict().items()}))
    (loss, padded), (same, packed) = found
    assert math.isclose(loss, same, rel_tol=1e-5) and len({len(row.state) for row in rows[:24]}) > 1
    assert all(torch.allclose(padded[name], packed[name], atol=1e-4) for name in padded)
    assert any(not torch.equal(padded[name], start[name]) for name in start)


def test_rows_are_what_our_loop_reads(env, rows, small):
    model, tokenizer = prompts_of(env), small.tokenizer
    for row, (prompt, target) in zip(
        conversation_rows(rows, model, tokenizer), encode_examples(rows, model, tokenizer), strict=True
    ):
        assert row["chat_template_kwargs"]["date_string"] == "26 Jul 2024", "that of every prompt"
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert asked == prompt and whole == prompt + target


def test_fine_tuning_learns_and_lora_is_merged(env, rows, small):
    model, before = prompts_of(env), {k: v.clone() for k, v in small.model.state_dict().items()}
    examples = encode_examples(rows, model, small.tokenizer)
    start = example_loss(small.model, examples).item()
    logs = []
    section = ReasoningModelConfig(train_steps=50, batch_size=8, lr=2e-2, lora_rank=4)
    fine_tune(model, small, rows, section, on_log=lambda step, metrics: logs.append(step))
    assert example_loss(small.model, examples).item() < 0.8 * start and logs
    after = small.model.state_dict()
    assert set(after) == set(before), "no adapter is left"
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved and all("proj" in name for name in moved)
    assert not small.model.training


def test_rows_are_drawn_and_the_rate_ends_as_the_section_says(env, rows, small, monkeypatch):
    seen, rates = [], []

    def shown(experiences, model, tokenizer, without_demos=()):
        seen.append(list(without_demos))
        return conversation_rows(experiences, model, tokenizer, without_demos)

    monkeypatch.setattr(fine_tuning, "conversation_rows", shown)
    section = ReasoningModelConfig(train_steps=20, batch_size=2, lr=1e-2, lr_end=0.5, demo_dropout=1.0)
    told = lambda step, logs: rates.append(logs.get("learning_rate"))  # noqa: E731
    fine_tune(prompts_of(env), small, rows, section, on_log=told, logging_steps=1)
    assert seen == [[True] * len(rows)]
    assert min(rate for rate in rates[5:] if rate is not None) == pytest.approx(0.005, rel=0.1)


def test_no_steps_are_no_training(env, rows, small, monkeypatch):
    """transformers takes no steps for no limit, and would train three epochs."""
    monkeypatch.setattr(fine_tuning, "run_trainer", None)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    assert fine_tune(prompts_of(env), small, rows, ReasoningModelConfig(train_steps=0)) == {}
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())


def test_nothing_to_learn_from(env, small):
    with pytest.raises(DataError, match="got none"):
        fine_tune(prompts_of(env), small, [], ReasoningModelConfig())


def test_a_refresh_learns_the_fresh_and_counts_it(env, rows, small):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    old, fresh = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    buffer.add_many(old)
    model = ExperiencePrompts(ReasoningModelConfig(), buffer, env.mapper)
    section = ReasoningModelConfig(batch_size=8, lr=2e-2)
    examples = encode_examples(fresh, model, small.tokenizer)
    start = example_loss(small.model, examples).item()
    report = refresh(model, small, fresh, section, steps=40, replay=0.5, start=0.2)
    assert report.real_transitions == report.admitted == len(fresh) and len(buffer) == len(rows)
    longest = max(Counter(e.episode_id for e in old).values())
    assert round(0.5 * len(fresh)) <= report.replayed < round(0.5 * len(fresh)) + longest
    assert example_loss(small.model, examples).item() < 0.7 * start and report.loss < start


def test_a_refresh_reads_no_row_twice_where_there_are_enough(env, rows, small):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    buffer.add_many(rows[8:])
    model = ExperiencePrompts(ReasoningModelConfig(), buffer, env.mapper)
    longest = max(Counter(e.episode_id for e in rows).values())
    report = refresh(model, small, rows[:8], ReasoningModelConfig(batch_size=8), steps=4)
    assert 4 * 8 <= report.real_transitions + report.replayed < 4 * 8 + longest
    assert refresh(model, small, rows[:8], ReasoningModelConfig(batch_size=8), steps=1).replayed == 0


def test_old_rows_are_replayed_with_their_history(env, rows):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    dreamt = [replace(e, source="synthetic", episode_id="dreamt") for e in rows[:5]]
    buffer.add_many([*rows, *dreamt])
    drawn = old_episodes(buffer, 30, seed=1)
    by_episode = {e.episode_id: [row for row in rows if row.episode_id == e.episode_id] for e in drawn}
    assert drawn == [row for episode in by_episode.values() for row in episode] and len(drawn) >= 30
    assert drawn == old_episodes(buffer, 30, seed=1) != old_episodes(buffer, 30, seed=2)


def test_a_named_model_is_refreshed_by_trl(env, rows, small):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    model = ExperiencePrompts(ReasoningModelConfig(), buffer, env.mapper)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    section = ReasoningModelConfig(name="some/model", batch_size=4, lr=1e-2, lora_rank=2)
    report = refresh(model, small, rows[:8], section, steps=2)
    assert math.isfinite(report.loss) and len(buffer) == 8
    after = small.model.state_dict()
    assert set(after) == set(before) and any(not torch.equal(after[name], before[name]) for name in after)


def test_without_steps_the_buffer_alone_grows(env, rows, small):
    buffer = ExperienceReplayBuffer(BufferConfig(), dedup=False)
    model = ExperiencePrompts(ReasoningModelConfig(), buffer, env.mapper)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    report = refresh(model, small, rows[:8], ReasoningModelConfig(), steps=0)
    assert report.loss is None and len(buffer) == 8
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())


def test_a_refresh_never_learns_from_dreams(env, rows, small):
    buffer = ExperienceReplayBuffer(BufferConfig())
    model = ExperiencePrompts(ReasoningModelConfig(), buffer, env.mapper)
    for fresh in ([], [replace(rows[0], source="synthetic")]):
        with pytest.raises(DataError, match="its own dreams"):
            refresh(model, small, fresh, ReasoningModelConfig())
    assert len(buffer) == 0


@pytest.mark.parametrize("by", ["task_id", "world_id", "episode_id"])
def test_splits_never_share_a_task_or_a_world(rows, by):
    train, held = split_experiences(rows, 0.4, by)
    assert train and held and sorted(map(id, train + held)) == sorted(map(id, rows))
    assert not {getattr(e, by) for e in train} & {getattr(e, by) for e in held}
    assert split_experiences(rows[::-1], 0.4, by)[1] == held[::-1], "whatever the order"
    assert split_experiences(rows, 0.0, by)[1] == [] and split_experiences(rows, 1.0, by)[0] == []
    with pytest.raises(DataError, match=f"split by {by}"):
        split_experiences([replace(rows[0], **{by: ""})], by=by)


class Keyed(TranscriptMapper):
    """Keeps what it is told, and needs the colon of a note."""

    def merge(self, state, delta):
        if delta.startswith("note") and ":" not in delta:
            raise ValueError("expected a colon")
        return super().merge(state, delta)


def test_a_transcript_may_lose_what_no_model_reads():
    """Its text comes back without commas; policy and experience model see the same tokens."""
    mapper = TranscriptMapper()
    state = mapper.start(Task("t", "find it"), "here")
    after = mapper.update(state, "look", "a desk 1, a mug 2, and nothing: else.")
    rows = [Experience(state, "look", 0.0, after, False, reasoning="")]
    tokenizer = train_tokenizer([state, after, "look no reasoning reward 0"])
    assert lost_targets(rows, mapper, tokenizer) == []
    unknown = train_tokenizer([state, "look no reasoning reward 0 ="])  # lacks the words
    assert len(lost_targets(rows, mapper, unknown)) == 1


def test_what_tokens_cannot_say_is_told_before_training(env, rows, small, caplog):
    assert lost_targets(rows, env.mapper, small.tokenizer) == [], "the household reads its changes without punctuation"
    mapper, states = Keyed(), ["find it\n0", "find it\n0\nnote: five, six", "find it\n0\na mug"]
    good, bad = (Experience(states[0], "look", 0.0, after, False, reasoning="why") for after in states[:0:-1])
    tokenizer = train_tokenizer([*states, "why reward 0 look"])
    assert [kept for kept, _ in lost_targets([good, bad], mapper, tokenizer)] == ["why\nnote: five, six\nreward 0"]
    check_tokens([good], mapper, tokenizer)
    assert not caplog.records
    check_tokens([good, good, bad], mapper, tokenizer)
    assert "1 of 3 targets" in caplog.text and "note: five, six" in caplog.text
    with pytest.raises(ConfigError, match="2 of 3 targets .*drops colons and commas"):
        check_tokens([good, bad, bad], mapper, tokenizer)
    unknown = train_tokenizer([*states[:2], "why reward 0 look"])
    with pytest.raises(ConfigError, match="has no token for some of their words.*train it on texts that have them"):
        check_tokens([good], mapper, unknown)
