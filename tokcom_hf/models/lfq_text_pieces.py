"""Text behind an LFQ token, encoded and decoded as the inside of a text and not as its start.

Tokenizers of Llama's kind put a space before whatever they are given and take it off again in decoding. So "red<lfq:3>ring"
and "red<lfq:3> ring" would become the same ids. Such a piece is encoded behind an anchor, a short text whose ids are then
removed. Tokenizers that keep spaces as they are (GPT-2's kind), or know none at all, need no anchor.
"""


def encode_piece(tokenizer, text: str) -> list[int]:
    """Ids of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def eats_spaces(tokenizer) -> bool:
    """Whether a tokenizer loses a space at the start of a text that it keeps inside one."""
    same = encode_piece(tokenizer, "a") == encode_piece(tokenizer, " a")
    return same and any(_behind(tokenizer, anchor, "a") is not None for anchor in _anchors(tokenizer))


def anchor_of(tokenizer, piece: str) -> str:
    """A text to put before `piece`, which no token of `piece` grows together with; empty where there is none."""
    return next((anchor for anchor in _anchors(tokenizer) if _behind(tokenizer, anchor, piece) is not None), "")


def decode_behind(tokenizer, ids: list[int], skip_special_tokens: bool = False, **options) -> str:
    """Text of ids that stand behind other tokens: a leading space stays."""
    if skip_special_tokens:
        # Not by the tokenizer: it would skip the anchor too.
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
    for anchor in _anchors(tokenizer):
        before = encode_piece(tokenizer, anchor)
        head, whole = tokenizer.decode(before, **options), tokenizer.decode(before + ids, **options)
        if head and whole.startswith(head):
            return whole.removeprefix(head)
    return tokenizer.decode(ids, **options)


def _anchors(tokenizer) -> list[str]:
    # A special token is always one token, but some tokenizers put their space behind it, too.
    special = [token for token in (tokenizer.eos_token, tokenizer.bos_token) if token]
    return [*special, "\n", ".", ",", "1", "a"]


def _behind(tokenizer, anchor: str, text: str) -> list[int] | None:
    """Ids of a text behind an anchor; None where the anchor's ids change before it, or a space behind it is lost."""
    before = encode_piece(tokenizer, anchor)
    found = []
    for continued in (text, f" {text}"):
        whole = encode_piece(tokenizer, anchor + continued)
        if not before or whole[: len(before)] != before:
            return None
        found.append(whole[len(before) :])
    return None if found[0] == found[1] else found[0]
