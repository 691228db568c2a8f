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
    """Runs `function(pipeline, *inputs)` at a click: loads the model first, shows progress, and shows errors as messages.

    Refused input only shows a message on the page; any other error also prints its traceback to the terminal.
    """

    # Gradio replaces this default by the progress tracker of the call.
    def handler(progress=gr.Progress(), *values):  # noqa: B008
        try:
            output = function(folder.pipeline(progress), *values)
            yield from output if inspect.isgenerator(output) else [output]
        except (OSError, TypeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    # One computation at a time: all share the CPU, and the budget is set in the pruned model itself.
    button.click(handler, inputs, outputs, concurrency_id="models", concurrency_limit=1)


def picture_input(gr: Any) -> Any:
    """A field that takes a picture by upload or from the clipboard."""
    # image_mode=None keeps transparency, which the image processors lay on white and Gradio would drop.
    return gr.Image(
        image_mode=None,
        type="pil",
        sources=["upload", "clipboard"],
        show_label=False,
        buttons=["fullscreen"],
        height=PICTURE,
    )


def picture_output(gr: Any) -> Any:
    """A field that shows a picture without loss."""
    return gr.Image(format="png", height=PICTURE, interactive=False, show_label=False, buttons=BUTTONS)


def gallery(gr: Any, columns: int, height: int) -> Any:
    """A field that shows several pictures, `height` pixels high."""
    return gr.Gallery(
        show_label=False, columns=columns, object_fit="contain", format="png", height=height, buttons=BUTTONS
    )


def enlarged(image: Image.Image) -> Image.Image:
    """The picture enlarged by a whole factor to at least `PICTURE` pixels a side; browsers would blur a small one."""
    factor = -(-PICTURE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
