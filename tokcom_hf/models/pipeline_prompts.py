"""Prompts of vision-language pipelines: every form that transformers' own pipelines take → text with its images."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

IMAGE = "<image>"
IMAGE_KEYS = ("image", "url", "path", "base64")


@dataclass(frozen=True)
class Prompt:
    """One prompt, a text or a chat.

    Attributes:
        text: text with one `<image>` per image; None for a chat.
        images: paths, URLs, data URIs or PIL images, in the order of the text or chat.
        messages: messages of a chat, each `{"role": ..., "content": text or list of parts}`.
    """

    text: str | None
    images: list = field(default_factory=list)
    messages: list[dict] | None = None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_message, value))


def is_prompt(value: Any) -> bool:
    """Whether a value is one prompt, rather than several."""
    return isinstance(value, str | dict | Prompt) or hasattr(value, "messages") or is_chat(value)


def as_prompt(row: Any) -> Prompt:
    """A text, a dictionary with `text` and `image` or `images`, or a chat → `Prompt`.

    Raises:
        TypeError: `row` is none of these.
        ValueError: a dictionary has other keys, or a chat cannot be read.
    """
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        return Prompt(row)
    if is_chat(row):
        return chat_prompt(row)
    if hasattr(row, "messages"):  # transformers' own Chat
        return chat_prompt(row.messages)
    if not isinstance(row, dict):
        raise TypeError(
            f'Inputs must be texts, or dictionaries {{"image": ..., "text": ...}}, or chats (lists of messages), got '
            f"{type(row).__name__}."
        )
    unknown = sorted(set(row) - {"text", "image", "images"})
    if unknown or not isinstance(row.get("text"), str) or ("image" in row and "images" in row):
        raise ValueError(
            f'Expected {{"image": ..., "text": ...}} (or "images" with a list), got the keys {sorted(row)}.'
        )
    return Prompt(row["text"], as_images(row.get("image", row.get("images"))))


def as_images(value: Any) -> list:
    """None, an image or a list of images → list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def chat_prompt(messages: Iterable[dict], images: Iterable = ()) -> Prompt:
    """A chat → `Prompt`; a part `{"type": "image"}` without an image, or an `<image>` in text, takes the next of `images`.

    Raises:
        ValueError: a part is neither text nor image, or there are more or fewer `images` than parts without one.
    """
    waiting, found, messages = list(images), [], list(messages)
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            count = content.count(IMAGE)
            found += waiting[:count]
            del waiting[:count]
            continue
        for part in content:
            kind = part.get("type")
            if kind not in ("text", "image"):
                raise ValueError(f"A part of a chat must be of type 'text' or 'image', got {kind!r}.")
            if kind == "image":
                given = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
                if not given and not waiting:
                    raise ValueError("A chat has an image part without an image; give it as 'image', 'url' or 'path'.")
                found.append(given[0] if given else waiting.pop(0))
    if waiting:
        raise ValueError(
            f"{len(waiting)} image(s) more than the chat has places for; add a part {{'type': 'image'}} for each."
        )
    return Prompt(None, found, messages)


def _without_images(messages: list[dict]) -> list[dict]:
    """The chat as chat templates read it: image parts without their images."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]],
        }
        for message in messages
    ]


def pair(text: Any, images: Any) -> Prompt | list[Prompt]:
    """`text=` and `images=` of a call → one `Prompt`, or one per text of a list.

    Args:
        text: a text, a chat, or a list of either.
        images: for one text, an image or a list; for a list of texts, an image or a list for each, or one flat list that
            the `<image>`s of the texts take in order.

    Raises:
        ValueError: the lists do not fit together.
    """
    if text is None:
        raise ValueError("Images need a text; pass text='... <image> ...' or a chat.")
    images = as_images(images)
    if isinstance(text, str):
        return Prompt(text, images)
    if is_chat(text):
        return chat_prompt(text, images)
    texts = list(text)
    if len(images) != len(texts) or (images and not _one_each(texts, images)):
        images = _dealt(texts, images)
    return [
        Prompt(one, as_images(given)) if isinstance(one, str) else chat_prompt(one, as_images(given))
        for one, given in zip(texts, images, strict=True)
    ]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _holes(text: Any) -> int:
    """Number of places for an image in a text or chat."""
    if isinstance(text, str):
        return text.count(IMAGE)
    count = 0
    for message in text:
        content = message["content"]
        if isinstance(content, str):
            count += content.count(IMAGE)
        else:
            images = [part for part in content if part.get("type") == "image"]
            count += sum(all(part.get(key) is None for key in IMAGE_KEYS) for part in images)
    return count


def _one_each(texts: list, images: list) -> bool:
    """Whether `images`, as many as `texts`, hold one entry for each text rather than one flat list."""
    nested = any(isinstance(image, list | tuple) for image in images)
    return nested or all(_holes(text) == 1 for text in texts)


def _dealt(texts: list, images: list) -> list[list]:
    """One flat list of images, dealt to the image places of the texts in order."""
    counts = [_holes(text) for text in texts]
    if sum(counts) != len(images):
        raise ValueError(
            f"{len(images)} image(s) for {len(texts)} texts with {counts} places for an image; give one image, or a list "
            f"of images, per text, and one '{IMAGE}' per image."
        )
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in counts]


def render(prompt: Prompt, processor) -> tuple[str, bool]:
    """The text of a prompt with the processor's image tokens, and whether the tokenizer should add special tokens.

    A chat goes through the processor's chat template. Without a template, a single message becomes its texts in order; the
    image tokens come first if the texts have no `<image>`.

    Raises:
        ValueError: several messages need a template and there is none, or there is not one image token per image.
    """
    token = getattr(processor, "image_token", None) or IMAGE
    if prompt.messages is None:
        text, special = prompt.text.replace(IMAGE, token), True
    else:
        text, special = _from_template(_without_images(prompt.messages), processor, token)
    if text.count(token) != len(prompt.images):
        raise ValueError(
            f"{len(prompt.images)} image(s) but {text.count(token)} '{IMAGE}' in the text; put one '{IMAGE}' per image."
        )
    return text, special


def _from_template(messages: list[dict], processor, token: str) -> tuple[str, bool]:
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None):
        owner = processor if getattr(processor, "chat_template", None) else tokenizer
        prefill = messages[-1]["role"] == "assistant"
        text = owner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not prefill, continue_final_message=prefill
        )
        text, bos = text.replace(IMAGE, token), getattr(tokenizer, "bos_token", None)
        return text, not (bos and text.startswith(bos))
    if len(messages) > 1:
        raise ValueError(
            "This processor has no chat_template, so a conversation cannot be written as text; set "
            "processor.chat_template, or pass a text."
        )
    content = messages[0]["content"]
    if isinstance(content, str):
        return content.replace(IMAGE, token), True
    texts = "\n".join(part["text"] for part in content if part["type"] == "text")
    images = sum(part["type"] == "image" for part in content)
    if IMAGE in texts:
        return texts.replace(IMAGE, token), True
    return "\n".join([token] * images + [texts] * bool(texts)), True


def answered(prompt: Prompt, answer: str) -> str | list[dict]:
    """Prompt and answer: a text; or the chat with the answer as its last message, or behind the last message's prefill."""
    if prompt.messages is None:
        return prompt.text + answer
    last = prompt.messages[-1]
    if last["role"] != "assistant":
        return [*prompt.messages, {"role": "assistant", "content": answer}]
    content = last["content"]
    if isinstance(content, str):
        content += answer
    else:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + answer}]
    return [*prompt.messages[:-1], {**last, "content": content}]
