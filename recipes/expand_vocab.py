"""Adds 2^output_dim LFQ tokens to a language or vision-language model and saves the result.

    python recipes/expand_vocab.py BASE OUT                                 # Hub id or folder, output folder
    python recipes/expand_vocab.py Qwen/Qwen3-0.6B outputs/qwen_lfq --output_dim 16 --embedding_init_method mean
    python recipes/expand_vocab.py BASE OUT --merge                         # one plain table, for stock transformers
    python recipes/expand_vocab.py                                          # a small InternVL, offline

Saves the new rows and a reference to the base model (its weights too with `--include_base`), the processor that reads and
writes `<lfq:N>`, and `expansion.json`. Then loads the folder again and checks that the logits of old ids are bitwise equal
to the base model's (with `--merge`: equal to 1e-4).
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tokcom_hf import LFQExpandedModel, LFQProcessor
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.model_folders import checked_folder, load_pretrained
from tokcom_hf.models.lfq_building import load_base
from tokcom_hf.models.lfq_tokens import check_output_dim
from tokcom_hf.run_folders import check_new_folder
from tokcom_hf.small_models.small_internvl import build_small_internvl
from tokcom_hf.trainers.pruning_build import check_dtype

SMALL_VISION = {"image_size": [64, 64], "patch_size": [8, 8], "hidden_size": 64, "intermediate_size": 128}
SMALL_TEXT = {"hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass
class ExpandArguments:
    """What is expanded, how, and where it goes."""

    base: str | None = field(default=None, metadata={"help": "Model to expand: Hub id or folder."})
    output_dir: str = field(default="outputs/expand_vocab", metadata={"help": "Folder to save to."})
    output_dim: int = field(default=16, metadata={"help": "Bits per code, 1 to 24; 2^output_dim ids are added."})
    embedding_init_method: str = field(default="mean", metadata={"help": "random, zeros or mean."})
    embedding_init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the new rows."})
    freeze_original: bool = field(default=True, metadata={"help": "Keep the old vocabulary rows frozen."})
    include_base: bool = field(default=False, metadata={"help": "Save the base model's weights too."})
    merge: bool = field(default=False, metadata={"help": "Save a stock model with one embedding table instead."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type: auto, float32 or bfloat16."})
    image_prompt: str = field(default="{caption}", metadata={"help": "Text before an image's tokens."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code of the base model's repository."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what the output folder holds."})
    seed: int = field(default=42, metadata={"help": "Seed of the new rows."})

    def __post_init__(self):
        check_output_dim(self.output_dim)
        check_dtype(self.dtype)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Expands, saves, loads again and compares; returns what it printed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    names = ("--base", "--output_dir")
    given = 0
    while given < min(2, len(argv)) and not argv[given].startswith("-"):
        given += 1
    positional = [word for name, value in zip(names, argv[:given]) for word in (name, value)]
    args = ExpandArguments(**parse_recipe(__doc__, {"run": ExpandArguments}, None, positional + argv[given:])["run"])
    output = check_new_folder(args.output_dir, args.overwrite)
    torch.manual_seed(args.seed)
    base, base_processor = load(args, Path(output))
    rows = len((getattr(base, "language_model", None) or base).get_input_embeddings().weight)
    probe = torch.arange(min(rows, 16))[None]
    with torch.no_grad():
        expected = base(input_ids=probe).logits
    tokenizer = getattr(base_processor, "tokenizer", base_processor)
    model = LFQExpandedModel.from_base(
        base.eval(),
        output_dim=args.output_dim,
        embedding_init_method=args.embedding_init_method,
        embedding_init_std=args.embedding_init_std,
        freeze_original=args.freeze_original,
        tokenizer=tokenizer,
    )
    start, end = model.lfq_token_range
    processor = None
    if hasattr(base_processor, "batch_decode") or hasattr(base_processor, "tokenizer"):
        wrapped = (
            base_processor if hasattr(base_processor, "_auto_class") or base_processor is tokenizer else tokenizer
        )
        processor = LFQProcessor.from_model(model, wrapped, image_prompt=args.image_prompt)
    share = model.trainable_rows()
    model.freeze_base()
    if args.merge:
        model.merge_and_unload().save_pretrained(output)
    else:
        model.save_pretrained(output, include_base=args.include_base)
    if processor is not None:
        processor.save_pretrained(output)
    reloaded = reload(output, args, type(base))
    with torch.no_grad():
        saved = reloaded(input_ids=probe).logits[..., :rows]
    exact = torch.equal(saved, expected)
    if not (exact if not args.merge else torch.allclose(saved, expected, atol=1e-4)):
        raise RecipeError(f"Logits of old ids differ from the base's by up to {(saved - expected).abs().max():.3g}.")
    report = {
        "base": args.base or "a small InternVL",
        "model": type(base).__name__,
        "old_rows": rows,
        "tokenizer_size": len(tokenizer),
        "lfq_token_range": [start, end],
        "trainable_rows": share,
        "saved": "merged" if args.merge else "everything" if args.include_base else "new rows",
        "megabytes": round(sum(f.stat().st_size for f in Path(output).glob("*.safetensors")) / 1e6, 1),
        "old_logits": "bitwise equal" if exact else "equal to 1e-4",
    }
    (Path(output) / "expansion.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print_report(report, output)
    return report


def print_report(report: dict, output: Path | str) -> None:
    """Prints sizes, ids, trainable rows and what was saved."""
    (start, end), share = report["lfq_token_range"], report["trainable_rows"]
    rows, size = report["old_rows"], report["tokenizer_size"]
    print(f"{report['model']}: {rows:,} rows ({size:,} in the tokenizer) + {end - start:,} LFQ tokens")
    print(f"LFQ ids {start:,} … {end - 1:,}: id = {start:,} + Σ bit_i · 2^i")
    print(f"{share['trainable']:,} of {share['total']:,} vocabulary rows train ({100 * share['share']:.1f} %)")
    print(f"saved {report['saved']} to {output} ({report['megabytes']} MB); logits of old ids {report['old_logits']}")


def load(args: ExpandArguments, output: Path):
    """The base model and its processor or tokenizer; a small InternVL where none is named."""
    if args.base is None:
        base, processor = build_small_internvl(SMALL_VISION | SMALL, SMALL_TEXT | SMALL)
        base.save_pretrained(output / "base")
        processor.save_pretrained(output / "base")
        return AutoModelForImageTextToText.from_pretrained(output / "base"), processor.tokenizer
    options = {"trust_remote_code": True} if args.trust_remote_code else {}
    with checked_folder(args.base):
        base = load_base(args.base, dtype=args.dtype, **options)
    try:
        return base, AutoProcessor.from_pretrained(args.base, **options)
    except (OSError, ValueError, ImportError, AttributeError):
        return base, load_pretrained(AutoTokenizer, args.base, "Tokenizer", **options)


def reload(output, args: ExpandArguments, base_class):
    """The saved model, loaded from its folder as a user loads it."""
    if not args.merge:
        trust = args.trust_remote_code
        return LFQExpandedModel.from_pretrained(output, dtype=args.dtype, base_trust_remote_code=trust).eval()
    auto = AutoModelForImageTextToText if "ConditionalGeneration" in base_class.__name__ else AutoModelForCausalLM
    return auto.from_pretrained(output, dtype=args.dtype).eval()


if __name__ == "__main__":
    run_recipe(main)
