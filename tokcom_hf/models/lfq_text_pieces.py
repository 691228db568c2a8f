"""Encodes and decodes pieces of text behind an LFQ token, which do not start a text.

Tokenizers like Llama's put a space before every text and remove it in decoding, so that "red<lfq:3>ring" and
"red<lfq:3> ring" would have the same ids. For them a piece is encoded behind an anchor: a short text whose ids are then
removed. Tokenizers that keep spaces (like GPT-2's) or have none need no anchor.
"""


def encode_piece(tokenizer, text: str) -> list[int]:
    """Ids of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def eats_spaces(tokenizer) -> bool:
    """Whether a tokenizer drops a space at the start of a text, but not inside one."""
    same = encode_piece(tokenizer, "a") == encode_piece(tokenizer, " a")
    return same and any(_behind(tokenizer, anchor, "a") is not None for anchor in _anchors(tokenizer))


def anchor_of(tokenizer, piece: str) -> str:
    """A text that can precede `piece` without sharing a token with it; empty where none is found."""
    return next((anchor for anchor in _anchors(tokenizer) if _behind(tokenizer, anchor, piece) is not None), "")


def decode_behind(tokenizer, ids: list[int], skip_special_tokens: bool = False, **options) -> str:
    """Text of ids that follow other tokens, with its leading space if there is one."""
    if skip_special_tokens:
        # Removed here, because the tokenizer would also skip the anchor.
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
    for anchor in _anchors(tokenizer):
        before = encode_piece(tokenizer, anchor)
        head, whole = tokenizer.decode(before, **options), tokenizer.decode(before + ids, **options)
        if head and whole.startswith(head):
            return whole.removeprefix(head)
    return tokenizer.decode(ids, **options)


def _anchors(tokenizer) -> list[str]:
    # Special tokens come first, because they never merge with their neighbours. Some tokenizers put a space behind them;
    # the other texts serve these.
    special = [token for token in (tokenizer.eos_token, tokenizer.bos_token) if token]
    return [*special, "\n", ".", ",", "1", "a"]


def _behind(tokenizer, anchor: str, text: str) -> list[int] | None:
    """Ids of a text behind an anchor; None where the text changes the anchor's ids or a space behind it is dropped."""
    before = encode_piece(tokenizer, anchor)
    found = []
    for continued in (text, f" {text}"):
        whole = encode_piece(tokenizer, anchor + continued)
        if not before or whole[: len(before)] != before:
            return None
        found.append(whole[len(before) :])
    return None if found[0] == found[1] else found[0]
