"""Makes the text split and the tokenizer of the published figures from one text file.

    git clone https://github.com/martin-gorner/tensorflow-rnn-shakespeare
    cat tensorflow-rnn-shakespeare/shakespeare/*.txt > shakespeare.txt   # 42 plays and poems by name, 5.3 MB
    python recipes/prepare_shakespeare.py --text_file shakespeare.txt --output_dir data/shakespeare
    python recipes/prepare_shakespeare.py --text_file other.txt --sha256 none --output_dir data/other

Leaves `train.txt` (the first 90 % of the characters, up to a line end), `development.txt` (the next 5 %, to choose settings
on), `test.txt` (the last 5 %, to report once), `tokenizer/` (a byte-level BPE trained on `train.txt`) and `split.json`.
The text must have the checksum `--sha256`, because the published figures hold for exactly one text.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text import load_documents
from tokcom_hf.data.text_files import read_text
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.run_folders import check_new_folder

SHAKESPEARE = "1f921c97a441b8b36b6474ee8284d918d9fe1da695590b8866b229d448ffdb51"
# Where each part ends, as a share of the characters.
PARTS = {"train": 0.9, "development": 0.95, "test": 1.0}


@dataclass
class PrepareArguments:
    """Which text is split, and where the parts go."""

    text_file: str | None = field(default=None, metadata={"help": "The text (.txt); there is no default."})
    output_dir: str = field(default="data/shakespeare", metadata={"help": "Folder of the parts and the tokenizer."})
    sha256: str | None = field(
        default=SHAKESPEARE, metadata={"help": "SHA-256 the file must have; none takes any text."}
    )
    tokenizer_vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer, at most."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the files of an earlier run in the folder."})


def main() -> None:
    """Splits the text, trains the tokenizer and writes both."""
    run = PrepareArguments(**parse_recipe(__doc__, {"run": PrepareArguments})["run"])
    if run.text_file is None:
        raise RecipeError(
            "Name the text with --text_file; --help says where to find the text of the published figures."
        )
    text = read_text(run.text_file)
    digest = hashlib.sha256(Path(run.text_file).read_bytes()).hexdigest()
    if run.sha256 is not None and digest != run.sha256.lower():
        raise RecipeError(
            f"{run.text_file} has the SHA-256 {digest}, expected {run.sha256}: it is another text. Give its own checksum "
            "with --sha256, or --sha256 none to split any text."
        )
    parts = split_text(text)
    out = check_new_folder(run.output_dir, run.overwrite)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"source": Path(run.text_file).name, "sha256": digest, "characters": {}}
    for name, part in parts.items():
        (out / f"{name}.txt").write_text(part, encoding="utf-8", newline="\n")
        report["characters"][name] = len(part)
    # Read back as training reads it, so that a tokenizer trained there on train.txt equals this one.
    tokenizer = train_tokenizer(load_documents(str(out / "train.txt")), run.tokenizer_vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    report["vocabulary"] = len(tokenizer)
    (out / "split.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    for name, count in report["characters"].items():
        print(f"{name + '.txt':16} {count:>12,} characters")
    print(f"{'tokenizer':16} {len(tokenizer):>12,} tokens\nwritten to {out}")


def split_text(text: str) -> dict[str, str]:
    """The parts of a text by name: each ends with the line in which its share of the characters ends.

    Raises:
        RecipeError: a part would be empty, because the text is too short or a line too long.
    """
    parts, start = {}, 0
    for name, share in PARTS.items():
        line_end = text.find("\n", max(start, int(share * len(text)) - 1)) if share < 1 else -1
        end = line_end + 1 if line_end >= 0 else len(text)
        parts[name], start = text[start:end], end
    empty = [name for name, part in parts.items() if not part.strip()]
    if empty:
        raise RecipeError(
            f"The text has {len(text):,} characters and {text.count(chr(10)):,} line ends, too few to be cut at line ends: "
            f"nothing is left for {' and '.join(empty)}. Give more text."
        )
    return parts


if __name__ == "__main__":
    run_recipe(main)
