"""Tests whether threads that share a pipeline mix up requests, and whether its memory grows over many calls.

    python recipes/benchmarks/pipeline_threads.py --threads 4 --requests 100 --calls 500

Every pipeline runs tiny random models. Each of `threads` threads sends `requests` requests with different inputs, options
and seeds, in an order of its own. An answer counts as different if the same request, sent alone, has another answer. Then
one thread sends `calls` requests, and the process's memory is read after the first fifth and after the last call.
"""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

from tokcom_hf import VQGAN as VQGANModel
from tokcom_hf import (
    LayerPrunerConfig,
    LFQExpandedModel,
    LFQProcessor,
    PrunedVLM,
    TokComConfig,
    TokComModel,
    TokenMergerConfig,
    VQGANConfig,
    VQGANImageProcessor,
)
from tokcom_hf.cli import parse_recipe, run_recipe
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.small_models.small_vlm import scene_processor

BITS = 4
TEXTS = [
    "a red circle",
    "how many red squares are there ?",
    "what colour is the dot ?",
    "a small blue ring at the top",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def larger(model):
    """The model with weights large enough that every input changes its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def tiny_llava():
    """A random LLaVA with 16 vision tokens per image, and its processor with a chat template."""
    processor = scene_processor(32, 8)
    processor.chat_template = CHAT_TEMPLATE
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=token, vision_feature_layer=-2)
    return larger(LlavaForConditionalGeneration(config)), processor


def build_tokcom(folder: Path) -> None:
    """A TokCom with a context and its tokenizer."""
    tokenizer = train_tokenizer(TEXTS * 4, 280)
    shape = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "num_hidden_layers": 1,
    }  # fmt: skip
    vae = {"vocab_size": len(tokenizer) + 1, "latent_size": 16, **shape}
    config = TokComConfig(
        vae=vae, denoiser=shape, context=shape, block_size=1, standardize_latents=True, noise_std=1.0,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    larger(TokComModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_vqgan(folder: Path) -> None:
    """A VQGAN of 4 × 4 codes and its image processor."""
    config = VQGANConfig(
        image_size=16, quantizer="lfq", codebook_size=2**BITS, codebook_dim=4, patch_size=4, base_channels=8,
        channel_multipliers=[1], downsample_factor=4, num_res_blocks=1, mid_attention=False,
    )  # fmt: skip
    larger(VQGANModel(config)).save_pretrained(folder)
    VQGANImageProcessor(16, 3, size_divisor=4).save_pretrained(folder)


def build_lfq(folder: Path, vlm: bool = False) -> None:
    """A language model, or a VLM, with 16 LFQ ids, its processor and its image decoder."""
    if vlm:
        base, given = tiny_llava()
        tokenizer = given.tokenizer
    else:
        tokenizer = given = scene_processor(32, 8).tokenizer
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = larger(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **text, eos_token_id=None)))
    model = larger(LFQExpandedModel.from_base(base, output_dim=BITS, tokenizer=tokenizer))
    model.save_pretrained(folder, include_base=True)
    LFQProcessor.from_model(model, given, image_prompt="draw {caption} to").save_pretrained(folder)
    build_vqgan(folder / "image_decoder")


def build_pruned_vlm(folder: Path) -> None:
    """A LLaVA with a token merger and layer pruners, whole, and its processor."""
    base, processor = tiny_llava()
    merger = TokenMergerConfig(feature_size=16, question_size=32, target_merge_tokens=8, internal_size=16)
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 2], keep_tokens=[5, 2], internal_size=16)
    PrunedVLM.from_base(base, merger, pruner).eval().save_pretrained(folder, include_base=True)
    processor.save_pretrained(folder)


BUILDERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tokcom-generation": ("tokcom-generation", build_tokcom),
    "vq-reconstruction": ("vq-reconstruction", build_vqgan),
    "vq-tokenize": ("vq-tokenize", build_vqgan),
    "lfq-image-text": ("lfq-image-text", build_lfq),
    "lfq-image-text on a VLM": ("lfq-image-text", lambda folder: build_lfq(folder, vlm=True)),
    "pruned-image-text-to-text": ("pruned-image-text-to-text", build_pruned_vlm),
}


def picture(index: int) -> Image.Image:
    """One of many pictures, of several sizes."""
    size = (32 + 8 * (index % 3), 32)
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size)


def chat(index: int) -> list[dict]:
    """A chat of one message with a picture."""
    content = [{"type": "image", "image": picture(index)}, {"type": "text", "text": TEXTS[index % 4]}]
    return [{"role": "user", "content": content}]


def request(name: str, index: int) -> tuple[tuple, dict[str, Any]]:
    """Arguments of request `index`: inputs, modes and options alternate."""
    text, seed = TEXTS[index % 4], {"seed": index}
    if name == "tokcom-generation":
        short = {"num_steps": 2 + index % 2, "num_chunks": 2 + index % 3, "num_generate_chunks": 1 + index % 2}
        inputs = [(), (text,), ([text, TEXTS[(index + 1) % 4]],)][index % 3]
        return inputs, short | seed | {"return_full_text": index % 2 == 0, "num_return_sequences": 1 + index % 2}
    if name.startswith("vq-"):
        images = [picture(index + offset) for offset in range(1 + index % 3)]
        return ((images if index % 2 else images[0]),), {"batch_size": 1 + index % 2}
    if name == "pruned-image-text-to-text":
        row = {"image": picture(index), "text": f"<image> {text}"}
        inputs = [row, chat(index), [row, text, chat(index + 1)], f"{text}"][index % 4]
        options = {"do_sample": index % 2 == 1, "max_new_tokens": 2 + index % 3}
        modes = {"pruning_mode": ("hard", "origin", "merge_only", "soft")[index // 4 % 4], "batch_size": 1 + index % 3}
        return (inputs,), options | modes | (seed if index % 2 else {})
    options = {
        "mode": ("image", "text", "mixed")[index % 3],
        "num_image_tokens": 4,
        "num_return_sequences": 1 + index % 2,
    }
    options |= {"guidance_scale": 2.0} if index % 6 == 0 else {"max_new_tokens": 5} if index % 3 else {}
    inputs = [text, [text, TEXTS[(index + 1) % 4]]][index // 2 % 2]
    if name.endswith("VLM"):
        inputs = [inputs, {"image": picture(index), "text": f"<image> {text}"}, [chat(index), text]][index % 3]
    return (inputs,), options | seed


def plain(value: Any) -> Any:
    """A result as plain numbers and text, so that two can be compared."""
    if isinstance(value, Image.Image):
        return value.size, value.tobytes()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(pipe, name: str, threads: int, requests: int) -> int:
    """How many of `threads` × `requests` concurrent answers differ from the same requests sent one after another."""

    def ask(index: int) -> Any:
        inputs, options = request(name, index)
        return plain(pipe(*inputs, **options))

    def all_of(thread: int) -> list[Any]:
        order = torch.randperm(requests, generator=torch.Generator().manual_seed(thread)).tolist()
        answers = {index: ask(thread * requests + index) for index in order}
        return [answers[index] for index in range(requests)]

    expected = [ask(index) for index in range(threads * requests)]
    with ThreadPoolExecutor(threads) as pool:
        found = [answer for answers in pool.map(all_of, range(threads)) for answer in answers]
    return sum(one != other for one, other in zip(expected, found, strict=True))


def memory(pipe, name: str, calls: int) -> tuple[float, float]:
    """MiB that the process holds after the first fifth of `calls` and after all of them."""
    process, held = psutil.Process(), []
    for call in range(calls):
        inputs, options = request(name, call % 50)
        pipe(*inputs, **options)
        if call + 1 in (max(1, calls // 5), calls):
            held.append(process.memory_info().rss / 2**20)
    return held[0], held[-1]


@dataclass
class RunArguments:
    """Load on each pipeline, and where the results go."""

    threads: int = field(default=4, metadata={"help": "Threads that share a pipeline."})
    requests: int = field(default=100, metadata={"help": "Requests of each thread."})
    calls: int = field(default=500, metadata={"help": "Calls over which memory is watched."})
    output_dir: str = field(default="outputs/pipeline_threads", metadata={"help": "Folder of results.json."})


def main() -> None:
    """Tests every pipeline; prints and saves different answers and memory."""
    args = RunArguments(**parse_recipe(__doc__, {"run": RunArguments})["run"])
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (task, build)) in enumerate(BUILDERS.items()):
            path = Path(folder) / str(number)
            build(path)
            pipe = pipeline(task, model=str(path), device="cpu")
            differ = differences(pipe, name, args.threads, args.requests)
            before, after = memory(pipe, name, args.calls)
            results[name] = {
                "requests": args.threads * args.requests, "differ": differ, "calls": args.calls,
                "mib_after_a_fifth": before, "mib_after_all": after,
            }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{'pipeline':28s} {'requests':>9s} {'differ':>7s} {'calls':>6s} {'MiB at 1/5':>11s} {'MiB at end':>11s}")
    for name, row in results.items():
        print(
            f"{name:28s} {row['requests']:9d} {row['differ']:7d} {row['calls']:6d} {row['mib_after_a_fifth']:11.1f} "
            f"{row['mib_after_all']:11.1f}"
        )


if __name__ == "__main__":
    run_recipe(main)
