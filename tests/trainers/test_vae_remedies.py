"""What lets a TokComVAE write tokens that its text hardly holds: random chunks, and blocks that start at zero."""

import pytest
import torch

from tokcom_hf import TokComVAE, TokComVAEConfig, TokComVAETrainer, TokComVAETrainingArguments

SHAPE = {
    "vocab_size": 101, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_hidden_layers": 1, "latent_size": 64, "chunk_projection": "all", "fixed_norm": True, "initializer_range": 0.18,
}  # fmt: skip


def new_vae(**changes) -> TokComVAE:
    torch.manual_seed(0)
    return TokComVAE(TokComVAEConfig(**SHAPE | changes))


def rows(count: int, tokens: int = 20) -> list[dict[str, torch.Tensor]]:
    """Text that holds the first ids of the vocabulary alone."""
    ids = torch.randint(tokens, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def trainer(folder, vae: TokComVAE, **changes) -> TokComVAETrainer:
    settings = {
        "output_dir": str(folder), "max_steps": 80, "per_device_train_batch_size": 32, "learning_rate": 1e-2,
        "muon_learning_rate": 0.02, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "sample_every": 0,
        "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    arguments = TokComVAETrainingArguments(**settings | changes)
    return TokComVAETrainer(model=vae, args=arguments, train_dataset=rows(256), eval_dataset=rows(8))


def accuracy(vae: TokComVAE, ids: torch.Tensor) -> float:
    vae.eval()
    with torch.no_grad():
        return (vae.decode(vae.encode(ids)) == ids).float().mean().item()


def test_tokens_that_the_text_does_not_hold_are_learned_from_random_chunks_and_sooner_from_zero(tmp_path):
    seen = torch.stack([row["input_ids"] for row in rows(8)])
    unseen = torch.randint(20, 100, (32, 16), generator=torch.Generator().manual_seed(1))
    reached = {}
    for share, start_at_zero in ((0.0, True), (0.5, False), (0.5, True)):
        vae = new_vae(zero_init_residual=start_at_zero)
        trainer(tmp_path / f"{share}{start_at_zero}", vae, random_chunks=share).train()
        assert accuracy(vae, seen) > 0.8
        reached[share, start_at_zero] = accuracy(vae, unseen)
    assert reached[0.0, True] < 0.2 and reached[0.5, True] > 0.8
    assert reached[0.5, True] > reached[0.5, False] + 0.2


def test_random_chunks_replace_whole_chunks_never_by_the_omni_token(tmp_path):
    part = trainer(tmp_path, new_vae(omni_token_id=7), random_chunks=0.25)
    ids = torch.full((400, 40), 100)
    mixed = part.with_random_chunks(ids).view(-1, 4)
    replaced = (mixed != 100).any(dim=1)
    assert abs(replaced.float().mean().item() - 0.25) < 0.03
    drawn = mixed[replaced].unique().tolist()
    assert drawn == [token for token in range(101) if token != 7]
    assert ids.eq(100).all()


def test_random_chunks_are_of_training_alone_and_a_share(tmp_path):
    losses = [
        trainer(tmp_path / str(share), new_vae(), random_chunks=share).evaluate()["eval_loss"] for share in (0, 1.0)
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        TokComVAETrainingArguments(output_dir=str(tmp_path), random_chunks=1.5)


def test_blocks_that_start_at_zero_pass_their_input_on_and_keep_what_is_loaded(tmp_path):
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for start_at_zero in (True, False):
        vae = new_vae(zero_init_residual=start_at_zero)
        for part in (vae.encoder, vae.decoder):
            assert torch.equal(part(hidden), part.norm(hidden)) is start_at_zero
    vae = new_vae(zero_init_residual=True)
    torch.nn.init.normal_(vae.encoder.layers[0].mlp.down_proj.weight)
    vae.save_pretrained(tmp_path)
    loaded = TokComVAE.from_pretrained(tmp_path)
    assert loaded.config.zero_init_residual
    assert torch.equal(loaded.encoder(hidden), vae.encoder(hidden))


def test_the_embedding_and_the_head_start_at_a_scale_of_their_own():
    for tied in (True, False):
        vae = new_vae(embedding_initializer_range=0.5, tie_word_embeddings=tied)
        assert (vae.lm_head.weight is vae.embed_tokens.weight) is tied
        for weight, std in ((vae.embed_tokens.weight, 0.5), (vae.lm_head.weight, 0.5), (vae.latent_proj.weight, 0.18)):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert new_vae().embed_tokens.weight.std().item() == pytest.approx(0.18, rel=0.05)


def following_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Text in which each chunk tells what the next one is: the same four ids, one higher."""
    start = torch.randint(20, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + torch.arange(4).repeat_interleave(4)) % 20
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def hinted_loss(vae: TokComVAE, before: torch.Tensor, latents: torch.Tensor, ids: torch.Tensor) -> float:
    shifted = vae.hint.noisy_latents(before, latents, vae.embed_tokens)
    return vae.cross_entropy(vae.decode_hidden(shifted), ids[:, vae.hint.tokens :]).item()


def test_a_hint_of_the_tokens_before_reads_latents_that_noise_has_hidden(tmp_path):
    vae = new_vae(hint_tokens=4, latent_noise=0.5)
    part = trainer(tmp_path, vae, max_steps=120)
    part.train_dataset = following_rows(256)
    part.train()
    ids = torch.stack([row["input_ids"] for row in following_rows(64)])
    vae.train()
    torch.manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(ids).flatten(0, 1)
        hinted = hinted_loss(vae, ids, latents, ids)
        # A hint of other text tells the wrong chunk.
        torch.manual_seed(0)
        misled = hinted_loss(vae, ids.roll(7, dims=1).flip(0), latents, ids)
    assert hinted < 0.5 * misled
    plain = TokComVAE(TokComVAEConfig(**SHAPE))
    assert not [name for name in plain.state_dict() if name.startswith("hint")]


def test_hints_need_rows_of_text_and_whole_chunks():
    with pytest.raises(ValueError, match="hint_tokens must be a multiple of chunk_size=4, got 6"):
        new_vae(hint_tokens=6)
    vae = new_vae(hint_tokens=8).train()
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="hint_tokens=8 needs longer rows of text to train on, got 8 tokens"):
        vae(ids, labels=ids)
    # Only training needs them.
    assert vae.eval()(ids, labels=ids).loss.isfinite()
