"""The last layer computes what is asked for only: states, losses, gradients and samples stay those of the whole pass."""

import pytest
import torch
from torch.nn import functional as F

from dreamgym.core.language_model import Rows, predicting_states
from dreamgym.core.small_lm import BufferedCache, SmallLMConfig, SmallLMForCausalLM, asked_columns


@pytest.fixture(params=[1, 3, 4], ids=lambda kernel: f"kernel {kernel}")
def small(request):
    torch.manual_seed(0)
    model = SmallLMForCausalLM(SmallLMConfig(vocab_size=11, hidden_size=16, conv_kernel=request.param)).double()
    for p in model.parameters():  # closing projections start at zero: a layer that does nothing shows nothing
        torch.nn.init.normal_(p, std=0.3)
    return model


def spoken(spans, width=40):  # rows of random ids in which the agent speaks at the given spans
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, those in enumerate(spans):
        for start, end in those:
            mask[row, start:end] = True
    return Rows(torch.randint(11, mask.shape, generator=torch.Generator().manual_seed(1)), mask)


CASES = {
    "one response each": [[(30, 33)], [(20, 26)], [(37, 40)]],
    "at the very start": [[(1, 3)], [(2, 4)], [(39, 40)]],
    "several turns": [[(5, 7), (8, 9), (30, 32)], [(1, 2), (3, 4)], [(20, 22)]],
    "a row without any": [[(30, 33)], [], [(12, 13)]],
    "nothing at all": [[], [], []],
    "most of the row": [[(3, 33)], [(2, 9)], [(1, 40)]],
}


@pytest.mark.parametrize("spans", CASES.values(), ids=CASES)
def test_states_and_gradients_are_those_of_the_whole_pass(small, spans):
    rows, found = spoken(spans), []
    at, tokens = rows.action_mask[:, 1:], rows.ids[:, 1:][rows.action_mask[:, 1:]]
    for asked in (False, True):
        small.zero_grad()
        if asked:
            states, head = predicting_states(small, rows)
            logits = head(states)
        else:
            logits = small(rows.ids).logits[:, :-1][at]
        F.cross_entropy(logits, tokens, reduction="sum").backward()
        found.append((logits.detach(), [p.grad.clone() for p in small.parameters()]))
    (whole, gradients), (few, same) = found
    assert len(few) == rows.tokens and torch.allclose(few, whole, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(same, gradients, strict=True))


def test_the_last_layer_works_on_few_columns(small, monkeypatch):
    seen, layer = [], small.layers[-1]
    layer.down.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    predicting_states(small, spoken(CASES["one response each"]))
    assert seen == [(3, 6 + small.config.conv_kernel - 1)]


def test_columns_keep_their_order():
    at = torch.rand(50, 30, generator=torch.Generator().manual_seed(0)) < 0.1
    columns, wanted = asked_columns(at, 2)
    for row, cols, those in zip(at, columns, wanted, strict=True):
        assert cols[those].tolist() == row.nonzero()[:, 0].tolist()
        for place in those.nonzero()[:, 0].tolist():  # right behind the two columns before it
            column = int(cols[place])
            assert cols[max(place - 2, 0) : place].tolist()[-min(column, 2) :] == [*range(max(column - 2, 0), column)]


@pytest.mark.parametrize("chunks", [(12,), (6, 6), (1, 11), (3, 2, 7)], ids=str)
def test_reading_for_the_last_logits_leaves_the_same_cache(small, chunks):
    lengths = torch.tensor([12, 5, 1, 9])  # padded on the left; some rows begin in a later chunk
    mask = torch.arange(12) >= (12 - lengths)[:, None]
    ids = torch.randint(11, mask.shape, generator=torch.Generator().manual_seed(2))
    position_ids, whole = (mask.long().cumsum(1) - 1).clamp(min=0), small(ids, mask).logits
    cache, end = BufferedCache(3), 0
    for chunk in chunks:
        start, end = end, end + chunk
        how = {"past_key_values": cache, "position_ids": position_ids[:, start:end], "logits_to_keep": 1}
        logits = small(ids[:, start:end], mask[:, :end], **how).logits
        real = mask[:, end - 1]
        assert logits.shape[1] == 1 and torch.allclose(logits[real, 0], whole[real, end - 1], atol=1e-12)
    assert torch.equal(cache.table, small.token_embeddings())  # summed once for all chunks
    following = torch.tensor([[3], [1], [4], [1]])
    more = small(torch.cat([ids, following], 1), F.pad(mask, (0, 1), value=True)).logits[:, -1]
    again = small(following, F.pad(mask, (0, 1), value=True), position_ids=lengths[:, None], past_key_values=cache)
    assert torch.allclose(again.logits[:, -1], more, atol=1e-12)


def test_half_precision_takes_left_padding(small):
    model, mask = small.to(torch.bfloat16), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4]])
    padded = model(ids, attention_mask=mask).logits[0, 2:]
    assert padded.dtype == torch.bfloat16
    assert torch.allclose(padded, model(ids[:1, 2:]).logits[0], atol=0.1)
