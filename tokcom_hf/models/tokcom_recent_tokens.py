"""RecentTokens: what the tokens just before a token say of it, by a network that is small enough for every small step.

    r = expected row of read(table)                    guess at each token, from evidence and the denoiser's states s
    h = W_s s + W_r [r of the three tokens before] + place
    s' = s + up(linear(norm(h + SwiGLU(norm(h)))))     corrected states, whose products with the table are the logits

The denoiser is called a few times along the flow. Between two calls the tokens of a block are decided one after another; a
later one must not contradict an earlier one that the last call did not know.
"""

from typing import Any

import torch
from torch import nn

from .shared_layers import SwiGLU

# Tokens that are read before each token.
WINDOW = 3


class RecentTokens(nn.Module):
    """Corrections of the tokens' states from the guesses at the three tokens before each; in float32 or as the model.

    `width` numbers are read of a guess and written of a correction. Both are linear in rows of the table, so that generation
    keeps the table's products with `read` and `up`.
    """

    def __init__(self, config: Any):
        super().__init__()
        state, width, hidden = config.context.hidden_size, config.recent_size, config.denoiser.hidden_size
        self.read = nn.Linear(state, width, bias=False)
        self.before = nn.Linear(WINDOW * width, hidden, bias=False)
        self.state = nn.Linear(state, hidden)
        self.place = nn.Embedding(config.vae.chunk_size, hidden)
        self.norm = nn.RMSNorm(hidden, eps=config.denoiser.rms_norm_eps)
        self.mlp = SwiGLU(hidden, hidden)
        self.last_norm = nn.RMSNorm(hidden, eps=config.denoiser.rms_norm_eps)
        self.write = nn.Linear(hidden, width)
        self.up = nn.Linear(width, state, bias=False)

    def forward(self, states: torch.Tensor, guesses: torch.Tensor) -> torch.Tensor:
        """Corrections of narrow width, (blocks, tokens, width).

        states: (blocks, tokens, state).
        guesses: what is read of each token, (blocks, tokens, width); those before the block are zero.
        """
        tokens = states.shape[1]
        # (blocks, tokens, WINDOW · width): the guesses at the tokens before each token, side by side.
        recent = nn.functional.pad(guesses, (0, 0, WINDOW, -1)).unfold(1, WINDOW, 1).transpose(2, 3).flatten(2)
        place = self.place(torch.arange(tokens, device=states.device) % self.place.num_embeddings)
        hidden = self.state(states) + self.before(recent) + place
        return self.write(self.last_norm(hidden + self.mlp(self.norm(hidden))))

    def products(self, table: torch.Tensor) -> torch.Tensor:
        """The table's products with `up`, (width, vocab)."""
        narrow = torch.eye(self.up.in_features, dtype=table.dtype, device=table.device)
        return nn.functional.linear(self.up(narrow), table)
