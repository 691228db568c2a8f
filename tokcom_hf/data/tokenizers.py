"""Tokenizers: by name or folder, or a byte-level BPE trained on the corpus."""

import json
from collections.abc import Iterable
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.shared_tokenizer_size import tokenizer_size

# More ids than this without a token are not filled: the table would be empty for the most part.
MOST_UNUSED_IDS = 1_000_000
EOS_TOKEN = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens; EOS is also the padding token.

    Raises:
        ValueError: `vocab_size` below the 256 bytes plus EOS.
    """
    if vocab_size < 257:
        raise ValueError(f"A byte-level vocabulary needs at least 257 tokens, got vocab_size={vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tqdm(documents, desc="training the tokenizer", unit=" documents", delay=2) as bar:
        tokenizer.train_from_iterator(bar, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)


def load_tokenizer(name_or_path: str | PathLike | PreTrainedTokenizerBase) -> Any:
    """`AutoTokenizer.from_pretrained` with one sentence instead of a page where the tokenizer is not there.

    A tokenizer that is loaded already is copied, so that it stays as it is.

    A folder that holds only `vocab.json` and `merges.txt` is read as a byte-level BPE of GPT-2's kind. Where a tokenizer has
    no padding token, EOS is taken. Ids between others that have no token get one (`<unused:300>`), so that `len` of the
    result is its highest id plus one.

    Raises:
        OSError: nothing of that name on disk or (reachable) on the Hub, or a gated one without access.
        ValueError: ids without a token that cannot be filled.
    """
    if isinstance(name_or_path, PreTrainedTokenizerBase):
        return _completed(deepcopy(name_or_path))
    folder = Path(name_or_path)
    parts = folder / "vocab.json", folder / "merges.txt"
    configured = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    try:
        if not configured and all(part.is_file() for part in parts):
            return _from_vocabulary_and_merges(*parts)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise OSError(
            f"Tokenizer {name_or_path!r} cannot be loaded; give a folder with a saved tokenizer, or a Hub name that is "
            f"reachable from here ({reason})."
        ) from None
    return _completed(tokenizer)


def _completed(tokenizer):
    """With a padding token and without gaps between its ids."""
    if tokenizer.pad_token is None:
        # GPT-2's, Llama's and others have none; the collator asks for one even where all rows are of one length.
        tokenizer.pad_token = tokenizer.eos_token
    return _without_gaps(tokenizer)


def _without_gaps(tokenizer):
    size = tokenizer_size(tokenizer)
    if size == len(tokenizer):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    vocabulary = state["model"].get("vocab")
    unused = sorted(set(range(size)) - set(tokenizer.get_vocab().values()))
    if not isinstance(vocabulary, dict) or not 0 < len(unused) <= MOST_UNUSED_IDS:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has {len(tokenizer):,} tokens, but ids up to {size - 1:,}; number "
            "its tokens without gaps."
        )
    vocabulary |= {f"<unused:{number}>": number for number in unused}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def _from_vocabulary_and_merges(vocabulary: Path, merges: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # EOS_TOKEN is GPT-2's own; a vocabulary without it gets it as its last id.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)


def check_tokenizer(tokenizer: Any, vae_config: Any) -> None:
    """Compares a tokenizer with the vocabulary a VAE was trained on: its omni token is the first id after the tokenizer's.

    Raises:
        ValueError: the sizes differ.
    """
    size = tokenizer_size(tokenizer)
    if size != vae_config.omni_token_id:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has {size} tokens but the model was trained with "
            f"{vae_config.omni_token_id}; use the tokenizer saved beside the model."
        )
