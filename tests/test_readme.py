"""README and docs: every command names recipes, options and configurations that exist, and its Python parses."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)]
COMMANDS = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
RECIPES = [command for command in COMMANDS if "recipes/" in command]


def test_the_first_screen_holds_the_two_commands():
    assert COMMANDS[0] == "pip install -e . && accelerate launch recipes/train_tokcom.py"
    assert COMMANDS[1] == 'pip install -e ".[test]" && pytest'


def recipe_call(command: str) -> tuple[Path, list[str]]:
    words = shlex.split(command.split("&&")[-1])
    position = next(i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py"))
    return ROOT / words[position], words[position + 1 :]


@pytest.mark.parametrize("command", RECIPES)
def test_recipe_commands_name_existing_options(command, monkeypatch):
    """Loads the recipe and lets its own parser read the command's options."""
    import tokcom_hf.cli

    path, arguments = recipe_call(command)
    assert path.is_file(), path
    for word in shlex.split(command):
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
    seen = {}
    original = tokcom_hf.cli.parse_recipe

    def parse_only(doc, sections, default_config=None, argv=None, aliases=None):
        seen["values"] = original(doc, sections, default_config, argv, aliases)
        raise SystemExit(0)

    monkeypatch.setattr(tokcom_hf.cli, "parse_recipe", parse_only)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.chdir(ROOT)
    # As Python does for a script.
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main()
    assert "values" in seen


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_parse(block):
    compile(block, "README.md", "exec")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as Git hosts make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_page_of_tokcom_explains_every_option_and_those_it_sets_exist():
    from tokcom_hf import (
        DenoisedModelConfig,
        DenoiserTrainingArguments,
        DistillationTrainingArguments,
        TokComConfig,
        TokComVAEConfig,
    )

    page = PAGES[ROOT / "docs" / "tokcom.md"]
    named = set(re.findall(r"`(\w+)`", page))
    configs = [cls.__annotations__ for cls in (TokComConfig, TokComVAEConfig, DenoisedModelConfig)]
    options = set().union(*configs, DistillationTrainingArguments.__annotations__) - {"model_type", "sub_configs"}
    # The parts are sections; a tied head is no choice.
    assert options - named - {"vae", "denoiser", "tie_word_embeddings"} == set()
    sections = {
        "vae": TokComVAEConfig, "denoiser": DenoisedModelConfig, "flow": TokComConfig,
        "denoiser_training": DenoiserTrainingArguments, "distillation_training": DistillationTrainingArguments,
    }  # fmt: skip
    for text in (page, PAGES[ROOT / "README.md"]):
        for section, option in re.findall(
            r"\b(vae|denoiser|flow|denoiser_training|distillation_training)\.(\w+)", text
        ):
            assert hasattr(sections[section](**{"output_dir": "x"} if "training" in section else {}), option), option


def without_comments(block: str) -> str:
    return re.sub(r"\s+#.*", "", block)


def test_both_languages_say_the_same():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert len(english.splitlines()) <= 200 and len(chinese.splitlines()) <= 200
    blocks = [re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL) for text in (english, chinese)]
    assert [(kind, without_comments(block)) for kind, block in blocks[0]] == [
        (kind, without_comments(block)) for kind, block in blocks[1]
    ]
    # Every figure of one is in the other, and so is every link.
    prose = [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in (english, chinese)]
    numbers = [sorted(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"README\S*", "", text))) for text in prose]
    assert numbers[0] == numbers[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"} for text in prose]
    assert links[0] == links[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    files = [
        f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.py") if ".ci-venv" not in path.parts[len(ROOT.parts)]
    ]
    for name in re.findall(r"`([\w/]+\.py)`", PAGES[page]):
        # Of the documents' own programs only the names are told.
        if "NAME" in name or page.name == "documents.md":
            continue
        assert any(file.endswith(f"/{name}") for file in files), name
