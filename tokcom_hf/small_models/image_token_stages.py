"""The first stages of recipes/image_tokens.py: an image tokenizer, and a language model whose vocabulary is expanded."""

from functools import partial
from typing import Any

from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..cli import RecipeError
from ..data.caption_images import CaptionImages, draw_scenes
from ..model_folders import load_pretrained
from ..models.configuration_vqgan import VQGANConfig
from ..models.image_processing_vqgan import VQGANImageProcessor
from ..models.modeling_vqgan import VQGAN
from ..models.pipeline_lfq import DECODER_FOLDER
from ..run_folders import RunFolder
from .image_tokenizer import train_image_tokenizer
from .small_llama import train_caption_llama


def image_tokenizer(
    run: Any, config: VQGANConfig | None, training: dict[str, Any], folder: RunFolder, train: Any, held_out: Any
):
    """Returns the VQGAN that tokenizes images, and its image processor.

    The VQGAN is loaded if `run.image_tokenizer` names one or the resumed run has finished this stage; else it is trained.

    Args:
        run: arguments of recipes/image_tokens.py.
        config: configuration of a VQGAN to train.
        training: fields of `VQGANTrainingArguments`.
        folder: output folder of the run.
        train, held_out: caption rows.

    Raises:
        RecipeError: the VQGAN's quantizer is not LFQ.
        TypeError: a VQGAN must be trained, but `config` is None.
    """
    name = run.image_tokenizer or (folder.path / DECODER_FOLDER if folder.is_finished(DECODER_FOLDER) else None)
    if name is not None:
        decoder = load_pretrained(AutoModel, name, "Image tokenizer")
        image_processor = load_pretrained(AutoImageProcessor, name, "Image processor")
    elif config is None:
        raise TypeError("config must be a VQGANConfig if run.image_tokenizer names no trained VQGAN, got None.")
    else:
        image_processor = VQGANImageProcessor(
            config.image_size, config.in_channels, size_divisor=config.downsample_factor
        )
        decoder = train_image_tokenizer(
            VQGAN(config),
            image_processor,
            crowded(run) or train,
            held_out,
            training,
            folder.path / "vqgan_run",
            run.seed,
            partial(folder.train, stage=DECODER_FOLDER, folder="vqgan_run"),
        )
        keep(folder, DECODER_FOLDER, decoder, image_processor)
    if getattr(decoder.config, "quantizer", None) != "lfq":
        raise RecipeError(
            f"{name} is no VQGAN with quantizer='lfq' (got {getattr(decoder.config, 'quantizer', 'none')!r}); its "
            "codes have no bits."
        )
    return decoder.eval().requires_grad_(False), image_processor


def base_model(run: Any, text: dict[str, Any], folder: RunFolder, train: Any):
    """Returns the folder or Hub name of the language model to expand, and its tokenizer.

    Without `run.base`, the language model is a small Llama that is trained on the captions; a resumed run uses the Llama
    that it has already trained.

    Args:
        run: arguments of recipes/image_tokens.py.
        text: fields of `LlamaConfig`.
        folder: output folder of the run.
        train: caption rows.
    """
    if run.base is None and not folder.is_finished("base"):
        captions = [train[index]["caption"] for index in range(len(train))]
        small, tokenizer = train_caption_llama(
            captions, text, run.base_steps, folder.path / "base_run", run.seed, folder.resumes
        )
        keep(folder, "base", small, tokenizer)
    name = run.base or str(folder.path / "base")
    return name, load_pretrained(AutoTokenizer, name, "Tokenizer of the base")


def keep(folder: RunFolder, stage: str, *parts) -> None:
    """Saves the results of a stage in its folder and marks the stage as finished, for a resumed run."""
    state = PartialState()
    if state.is_main_process:
        with folder.whole(stage) as place:
            for part in parts:
                part.save_pretrained(place)
    state.wait_for_everyone()
    folder.finish(stage)


def crowded(run: Any) -> CaptionImages | None:
    """Returns scenes with most cells filled, from which an image tokenizer learns faster; None with the user's images."""
    if run.image_text_file is not None:
        return None
    cells = run.grid * run.grid
    scenes = draw_scenes(
        min(4000, run.train_images),
        run.seed + 2,
        dots=run.dots,
        min_objects=cells // 2,
        max_objects=cells,
        grid=run.grid,
    )
    return CaptionImages(scenes, run.image_size)
