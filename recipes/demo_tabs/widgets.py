"""Parts of the page that several tabs share: pictures, galleries, and what a click does."""

import inspect
from collections.abc import Callable
from typing import Any

from PIL import Image

from .folders import ModelFolder

PICTURE = 288  # smallest side, in pixels, of the pictures shown
BUTTONS = ["fullscreen", "download"]


def on_click(
    gr: Any, button: Any, folder: ModelFolder, function: Callable[..., Any], inputs: list, outputs: list
) -> None:
    """Runs `function(pipeline, *inputs)` at a click: loads the model first, shows progress, and errors as messages.

    Input that the function refuses is a message on the page; any other error leaves its traceback on the terminal, too.
    """

    # Gradio passes the progress of a call in the place of this default.
    def handler(progress=gr.Progress(), *values):  # noqa: B008
        try:
            output = function(folder.pipeline(progress), *values)
            yield from output if inspect.isgenerator(output) else [output]
        except (OSError, TypeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    # One computation at a time: all of them share the processor, and the pruned model's budget.
    button.click(handler, inputs, outputs, concurrency_id="models", concurrency_limit=1)


def picture_input(gr: Any) -> Any:
    # image_mode=None: the processors lay transparency on white, where Gradio would drop it.
    return gr.Image(
        image_mode=None,
        type="pil",
        sources=["upload", "clipboard"],
        show_label=False,
        buttons=["fullscreen"],
        height=PICTURE,
    )


def picture_output(gr: Any) -> Any:
    return gr.Image(format="png", height=PICTURE, interactive=False, show_label=False, buttons=BUTTONS)


def gallery(gr: Any, columns: int, height: int) -> Any:
    return gr.Gallery(
        show_label=False, columns=columns, object_fit="contain", format="png", height=height, buttons=BUTTONS
    )


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture in whole multiples of its pixels, `PICTURE` of them a side at least: browsers would blur it."""
    factor = -(-PICTURE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
