"""Loads a tokenizer by name or folder, or trains a byte-level BPE on the corpus."""

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

# More unused ids than this are not filled, because most of the embedding table would be unused.
MOST_UNUSED_IDS = 1_000_000
EOS_TOKEN = "<|endoftext|>"
MOST_TOKENS = 1 << 20  # the trainer asks for memory for all of them before it reads any text


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocab_size` tokens; EOS is also the padding token.

    Raises:
        ValueError: `vocab_size` is below 257, the 256 bytes and EOS, or above `MOST_TOKENS`.
    """
    if not 257 <= vocab_size <= MOST_TOKENS:
        raise ValueError(
            f"A byte-level vocabulary needs at least 257 tokens (the bytes and EOS) and at most {MOST_TOKENS:,}, got "
            f"vocab_size={vocab_size}."
        )
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
    """Loads a tokenizer like `AutoTokenizer.from_pretrained`, with a padding token and without gaps between its ids.

    A tokenizer object is copied, so that the caller's stays unchanged.

    A folder that holds only `vocab.json` and `merges.txt` is read as a byte-level BPE like GPT-2's. A tokenizer without a
    padding token gets its EOS token as one. An unused id below the highest one gets a token (`<unused:300>`), so that `len`
    of the result is its highest id plus one.

    Raises:
        OSError: no tokenizer of that name is on disk or reachable on the Hub, or access to it is not granted.
        ValueError: unused ids cannot be filled.
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
    """Returns the tokenizer with a padding token and without gaps between its ids."""
    if tokenizer.pad_token is None:
        # GPT-2's, Llama's and other tokenizers have none; collators need one even if all rows have the same length.
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
            "its tokens from 0 without gaps."
        )
    vocabulary |= {f"<unused:{number}>": number for number in unused}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def _from_vocabulary_and_merges(vocabulary: Path, merges: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # GPT-2's vocabulary contains EOS_TOKEN; any other gets it as its last id.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)


def check_tokenizer(tokenizer: Any, vae_config: Any) -> None:
    """Checks that a tokenizer has the vocabulary size that a VAE was trained with.

    That size is the VAE's `omni_token_id`, because the omni token is the first id after the tokenizer's.

    Raises:
        ValueError: the sizes differ.
    """
    size = tokenizer_size(tokenizer)
    if size != vae_config.omni_token_id:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has {size} tokens but the model was trained with "
            f"{vae_config.omni_token_id}; use the tokenizer saved beside the model."
        )
