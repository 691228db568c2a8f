"""A page to try the four systems on: writing text, coding images, pruning vision tokens, drawing from captions.

    pip install -e ".[demo]" && python recipes/demo.py                   # then open http://127.0.0.1:7860
    python recipes/demo.py --tokcom outputs/mine --port 8000

Each tab loads the folder that a recipe writes; where the folder is missing, the tab names the command that makes it. The
page is served to this machine only, loads models at the first click, sends nothing anywhere and downloads nothing;
`--share true` makes it public through Gradio's servers.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from demo_tabs import drawing, image_codes, pruning, text
from demo_tabs.folders import ModelFolder
from demo_tabs.widgets import enlarged, gallery, on_click, picture_input, picture_output
from PIL import Image

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.threads import use_all_cores

EXAMPLE_TEXT = (
    "Return a list of the names in the current scope. The function raises an error if the argument is not a list."
)
BLOCK_SIZES = [
    ("as trained", -1), ("1: from left to right", 1), ("4", 4), ("16", 16), ("all at once", 0),
]  # fmt: skip


@dataclass
class DemoArguments:
    """Folders of the four tabs, and where the page is served."""

    tokcom: str = field(default="outputs/tokcom", metadata={"help": "Output folder of train_tokcom.py."})
    vqgan: str = field(default="outputs/train_vqgan", metadata={"help": "Output folder of train_vqgan.py."})
    pruned: str = field(default="outputs/token_pruning", metadata={"help": "Output folder of train_token_pruning.py."})
    images: str = field(default="outputs/image_tokens", metadata={"help": "Output folder of image_tokens.py."})
    prompt: str = field(
        default="<image> {question}",
        metadata={"help": "Prompt of the pruned model; for LLaVA-1.5: 'USER: <image>\\n{question} ASSISTANT:'."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve on; 0.0.0.0 for the whole network."})
    port: int = field(default=7860, metadata={"help": "Port to serve on."})
    share: bool = field(default=False, metadata={"help": "Also make the page public through Gradio's servers."})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 takes all cores."})


def main(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    args = DemoArguments(**parse_recipe(__doc__, {"demo": DemoArguments}, None, argv)["demo"])
    if "{question}" not in args.prompt:
        raise RecipeError(f"--prompt must contain {{question}}, got {args.prompt!r}.")
    use_all_cores(args.threads)
    serve(args).block_thread()


def serve(args: DemoArguments) -> Any:
    """Serves the page from a thread, prints its address and returns its `gradio.Blocks`.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken.
    """
    page = build(args)
    try:
        _, local, public = page.launch(
            server_name=args.host, server_port=args.port, share=args.share, theme=theme(), footer_links=[],
            ssr_mode=False, quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise OSError(
            f"The page cannot be served on port {args.port} of {args.host}; choose another --port."
        ) from error
    print(f"Open {public or local} in a browser; Ctrl-C ends the demo.", flush=True)
    return page


def build(args: DemoArguments) -> Any:
    """The page, not served yet: a `gradio.Blocks`.

    Raises:
        ValueError: Gradio is not installed.
    """
    gr = gradio()
    folders = {
        "Text": ModelFolder(args.tokcom, "tokcom-generation", "accelerate launch recipes/train_tokcom.py"),
        "Image codes": ModelFolder(args.vqgan, "vq-reconstruction", "accelerate launch recipes/train_vqgan.py"),
        "Pruning": ModelFolder(
            args.pruned, "pruned-image-text-to-text", "accelerate launch recipes/train_token_pruning.py"
        ),
        "Drawing": ModelFolder(args.images, "lfq-image-text", "accelerate launch recipes/image_tokens.py"),
    }
    builders = (text_tab, image_codes_tab, functools.partial(pruning_tab, prompt=args.prompt), drawing_tab)
    with gr.Blocks(title="tokcom_hf", analytics_enabled=False) as page:
        gr.Markdown("# tokcom_hf: fewer tokens")
        for (name, folder), builder in zip(folders.items(), builders, strict=True):
            with gr.Tab(name) as tab:
                # Passed as a function, which Gradio calls whenever the page or the tab is opened.
                status = gr.Markdown(folder.status)
                tab.select(folder.status, None, [status], show_progress="hidden")
                builder(gr, folder)
    return page


def gradio() -> Any:
    """The module gradio, imported only when the page is built."""
    try:
        import gradio as gr
    except ImportError:
        raise RecipeError("The demo needs Gradio; install it with: pip install 'tokcom_hf[demo]'") from None
    return gr


def theme() -> Any:
    """A theme with fonts of the reader's system, so that the page fetches none."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gradio().themes.Default(**fonts)


def text_tab(gr: Any, folder: ModelFolder) -> None:
    """Writing, reading noisy latents, and denoising step by step."""
    gr.Markdown(
        "### Write\nContinue a prompt; leave it empty to write from nothing. A chunk is one latent of 4 tokens."
    )
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox("The function returns", label="Prompt", lines=2)
            chunks = gr.Slider(1, 256, 32, step=1, label="Chunks to write")
            block_size = gr.Dropdown(BLOCK_SIZES, value=-1, label="Chunks denoised together (a block)")
            steps = gr.Slider(1, 50, 8, step=1, label="Flow steps per block")
            temperature = gr.Slider(
                0,
                1.5,
                1,
                step=0.05,
                label="Temperature",
                info="Scales all noise; at 0 every seed gives the same text.",
            )
            seed = gr.Number(0, label="Seed", precision=0)
            button = gr.Button("Write", variant="primary")
        with gr.Column():
            written, speed = gr.Textbox(label="Text", lines=16), gr.Markdown()
    on_click(gr, button, folder, text.write, [prompt, chunks, block_size, steps, temperature, seed], [written, speed])

    gr.Markdown(
        "### Reconstruct\nText → latents → text, with Gaussian noise added to the latents. Wrong tokens are marked."
    )
    with gr.Row():
        with gr.Column():
            given = gr.Textbox(EXAMPLE_TEXT, label="Input", lines=5)
            noise = gr.Slider(0, 3, 1, step=0.05, label="Noise, in standard deviations of the latents")
            noise_seed = gr.Number(0, label="Seed of the noise", precision=0)
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            gr.Markdown("Decoded")
            read, accuracy = gr.HTML(text.as_html([("…", None)])), gr.Markdown()
    on_click(gr, button, folder, reconstruct_text, [given, noise, noise_seed], [read, accuracy])

    gr.Markdown(
        "### Denoise step by step\nThe input's latents are mixed with noise; each step moves them along the flow. The "
        "table shows the decoded text after every step. A context encoder is given the true text before each block."
    )
    with gr.Row():
        with gr.Column():
            clean = gr.Textbox(EXAMPLE_TEXT, label="Input", lines=5)
            start = gr.Slider(0, 0.95, 0.4, step=0.05, label="Start", info="0 is pure noise, 1 the clean latents.")
            count = gr.Slider(1, 50, 8, step=1, label="Flow steps from 0 to 1")
            flow_seed = gr.Number(0, label="Seed of the noise", precision=0)
            button = gr.Button("Denoise", variant="primary")
        with gr.Column(scale=2):
            table = gr.HTML(text.steps_table([]))
    on_click(gr, button, folder, denoise_text, [clean, start, count, flow_seed], [table])


def reconstruct_text(pipe: Any, given: str, noise: float, seed: int) -> tuple[str, str]:
    """Decoded text as HTML, and a sentence with its accuracy."""
    pieces, accuracy = text.reconstruct(pipe, given, noise, seed)
    return text.as_html(pieces), accuracy


def denoise_text(pipe: Any, given: str, start: float, steps: int, seed: int) -> Iterator[str]:
    """Yields the table of all steps so far, after each step."""
    rows = []
    for row in text.denoise(pipe, given, start, steps, seed):
        rows.append(row)
        yield text.steps_table(rows)


def image_codes_tab(gr: Any, folder: ModelFolder) -> None:
    """The input, its reconstruction, the map of its codes, and a table of their use."""
    with gr.Row():
        with gr.Column():
            image = picture_input(gr)
            number = gr.Number(0, label="Number of the next example", precision=0)
            example = gr.Button("Draw an example")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3):
            outputs = []
            with gr.Row():
                for label in (
                    "The image as the model sees it",
                    "Reconstructed from its codes",
                    "Its codes as colours",
                ):
                    with gr.Column(min_width=200):
                        gr.Markdown(label)
                        outputs.append(picture_output(gr))
            outputs.append(gr.Markdown())
    example.click(lambda n: (image_codes.example_image(n), n + 1), [number], [image, number])
    on_click(gr, button, folder, reconstruct_image, [image], outputs)


def reconstruct_image(pipe: Any, image: Image.Image | None) -> tuple[Any, ...]:
    """The three pictures, enlarged, and the table of codes."""
    *pictures, use = image_codes.reconstruct(pipe, image)
    return *map(enlarged, pictures), use


def pruning_tab(gr: Any, folder: ModelFolder, prompt: str) -> None:
    """The unpruned and the pruned answer to a question, their cost, and the kept patches."""
    with gr.Row():
        with gr.Column():
            image = picture_input(gr)
            question = gr.Textbox(label="Question")
            truth = gr.Textbox(label="True answer of the example", interactive=False)
            number = gr.Number(0, label="Number of the next example", precision=0)
            example = gr.Button("Draw an example")
            keep = gr.Slider(
                1, 100, 30, step=1, label="Keep, %", info="Share of the vision tokens that enter the language model."
            )
            button = gr.Button("Answer", variant="primary")
        with gr.Column(scale=2):
            gr.Markdown("Kept patches. A merger replaces each by the mean of the patches similar to it.")
            kept = gallery(gr, columns=3, height=300)
            table = gr.Markdown()

    def draw_example(number: int) -> tuple[Image.Image, str, str, int]:
        picture, *texts = pruning.example_question(folder.path, number)
        return enlarged(picture), *texts, number + 1

    def answer(pipe: Any, image: Image.Image | None, question: str, percent: float) -> tuple[list, str]:
        return pruning.answer(pipe, image, question, percent / 100, prompt)

    example.click(draw_example, [number], [image, question, truth, number])
    on_click(gr, button, folder, answer, [image, question, keep], [kept, table])


def drawing_tab(gr: Any, folder: ModelFolder) -> None:
    """Pictures from a caption."""
    with gr.Row():
        with gr.Column():
            caption = gr.Textbox("a large red ring at the top left", label="Caption", lines=2)
            number = gr.Number(0, label="Number of the next example", precision=0)
            example = gr.Button("Another caption")
            pictures = gr.Slider(1, 8, 4, step=1, label="Pictures")
            guidance = gr.Slider(1, 5, 1.5, step=0.1, label="Guidance", info="Above 1 the caption has more influence.")
            temperature = gr.Slider(0.05, 1.5, 0.3, step=0.05, label="Temperature")
            seed = gr.Number(0, label="Seed", precision=0)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2):
            drawn, speed = gallery(gr, columns=4, height=400), gr.Markdown()
    example.click(lambda n: (drawing.example_caption(n), n + 1), [number], [caption, number])
    on_click(gr, button, folder, draw_pictures, [caption, pictures, guidance, temperature, seed], [drawn, speed])


def draw_pictures(pipe: Any, *values) -> tuple[list[Image.Image], str]:
    """The drawn pictures, enlarged, and a sentence about speed."""
    drawn, speed = drawing.draw(pipe, *values)
    return [enlarged(image) for image in drawn], speed


if __name__ == "__main__":
    run_recipe(main)
