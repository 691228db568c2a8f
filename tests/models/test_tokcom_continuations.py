"""Several continuations of a prompt: it is read once, and each continuation is what the prompt alone would get."""

import pytest
import torch

from tokcom_hf import TokComConfig, TokComModel

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48,
}  # fmt: skip


@pytest.mark.parametrize("context", [None, SHAPE])
def test_a_prompt_is_read_once_for_all_its_continuations(context):
    torch.manual_seed(0)
    blocks = {} if context is None else {"block_sizes": [1, 2], "block_size": 2}
    config = TokComConfig(
        vae=SHAPE | {"vocab_size": 31, "latent_size": 8}, denoiser=dict(SHAPE), noise_std=1.0, num_steps=2,
        context=None if context is None else dict(context), **blocks,
    )  # fmt: skip
    model = TokComModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    # Rows of each reading: by the context, or of the prompt's chunks (two each) by the encoder.
    rows: list[int] = []
    reader = model.vae.encoder if context is None else model.context
    reader.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    ids = torch.randint(30, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def draw(prompts, prompt_mask, **more):
        generator = torch.Generator().manual_seed(3)
        return model.generate(prompts, attention_mask=prompt_mask, num_generate_chunks=4, generator=generator, **more)

    together = draw(ids, mask, num_return_sequences=3)
    assert rows == ([4] if context is None else [2, 6])
    apart = draw(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    assert torch.equal(together, apart)
    assert len(torch.unique(together[:3], dim=0)) == 3
