"""The codec and the policy module: what is decoded, padded, masked and scored."""

from dataclasses import fields

import pytest
import torch

from dreamgym.core.config import PolicyModelConfig, load_config
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.core.language_model import LanguageModel, build_model, make_rows, train_tokenizer
from dreamgym.environments.household_state import HouseholdMapper
from dreamgym.training.policy import (
    Policy,
    TurnCodec,
    agent_role,
    check_prompted,
    check_rates,
    demonstrated_turns,
    is_prompted,
    make_codec,
    parse_thinking,
)
from dreamgym.training.preparation import make_policy

HOME = "task: put a mug in cabinet.\nat: nowhere\nhold: nothing\nunseen: cabinet 1, drawer 1\nlast: ok"
STATES, ACTIONS = ["at: desk 1", "at: desk 2", "hold: mug 1"], ["go to desk 2", "take mug 1", "put mug 1"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*STATES, *ACTIONS, "<think>so it is</think><action></action>"])


@pytest.fixture(scope="module", params=["SmallLM", "Llama"])
def policy(request, tokenizer):
    model = build_model(tokenizer, request.param, hidden_size=32, layers=2, seed=1)
    made = Policy(LanguageModel(model, tokenizer))
    with torch.no_grad():
        for weights in made.parameters():
            weights += 0.1 * torch.randn_like(weights)
    return made


# ---- responses


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think>a</think><action>open desk 1</action>", "open desk 1"),
        ("<THINK>a</Think>\n<Action>\n open  desk 1\n</action >", "open desk 1"),
        ("<action>open desk 1</action>", "open desk 1"),
        ("so <action>open desk 1</action> it is", "open desk 1"),
        ("<think>a<action>close</action></think><action>open desk 1</action>", "open desk 1"),
        ("<think>a</think>b</think><action>open desk 1</action>", "open desk 1"),
        ("<action>open desk 1</action><action> open desk  1 </action>", "open desk 1"),
        ("<think>a</think><action>open desk 1", "open desk 1"),
        ("<action>if x < 3 </action>", "if x < 3"),
    ],
)
def test_forgiving(text, action):
    assert (parse_thinking(text).action, parse_thinking(text).problem) == (action, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <action>"),
        ("open desk 1", "no <action>"),
        ("</action>open desk 1", "no <action>"),
        ("<think>a<action>open</action>", "the thought is not closed"),
        ("<action>open</action><think>a", "the thought is not closed"),
        ("<think>a<action>open</action></think>", "no <action>"),
        ("<action>open</action><action>close</action>", "2 different actions"),
        ("<action></action>", "the action is empty"),
        ("<action>open<action>close</action>", "an <action> is not closed"),
        ("<actions>open</actions>", "no <action>"),
    ],
)
def test_exact(text, problem):
    assert (parse_thinking(text).action, parse_thinking(text).problem) == ("", problem)


def test_an_action_that_was_cut_off_is_none():
    assert parse_thinking("<action>go to desk 1", ended=False).problem == "an <action> is not closed"
    assert parse_thinking("<action>go to desk 12</action> and", ended=False).action == "go to desk 12"


@pytest.mark.parametrize("form", ["plain", "think"])
def test_demonstrated_responses_come_back(tokenizer, form):
    codec = TurnCodec(tokenizer, response_format=form)
    for action in ACTIONS:
        parsed = codec.parse(codec.response(action, "so it is"))
        assert parsed.valid and parsed.action == action == codec.action(codec.response(action))


# ---- prompts


@pytest.mark.parametrize("context", ["state", "history", "conversation"])
def test_demonstrations_are_what_the_template_makes(tokenizer, context):
    codec = TurnCodec(tokenizer, context=context, history=1)
    for number, turn in enumerate(demonstrated_turns(codec, STATES, ACTIONS)):
        start = {"state": number, "history": max(0, number - 1), "conversation": 0}[context]
        chat = [m for i in range(start, number) for m in (("user", STATES[i]), ("assistant", ACTIONS[i]))]
        messages = [{"role": role, "content": text} for role, text in [*chat, ("user", STATES[number])]]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert turn.prompt_ids == whole and codec.action(turn.response_ids) == ACTIONS[number]


@pytest.mark.parametrize("form", ["plain", "think"])
@pytest.mark.parametrize("context", ["state", "history", "conversation"])
def test_what_a_policy_is_told(context, form):
    """Its role in the system message; what is possible stands in the last message, and in a conversation in each."""
    states = [HOME, HouseholdMapper().merge(HOME, "at: drawer 1\ndrawer 1: open, mug 1")]
    told, actions = agent_role(form, HouseholdMapper()), ["go to drawer 1", "take mug 1 from drawer 1"]
    tokenizer = train_tokenizer([*states, *actions, told, "Possible actions: close <think></think><action></action>"])
    codec = TurnCodec(tokenizer, context, response_format=form, mapper=HouseholdMapper())
    first, second = demonstrated_turns(codec, states, actions)
    shown = [
        f"{state}\n\nPossible actions:\n" + "\n".join(HouseholdMapper().admissible_actions(state)) for state in states
    ]
    assert actions[0] in shown[0] and actions[1] in shown[1] and actions[1] not in shown[0]
    said = tokenizer.decode(codec.response(actions[0])[:-1])
    before = {"state": [], "history": [states[0], said], "conversation": [shown[0], said]}[context]
    for turn, texts in ((first, shown[:1]), (second, [*before, shown[1]])):
        roles = ["system", *["user", "assistant"] * 2]
        chat = [{"role": role, "content": text} for role, text in zip(roles, [told, *texts], strict=False)]
        assert turn.prompt_ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_who_is_told(caplog):
    """A named model that is not cloned, for want of demonstrations or of offline data, and whoever is asked to be."""
    named, no_data = {"policy_model.name": "some/model"}, {"environment.offline_data": None}
    alone, never = {"policy_model.bc_demonstrations": 0}, {"policy_model.prompted": False}
    for asked, told in (
        ({}, False),
        (no_data | alone, False),
        (named, False),
        (named | {"policy_model.prompted": True}, True),
        (named | no_data, True),
        (named | alone, True),
    ):
        config = load_config(overrides=asked)
        check_prompted(config)
        assert is_prompted(config) == told and not caplog.text
        assert not is_prompted(load_config(overrides=asked | never))
    check_prompted(load_config(overrides=named | no_data | never))
    assert "some/model is neither cloned nor told what to do; set policy_model.prompted to true" in caplog.text


def test_only_who_is_told_sees_what_is_possible():
    mapper, tiny = HouseholdMapper(), {"policy_model.d_model": 16}
    for told, shown in ((True, mapper), (None, None)):
        config = load_config(overrides=tiny | {"policy_model.prompted": told})
        assert make_policy(config, ACTIONS, mapper=mapper).codec.mapper is shown


@pytest.mark.parametrize(
    ("asked", "warned"),
    [
        ({}, ()),
        ({"policy_model.name": "some/model"}, ("policy_model.bc_lr", "rl.lr", "rl.value_lr")),
        ({"policy_model.name": "some/model", "policy_model.bc_demonstrations": 0}, ("rl.lr", "rl.value_lr")),
        ({"policy_model.name": "some/model", "policy_model.bc_lr": 2e-5, "rl.lr": 1e-6, "rl.value_lr": 1e-5}, ()),
        ({"policy_model.name": "some/model", "rl.algorithm": "dpo"}, ("policy_model.bc_lr", "rl.dpo_lr")),
        ({"policy_model.name": "some/model", "rl.algorithm": "grpo"}, ("policy_model.bc_lr", "rl.lr")),
        ({"reasoning_model.name": "some/model"}, ("reasoning_model.lr",)),
        ({"reasoning_model.name": "some/model", "reasoning_model.prompted": True}, ()),
        ({"reasoning_model.name": "some/model", "reasoning_model.provider": "openai"}, ()),
    ],
)
def test_rates_that_ruin_a_pretrained_model(asked, warned, caplog):
    check_rates(load_config(overrides=asked))
    assert tuple(part.split("=")[0] for part in caplog.text.partition("usual are ")[2].split(", ") if part) == warned


def test_checklist_06_templates_must_only_append(tokenizer):
    """A template that rewrites earlier messages is refused where history is shown, with what to do; states are fine."""
    moody = train_tokenizer([*STATES, *ACTIONS])
    moody.chat_template = tokenizer.chat_template + "{{ messages | length }}"
    with pytest.raises(DataError, match="changes earlier messages"):
        TurnCodec(moody, context="conversation")
    for context in ("history", "conversation"):
        with pytest.raises(ConfigError, match=f"policy_model.context: {context}.*to 'state'"):
            make_codec(moody, PolicyModelConfig(context=context))
    assert make_codec(moody, PolicyModelConfig()).context == "state"


def test_checklist_06_templates_that_strip_thoughts_still_append(tokenizer):
    """Suffixes come from a dummy conversation, so what was thought stays in the row as it was sampled."""
    stripping = train_tokenizer([*STATES, *ACTIONS, "<think>so it is</think><action></action>"])
    stripping.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    codec = TurnCodec(stripping, context="conversation", response_format="think")
    turns = demonstrated_turns(codec, STATES, ACTIONS)
    for earlier, later in zip(turns, turns[1:], strict=False):
        said = [*earlier.prompt_ids, *earlier.response_ids]
        assert later.prompt_ids[: len(said)] == said and "<think>" in stripping.decode(later.prompt_ids)


# ---- the module


def test_checklist_04_masks_come_from_lengths(policy, tokenizer):
    """A prompt and a response that contain the padding token are scored in full, and no padding is."""
    pad = tokenizer.pad_token_id
    prompts, responses = [[7, pad, 8], [9, 8]], [[pad, 7, pad], [8]]
    rows = make_rows(prompts, responses)
    assert rows.tokens == 4 and rows.ids[rows.action_mask].tolist() == [pad, 7, pad, 8]
    with torch.no_grad():
        scores = policy(rows)
        for i, at in ((0, slice(0, 3)), (1, slice(3, 4))):
            ids = torch.tensor([[*prompts[i], *responses[i]]])
            logprobs = policy.model(ids).logits[0, len(prompts[i]) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(responses[i])[:, None])[:, 0]
            assert torch.allclose(scores.logprobs[at], expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_checklist_07_the_trainer_divides_by_the_temperature(policy, temperature):
    """Scores under the sampling temperature are the sampler's log-probabilities; others are not. No top-p, no top-k."""
    prompts = policy.codec.prompts(STATES) * 4
    sampling = SamplingParams(6, temperature, 0)
    replies = TransformersGenerator(policy.language_model).generate(prompts, sampling)
    rows, behaviour = make_rows(prompts, [r.ids for r in replies]), torch.tensor(
        [p for r in replies for p in r.logprobs]
    )
    with torch.no_grad():
        assert (policy(rows, temperature).logprobs - behaviour).abs().max() <= 1e-5
        assert (policy(rows, temperature + 0.3).logprobs - behaviour).abs().max() > 1e-2
    assert {field.name for field in fields(SamplingParams)} == {"max_new_tokens", "temperature", "seed", "stop_ids"}


def test_checklist_16_left_to_generate_right_to_train(policy):
    """Prompts of different lengths: padded on the left for the sampler and on the right for scores, both agree."""
    prompts = policy.codec.prompts(["at: desk 1", " ".join(STATES * 6)])
    replies = TransformersGenerator(policy.language_model).generate(prompts, SamplingParams(5, 1.0, 3))
    rows = make_rows(prompts, [r.ids for r in replies])
    assert rows.ids[0, : len(prompts[0])].tolist() == prompts[0]  # the short row starts at the left
    with torch.no_grad():
        scores = policy(rows).logprobs
    assert torch.allclose(scores, torch.tensor([p for r in replies for p in r.logprobs]), atol=1e-5)


def test_checklist_03_a_forced_end_token_is_never_trained_on(policy, tokenizer):
    """A response that was cut off has no end token in its row; the next prompt closes it."""
    codec = TurnCodec(tokenizer, context="conversation")
    (prompt,) = codec.prompts(STATES[:1])
    (reply,) = TransformersGenerator(policy.language_model).generate([prompt], SamplingParams(3, 0.0, stop_ids=()))
    cut = [i for i in reply.ids if i != tokenizer.eos_token_id][:1] or [7]
    turn = demonstrated_turns(codec, STATES[:1], ACTIONS[:1])[0]
    from dataclasses import replace

    (following,) = codec.next_prompts([([replace(turn, response_ids=cut)], STATES[1])])
    assert following[: len(prompt) + 1] == [*prompt, *cut] and following[len(prompt) + 1] == tokenizer.eos_token_id
    rows = make_rows([prompt], [cut])
    assert rows.ids[rows.action_mask].tolist() == cut
