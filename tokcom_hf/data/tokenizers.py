"""Tokenizers: by name or folder, or a byte-level BPE trained on the corpus."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def load_tokenizer(name_or_path: str) -> Any:
    """`AutoTokenizer.from_pretrained` with one sentence instead of a page where the tokenizer is not there.

    Raises:
        OSError: nothing of that name on disk or (reachable) on the Hub, or a gated one without access.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise OSError(
            f"Tokenizer {name_or_path!r} cannot be loaded; give a folder with a saved tokenizer, or a Hub name that is "
            f"reachable from here ({reason})."
        ) from None


def check_tokenizer(tokenizer: Any, vae_config: Any) -> None:
    """Compares a tokenizer with the vocabulary a VAE was trained on: its omni token is the first id after the tokenizer's.

    Raises:
        ValueError: the sizes differ.
    """
    if len(tokenizer) != vae_config.omni_token_id:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens but the model was trained with "
            f"{vae_config.omni_token_id}; use the tokenizer saved beside the model."
        )
