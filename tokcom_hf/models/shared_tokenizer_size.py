"""How many rows a vocabulary table needs for a tokenizer."""


def tokenizer_size(tokenizer) -> int:
    """The highest id of a tokenizer plus one. `len(tokenizer)` counts tokens, and some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
