"""Metadata of tokcom_hf. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "plots": ["matplotlib>=3.8"],
    "search": ["optuna>=4.0"],
    "tracking": ["wandb", "tensorboard"],
    "bench": ["vector-quantize-pytorch==1.32.0"],
}
EXTRAS["test"] = [
    *EXTRAS["plots"],
    *EXTRAS["search"],
    *EXTRAS["bench"],
    "tensorboard",
    "pytest>=8",
    "pytest-timeout",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "types-PyYAML",
]

setup(
    name="tokcom_hf",
    version="0.1.0",
    description="Fewer tokens, as Hugging Face models: text latents, image codes, token pruning, split vocabularies.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["tokcom_hf", "tokcom_hf.*"]), "tokcom_hf.model_cards"],
    package_dir={"tokcom_hf.model_cards": "model_cards"},
    package_data={"tokcom_hf": ["py.typed"], "tokcom_hf.model_cards": ["*.md"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "peft>=0.18",
        "datasets>=4.0",
        "evaluate>=0.4.5",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "pillow>=10",
    ],
    extras_require=EXTRAS,
)
