"""Metadata of tokcom_hf. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "plots": ["matplotlib>=3.9"],
    "search": ["optuna>=4.0"],
    "tracking": ["wandb", "tensorboard"],
    "demo": ["gradio>=6,<7"],
    "bench": ["vector-quantize-pytorch==1.32.0"],
}
EXTRAS["test"] = [
    *EXTRAS["plots"],
    *EXTRAS["search"],
    *EXTRAS["bench"],
    *EXTRAS["tracking"],
    "hypothesis>=6",
    "omegaconf",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist>=3.5",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "types-PyYAML",
]

setup(
    name="tokcom_hf",
    version="0.3.0",
    description="Fewer tokens, as Hugging Face models: text latents, image codes, token pruning, split vocabularies.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # Model cards and recipes live beside the package in a checkout and inside it in a wheel.
    packages=[
        *find_packages(include=["tokcom_hf", "tokcom_hf.*"]),
        "tokcom_hf.model_cards",
        "tokcom_hf.recipes",
        "tokcom_hf.recipes.benchmarks",
        "tokcom_hf.recipes.demo_tabs",
    ],
    package_dir={"tokcom_hf.model_cards": "model_cards", "tokcom_hf.recipes": "recipes"},
    package_data={
        "tokcom_hf": ["py.typed"],
        "tokcom_hf.model_cards": ["*.md"],
        "tokcom_hf.recipes": ["configs/*/*.yaml"],
    },
    # The tests run at both ends of every range (.ci/run). Upper bounds are the newest minor versions they ran on: a later
    # one may rename what the models rely on, as transformers 5.24 renamed the cache.
    install_requires=[
        "torch>=2.6,<3",
        "transformers>=5.18,<5.25",
        "accelerate>=1.10,<1.16",
        "peft>=0.19.1,<0.22",
        "datasets>=4.0,<5.3",
        "evaluate>=0.4.5,<0.5",
        "safetensors>=0.8,<0.9",
        "huggingface_hub>=1.31,<2.5",
        "pillow>=10.1,<14",
    ],
    extras_require=EXTRAS,
)
