"""ContextEncoder: causal states of the text so far, their cache, and heads that predict the next tokens."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from tests.helpers.tokcom_tools import CONTEXT, seeded, small
from tokcom_hf.models.tokcom_context_encoder import ContextEncoder

START = 50


@pytest.fixture(scope="module")
def encoder() -> ContextEncoder:
    return small("context").context


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (2, 9), generator=seeded())


@torch.no_grad()
def test_a_state_reads_the_tokens_up_to_it_and_none_behind(encoder, ids):
    states = encoder(ids)
    assert states.shape == (2, 10, 48)
    for place in range(9):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 50
        changed = encoder(other)
        assert torch.equal(changed[:, : place + 1], states[:, : place + 1]), place
        assert (changed[:, place + 1 :] - states[:, place + 1 :]).abs().amax(-1).min() > 1e-6, place


@torch.no_grad()
def test_the_first_state_is_that_of_the_start_token_alone(encoder, ids):
    empty = encoder(ids[:, :0])
    assert empty.shape == (2, 1, 48)
    torch.testing.assert_close(empty[:, 0], encoder(ids)[:, 0])
    direct = encoder.model(input_ids=torch.full((2, 1), START)).last_hidden_state
    assert torch.equal(empty, direct)


@pytest.mark.parametrize("portions", [(9,), (1,) * 9, (4, 4, 1), (0, 3, 6)])
@torch.no_grad()
def test_any_portions_equal_the_whole(encoder, ids, portions):
    cache, start, states = DynamicCache(config=encoder.model.config), 0, []
    for size in portions:
        states.append(encoder(ids[:, start : start + size], cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(states, dim=1), encoder(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_padding_on_the_left_is_not_seen(encoder, ids, cached):
    lengths = (9, 4)
    rows, mask = ids.clone(), torch.ones(2, 9, dtype=torch.long)
    rows[1, :5], mask[1, :5] = 33, 0
    cache = DynamicCache(config=encoder.model.config) if cached else None
    states = encoder(rows, mask, cache)
    more = torch.randint(0, 50, (2, 3), generator=seeded(1))
    if cached:
        last = encoder(more, torch.nn.functional.pad(mask, (0, 3), value=1), cache)
    for row, length in enumerate(lengths):
        own = rows[row, 9 - length :][None]
        torch.testing.assert_close(states[row, -length:], encoder(own)[0, 1:], atol=1e-5, rtol=1e-5)
        if cached:
            alone = encoder(torch.cat([own, more[row][None]], dim=1))
            torch.testing.assert_close(last[row], alone[0, -3:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_heads_never_predict_the_start_token(encoder, ids):
    states = encoder(ids)
    logits = encoder.head_logits(states)
    assert logits.shape == (2, 10, 4, 51)
    assert bool((logits[..., START] == torch.finfo(logits.dtype).min).all())
    weight, table = encoder.heads.weight.view(4, 48, 48), encoder.model.embed_tokens.weight
    for head in range(4):
        expected = states @ weight[head].T @ table.T
        torch.testing.assert_close(logits[:, :, head, :50], expected[..., :50], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_offloaded_and_adapted_heads_have_the_loss_of_their_logits():
    from accelerate import cpu_offload
    from peft import LoraConfig, inject_adapter_in_model

    ids, cpu = torch.randint(0, 50, (2, 9), generator=seeded()), torch.device("cpu")
    labels = torch.randint(0, 50, (20, 4), generator=seeded(1))
    expected = small("context").context
    adapted = inject_adapter_in_model(
        LoraConfig(target_modules=["heads", "embed_tokens"], init_lora_weights=False), small("context").context
    )
    offloaded = small("context").context
    cpu_offload(offloaded, execution_device=cpu)
    assert offloaded.heads.weight.is_meta and offloaded.model.embed_tokens.weight.is_meta
    losses = []
    for encoder in (expected, offloaded, adapted):
        states = encoder(ids)
        logits = encoder.head_logits(states).flatten(0, 1)
        whole = torch.nn.functional.linear(encoder.heads(states).unflatten(-1, (4, -1)), encoder.table(cpu)).flatten(
            0, 1
        )
        assert torch.equal(logits[..., :START], whole[..., :START])
        for first, last in ((0, 1), (1, 4)):
            loss = encoder.cross_entropy(states.flatten(0, 1), labels[:, first:last], first, last)
            plain = torch.nn.functional.cross_entropy(
                whole[:, first:last].flatten(0, 1), labels[:, first:last].flatten()
            )
            torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
            losses.append(loss)
    torch.testing.assert_close(losses[:2], losses[2:4])
    assert not torch.allclose(losses[0], losses[4])


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 4), (0, 4)])
@torch.no_grad()
def test_the_loss_of_heads_is_nats_per_counted_token(encoder, first, last):
    states = torch.randn(7, 48, generator=seeded())
    labels = torch.randint(0, 50, (7, last - first), generator=seeded(1))
    labels[2] = -100
    weight, table = encoder.heads.weight.view(4, 48, 48)[first:last], encoder.model.embed_tokens.weight
    logits = torch.einsum("rd,hed,ve->rhv", states, weight, table)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(encoder.cross_entropy(states, labels, first, last), expected, atol=1e-5, rtol=1e-5)


def test_a_resize_keeps_the_tokens_and_moves_the_start_token():
    torch.manual_seed(0)
    encoder = ContextEncoder(LlamaConfig(**CONTEXT, vocab_size=51, pad_token_id=None), 4, START).eval()
    ids = torch.randint(0, 40, (2, 5), generator=seeded())
    before = encoder(ids)
    for rows in (60, 45):
        encoder.resize(rows, rows - 1, True)
        assert encoder.start_token_id == rows - 1 and encoder.model.config.vocab_size == rows
        assert torch.equal(encoder(ids), before)
        assert encoder.head_logits(before).shape[-1] == rows
