"""Tokenizer, models from scratch and text clients: what is read back, padded or saved stays the same."""

import itertools

import pytest
import torch
from jinja2 import TemplateError

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.errors import DataError
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.core.language_model import (
    LanguageModel,
    PromptEncoder,
    build_model,
    load_language_model,
    make_rows,
    predicting_states,
    train_tokenizer,
)
from dreamgym.core.llm import GeneratorClient, Request
from dreamgym.environments.base_env import make_environment
from dreamgym.environments.household_rules import reasoning_trace
from dreamgym.environments.household_text import parse_state
from dreamgym.environments.offline import Behaviour, record

FAMILIES = ("SmallLM", "Lfm2", "Llama")


@pytest.fixture(scope="module")
def env():
    return make_environment("alfworld", EnvironmentConfig(data_dir="generated"))


@pytest.fixture(scope="module")
def rows(env):
    episodes = record(env, env.tasks("train")[:40], Behaviour("noisy", 0.4))
    return [row for episode in episodes for row in episode]


@pytest.fixture(scope="module")
def tokenizer(env, rows):
    texts = itertools.chain.from_iterable((r.state, r.action, r.next_state) for r in rows)
    texts = [*texts, *(reasoning_trace(r.state, r.action, r.next_state) for r in rows)]
    texts += [env.mapper.diff(r.state, r.next_state) for r in rows]
    return train_tokenizer([*texts, "reward 0", "reward 1 end", "no change", "fail"])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tokenizer):
    built = build_model(tokenizer, request.param, hidden_size=32, layers=2, seed=3)
    with torch.no_grad():  # as after some training: no weight is zero
        for weights in built.parameters():
            weights += 0.1 * torch.randn_like(weights)
    return LanguageModel(built, tokenizer)


def prompts_of(tokenizer, lengths=(3, 40, 17, 1, 90, 41), seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(6, len(tokenizer), (n,), generator=random).tolist() for n in lengths]


# ---- tokenizer


def back(tokenizer, text):
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def test_actions_come_back_word_for_word(tokenizer, rows):
    for action in {row.action for row in rows}:
        assert back(tokenizer, action) == action


def test_changes_mean_the_same_after_a_round_trip(tokenizer, rows, env):
    for row in rows:
        change = env.mapper.diff(row.state, row.next_state)
        assert env.mapper.merge(row.state, back(tokenizer, change)) == row.next_state


def test_states_and_reasoning_lose_only_punctuation(tokenizer, rows):
    for row in rows[:300]:
        thought = reasoning_trace(row.state, row.action, row.next_state)
        for text in (row.state, thought):
            assert back(tokenizer, text) == text.replace(":", "").replace(",", "")
    assert parse_state(rows[0].state).text() == rows[0].state


@pytest.mark.parametrize("entities", ["merged", "split"])
def test_template_keeps_the_prefix(entities):
    tokenizer = train_tokenizer(["take mug 1 from desk 2", "ok"], entities)
    chat = [{"role": "user", "content": "take mug 1"}, {"role": "assistant", "content": "ok"}]
    longer = [*chat, {"role": "user", "content": "from desk 2"}]
    short = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(longer, tokenize=False).startswith(short)
    (prompt,) = PromptEncoder(tokenizer)(["take mug 1"])
    whole = tokenizer(short, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
    assert len(tokenizer("mug 1")["input_ids"]) == (1 if entities == "merged" else 2)


def test_a_template_without_system_messages_puts_them_first():
    """As Gemma's, which also refuses a system message in the middle of a conversation."""
    tokenizer = train_tokenizer(["Be brief . open"])
    joined = PromptEncoder(tokenizer)(["Be brief .\n\nopen"])
    plain, suffix = tokenizer.chat_template, PromptEncoder(tokenizer).follow_ups(["open"])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + plain
    )
    encoder = PromptEncoder(tokenizer, "Be brief .")
    assert encoder(["open"]) == joined and encoder.follow_ups(["open"]) == suffix
    assert PromptEncoder(tokenizer)(["open"])[0] == joined[0][:1] + joined[0][-3:]
    tokenizer.chat_template = "{{ raise_exception('nothing is supported') }}"
    with pytest.raises(TemplateError, match="nothing is supported"):
        PromptEncoder(tokenizer)


def test_prompts_are_the_same_on_every_day():
    """Templates that write the date, as Llama's do, write one that stays."""
    tokenizer = train_tokenizer(["26 Jul 2024 open"])
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    tokenizer.chat_template = today + tokenizer.chat_template
    prompt = PromptEncoder(tokenizer)(["open"])[0]
    assert tokenizer.decode(prompt).replace(" ", "").startswith("26Jul2024<|user|>open")


def test_unknown_words_are_one_unknown_token(tokenizer):
    ids = tokenizer("zyzzyva", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.unk_token_id]


# ---- padding


def test_right_padding_changes_nothing(model, tokenizer):
    prompts = prompts_of(tokenizer)
    together = make_rows(prompts, [[7, 8]] * len(prompts))
    with torch.no_grad():
        whole = model.model(together.ids).logits
        hidden, head = predicting_states(model.model, together)
        for i, prompt in enumerate(prompts):
            alone = model.model(torch.tensor([[*prompt, 7, 8]])).logits[0]
            assert torch.allclose(whole[i, : len(alone)], alone, atol=1e-5)
            assert torch.allclose(head(hidden)[2 * i : 2 * i + 2], alone[-3:-1], atol=1e-5)


def test_action_mask_covers_the_responses_only():
    rows = make_rows([[1, 2, 3], [4]], [[5], [6, 7]])
    assert rows.ids.tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]] and rows.tokens == 3
    assert rows.ids[rows.action_mask].tolist() == [5, 6, 7]


# ---- building, saving, loading


def test_same_seed_same_weights(tokenizer):
    a, b, c = (build_model(tokenizer, hidden_size=16, layers=1, seed=seed) for seed in (0, 0, 1))
    first, second, third = (torch.cat([p.flatten() for p in m.parameters()]) for m in (a, b, c))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_saved_models_come_back(model, tokenizer, tmp_path):
    model.save(tmp_path / "model")
    again = load_language_model(tmp_path / "model")
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))
    prompts = prompts_of(tokenizer)
    old, new = (TransformersGenerator(m).generate(prompts, SamplingParams(6, 0.0)) for m in (model, again))
    assert [r.ids for r in old] == [r.ids for r in new] and [r.logprobs for r in old] == [r.logprobs for r in new]
    assert back(again.tokenizer, "go to desk 1") == "go to desk 1" and again.parameters == model.parameters
    assert again.tokenizer.chat_template == tokenizer.chat_template


def test_unknown_family_and_missing_folder_are_clear(tokenizer, tmp_path):
    with pytest.raises(DataError, match="'Lama'.*LamaConfig"):
        build_model(tokenizer, "Lama")
    with pytest.raises(DataError, match="expected a hub name or a folder"):
        load_language_model(tmp_path / "nothing here")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError):
        load_language_model(tmp_path)


def test_entities_share_their_type(tokenizer):
    """'mug 1' and 'mug 2' have the part 'mug' in common, so what is learned of one helps with the other."""
    model = build_model(tokenizer, hidden_size=16, layers=1)
    vocab, table = tokenizer.get_vocab(), model.token_embeddings()
    step = table[vocab["desk 2"]] - table[vocab["desk 1"]]
    assert torch.allclose(step, table[vocab["drawer 2"]] - table[vocab["drawer 1"]], atol=1e-6)


# ---- text client


def test_client_answers_in_order_whatever_the_grouping(model):
    requests = [Request(f"desk {1 + i % 3}", max_new_tokens=2 + i % 2, temperature=0.0) for i in range(12)]
    client = GeneratorClient(model)
    together = client.complete(requests)
    assert client.calls == 2 and [client.complete([r])[0] for r in requests] == together
    assert all(1 <= r.completion_tokens <= q.max_new_tokens for r, q in zip(together, requests, strict=True))
    assert all(r.prompt_tokens > 0 and "<|" not in r.text for r in together)
    assert client.complete([]) == []


def test_client_seeds(model):
    requests = [Request("desk 1", max_new_tokens=6)] * 8
    one, same, other = (GeneratorClient(model, seed=seed).complete(requests) for seed in (0, 0, 5))
    assert one == same != other
    client = GeneratorClient(model, seed=0)
    assert client.complete(requests) == one and client.complete(requests) != one  # each call draws anew
