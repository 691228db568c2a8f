"""What the vocabulary document says of sizes, ids, training and trouble, item by item."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tokcom_hf import (
    LFQConfig,
    LFQExpandedConfig,
    LFQExpandedModel,
    LFQProcessor,
    LFQQuantizer,
    decode_tokens_to_lfq_codes,
    encode_lfq_codes_to_tokens,
    expand_vocab_for_lfq,
    get_lfq_token_range,
)
from tokcom_hf.small_models.scene_tokenizer import scene_tokenizer
from tokcom_hf.small_models.small_internvl import IMAGE_TOKENS

OLD, BITS, WIDTH = 40, 4, 16


def base(tied=False, **changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": OLD, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def expanded(tied=False, **options):
    return expand_vocab_for_lfq(model=base(tied), lfq_config={"output_dim": BITS}, **options)


def loss_of(model, new=True):
    ids = torch.tensor([[1, 2, OLD + 3, OLD + 15, 5] if new else [1, 2, 3, 4, 5]])
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("output_dim", [1, 4, 10, 16])
def test_the_new_vocabulary_has_two_to_the_output_dim_more_ids(output_dim):
    config = {"output_dim": output_dim}
    model = expand_vocab_for_lfq(model=base(), lfq_config=config)
    start, end = get_lfq_token_range(model, config)
    assert model.config.vocab_size == OLD + 2**output_dim and (start, end) == (OLD, OLD + 2**output_dim)
    # The range is half-open: its last id is an LFQ token, the next one is refused.
    assert decode_tokens_to_lfq_codes(torch.tensor([[end - 1]]), start, output_dim).sum() == output_dim
    with pytest.raises(ValueError, match="no LFQ tokens"):
        decode_tokens_to_lfq_codes(torch.tensor([[end]]), start, output_dim)
    with torch.no_grad():
        assert model(torch.tensor([[0, OLD - 1, start, end - 1]])).logits.shape[-1] == end
    with pytest.raises(ValueError, match="24"):
        expand_vocab_for_lfq(model=base(), lfq_config={"output_dim": 25})


def test_every_bit_has_its_power_of_two():
    for bit in range(16):
        code = torch.zeros(1, 1, 16)
        code[..., bit] = 1
        assert encode_lfq_codes_to_tokens(lfq_codes=code, start_token_id=7, output_dim=16).item() == 7 + 2**bit


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_old_rows(tied, frozen):
    model = expanded(tied, freeze_original=frozen)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    loss_of(model).backward()
    for side in (table, head):
        gradient = side.weight.grad
        assert gradient[OLD:].norm() > 0 and bool(gradient[:OLD].any()) == (not frozen)
        assert side.trainable_mask.tolist() == [not frozen] * OLD + [True] * 16
    assert (head.weight.grad[OLD:].norm() == table.weight.grad[OLD:].norm()) == tied
    # The layers between the tables are not what `freeze_original` is about.
    assert model.base.model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_the_mask_follows_freezing_at_any_time():
    model = expanded()
    table = model.get_input_embeddings()
    share = lambda: table.trainable_mask.sum().item() / table.trainable_mask.numel()  # noqa: E731
    assert share() == pytest.approx(16 / 56)
    model.freeze_original_rows(False)
    assert share() == 1
    model.lfq_rows.requires_grad_(False)
    model.freeze_original_rows()
    assert share() == 0 and share() == model.trainable_rows()["share"]


def test_without_freezing_old_rows_move_and_frozen_ones_stay_bitwise():
    for frozen in (True, False):
        model = expanded(freeze_original=frozen)
        before = model.get_input_embeddings().weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for new in (True, False, True):
            loss_of(model, new).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = model.get_input_embeddings().weight
        assert torch.equal(before[:OLD], after[:OLD]) == frozen
        assert not torch.equal(before[OLD:], after[OLD:])


def test_what_expansion_costs_in_parameters():
    """Untied tables grow on both sides, tied ones once."""
    for tied, sides in ((False, 2), (True, 1)):
        plain = sum(p.numel() for p in base(tied).parameters())
        assert sum(p.numel() for p in expanded(tied).parameters()) == plain + sides * 16 * WIDTH


@pytest.mark.parametrize("padding_idx", [0, OLD - 1])
def test_a_padding_row_stays_what_it_is(padding_idx):
    """`padding_idx` belongs to the old table: its row keeps its values, gets no gradient, and survives merging."""
    plain = base(pad_token_id=padding_idx)
    row = plain.get_input_embeddings().weight[padding_idx].clone()
    model = expand_vocab_for_lfq(model=plain, lfq_config={"output_dim": BITS}, freeze_original=False)
    ids = torch.tensor([[1, padding_idx, OLD, OLD + 1]])
    model(input_ids=ids, labels=torch.tensor([[-100, -100, OLD, OLD + 1]])).loss.backward()
    assert not model.base.get_input_embeddings().weight.grad[padding_idx].any()
    assert torch.equal(model.get_input_embeddings().weight[padding_idx], row)
    merged = model.merge_and_unload().get_input_embeddings()
    assert merged.padding_idx == padding_idx and torch.equal(merged.weight[padding_idx], row)


def test_tables_that_do_not_fit_are_named():
    plain = base()
    plain.lm_head = torch.nn.Linear(WIDTH, OLD + 1, bias=False)
    with pytest.raises(
        ValueError, match=r"embedding of LlamaForCausalLM has shape \(40, 16\) and its head \(41, 16\)"
    ):
        expand_vocab_for_lfq(model=plain)
    with pytest.raises(ValueError, match="cannot be replaced or resized; resize the base model before"):
        expanded().resize_token_embeddings(100)


def test_a_wrong_number_of_bits_or_start_is_refused(tmp_path):
    model = expanded()
    model.save_pretrained(tmp_path / "saved", include_base=True)
    with pytest.raises(ValueError, match="LFQ tokens have 4 bits, but lfq_config says 16"):
        get_lfq_token_range(model, {"output_dim": 16})
    ids = torch.tensor([[OLD, OLD + 15]])
    # A start that is too small or too large leaves ids outside its range; both are named with the range that is meant.
    for start in (OLD + 1, OLD - 1):
        with pytest.raises(ValueError, match=rf"no LFQ tokens: these are {start} … {start + 15}"):
            decode_tokens_to_lfq_codes(token_ids=ids, start_token_id=start, output_dim=BITS)
    # Read with fewer bits, the ids are refused, too; with more, the codes have more places.
    with pytest.raises(ValueError, match="1 of 2 token ids are no LFQ tokens"):
        decode_tokens_to_lfq_codes(token_ids=ids, start_token_id=OLD, output_dim=3)
    with pytest.raises(ValueError, match="vocab_size=57 is not lfq_start_token_id"):
        LFQExpandedConfig(output_dim=BITS, lfq_start_token_id=OLD, vocab_size=57)
    assert LFQExpandedConfig(output_dim=BITS, lfq_start_token_id=OLD, vocab_size=56).vocab_size == 56
    config = LFQExpandedModel.from_pretrained(tmp_path / "saved").config
    assert "vocab_size" not in config.to_dict()
    config.lfq_start_token_id = OLD - 8
    with pytest.raises(ValueError, match="lfq_start_token_id=32, but the base model's vocabulary table has 40 rows"):
        LFQExpandedModel(config)


def test_the_tokenizer_goes_along_without_new_strings(tmp_path):
    tokenizer = scene_tokenizer(IMAGE_TOKENS)
    size = len(tokenizer)
    model = expand_vocab_for_lfq(model=base(vocab_size=size), lfq_config={"output_dim": BITS}, tokenizer=tokenizer)
    processor = LFQProcessor.from_model(model, tokenizer)
    word = tokenizer.convert_ids_to_tokens(size - 1)
    ids = [size - 1, size + 5, size + 15]
    assert processor.decode(ids) == f"{word}<lfq:5><lfq:15>"
    assert processor(text=f"{word}<lfq:5><lfq:15>")["input_ids"] == [ids]
    assert len(tokenizer) == size
    processor.save_pretrained(tmp_path)
    assert LFQProcessor.from_pretrained(tmp_path).decode(ids) == processor.decode(ids)


def test_saved_and_loaded_with_and_without_the_base(tmp_path):
    base(tied=True).save_pretrained(tmp_path / "base")
    model = expand_vocab_for_lfq(str(tmp_path / "base"), lfq_config={"output_dim": BITS}).eval()
    model.freeze_base()
    ids = torch.tensor([[1, OLD + 3, 4]])
    model.save_pretrained(tmp_path / "rows", include_base=False)
    model.save_pretrained(tmp_path / "whole", include_base=True)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("rows", "whole")}
    assert sizes["rows"] < sizes["whole"]
    with torch.no_grad():
        expected = model(ids).logits
        for name in sizes:
            assert torch.equal(LFQExpandedModel.from_pretrained(tmp_path / name).eval()(ids).logits, expected)
        model.merge_and_unload().save_pretrained(tmp_path / "plain")
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert get_lfq_token_range(plain) == (OLD, OLD + 16)


def test_every_new_row_can_be_told_from_the_others():
    """`zeros` starts all ids alike, `mean` and `random` do not; what is alike at first differs after a step."""
    for method, distinct in (("zeros", 1), ("mean", 16), ("random", 16)):
        assert len(expanded(embedding_init_method=method).lfq_rows.embedding.unique(dim=0)) == distinct
    bare = expanded(embedding_init_method="mean", embedding_init_std=0.0)
    assert len(bare.lfq_rows.embedding.unique(dim=0)) == 1
    torch.testing.assert_close(bare.lfq_rows.embedding[7], bare.base.get_input_embeddings().weight.mean(0))
    model = expanded(embedding_init_method="zeros")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model).backward()
    optimizer.step()
    assert len(model.lfq_rows.tables()[0].unique(dim=0)) > 1


def test_the_quantizer_of_joint_training_has_the_documented_shape():
    """256 features of width 4096 → 16 bits by a transformer of 16 layers, then back to the language model's width."""
    with torch.device("meta"):
        model = LFQQuantizer(LFQConfig(group_norm=False))
        output = model(torch.empty(2, 256, 4096), return_loss=False)
    assert output.codes.shape == (2, 256, 16) and output.embeddings.shape == (2, 256, 4096)
    assert len(model.blocks) == 16 and model.config.num_attention_heads == 16 and model.to_bits.in_features == 1024
    assert [type(layer).__name__ for layer in model.from_bits] == ["Linear", "GELU", "Linear"]


def test_new_rows_learn_with_the_plain_trainer_of_transformers(tmp_path):
    model = expanded(embedding_init_method="mean")
    ids = torch.tensor([1, 2, OLD + 3, OLD + 15, 5])
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        learning_rate=3e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = loss_of(model).item()
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 16).train()
    assert loss_of(model.eval()).item() < 0.5 * before
