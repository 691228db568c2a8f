"""Documented `.pt` parts become our modules: same numbers, every name accounted for, or named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    LayerSpecificPruner,
    LearnableTokenMerger,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMerger,
    TokenMergerConfig,
)
from tokcom_hf.pruning_checkpoint import (
    convert_discriminator,
    convert_merger,
    convert_pruners,
    read_part,
    read_parts,
)


class Merger(nn.Module):
    """A module with the documented names and formulas."""

    def __init__(self, bias=True):
        super().__init__()
        self.importance_scorer = nn.Sequential(nn.Linear(16, 4), nn.GELU(), nn.Dropout(0.1), nn.Linear(4, 1))
        self.q_proj, self.k_proj = nn.Linear(16, 8, bias=bias), nn.Linear(16, 8, bias=bias)

    def forward(self, vision, count, temperature):
        top = self.importance_scorer(vision).squeeze(-1).topk(count).indices.sort(-1).values
        centres = vision.gather(1, top[..., None].expand(-1, -1, vision.shape[-1]))
        similarity = self.q_proj(vision) @ self.k_proj(centres).transpose(1, 2) / 8**0.5
        return (similarity / temperature).softmax(-1).transpose(1, 2) @ vision


class Head(nn.Module):
    """A documented pruner head."""

    def __init__(self):
        super().__init__()
        self.vision_proj, self.text_proj = nn.Linear(12, 8), nn.Linear(12, 8)
        self.cross_attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mask_predictor = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1))

    def forward(self, vision, question):
        values = self.text_proj(question)
        return self.mask_predictor(self.cross_attn(self.vision_proj(vision), values, values)[0]).squeeze(-1)


class Pruners(nn.Module):
    def __init__(self, names=("10", "20")):
        super().__init__()
        self.pruners = nn.ModuleDict({name: Head() for name in names})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_merger_computes_what_it_computed(tmp_path, prefix, bias):
    torch.manual_seed(0)
    theirs = Merger(bias).eval()
    torch.save({prefix + k: v for k, v in theirs.state_dict().items()}, tmp_path / "token_merger_step_200.pt")
    merger = convert_merger(read_parts(tmp_path)["token_merger"], merge_ratio=0.5).eval()
    vision = torch.randn(2, 10, 16)
    assert torch.allclose(merger(vision, temperature=0.3).merged_features, theirs(vision, 5, 0.3), atol=1e-5)


@pytest.mark.parametrize("names", [("10", "20"), ("0", "1"), ("layer_10", "layer_20")])
def test_pruners_compute_what_they_computed(names):
    torch.manual_seed(0)
    theirs = Pruners(names).eval()
    pruner = convert_pruners(theirs.state_dict(), layers=[10, 20], num_attention_heads=2, selection="threshold").eval()
    vision, question = torch.randn(2, 6, 12), torch.randn(2, 4, 12)
    for layer, name in zip((10, 20), names):
        logits = theirs.pruners[name](vision, question)
        output = pruner(layer, vision, question, temperature=1.0)
        assert torch.allclose(output.keep_logits, logits, atol=1e-6)
        assert torch.allclose(
            output.soft_mask, F.softmax(torch.stack([logits * 0, logits], -1), -1)[..., 1], atol=1e-6
        )


def test_our_own_parts_load_as_they_are(tmp_path):
    """Documented: `token_merger.load_state_dict(torch.load("outputs/checkpoints/token_merger_step_1000.pt"))`."""
    torch.manual_seed(0)
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=8, internal_size=4))
    settings = {"feature_size": 16, "question_size": 8, "internal_size": 8}
    ours = TokenMerger(TokenMergerConfig(**settings))
    normalized = {"hidden_size": 8, "layers": [1, 3], "internal_size": 8}
    heads = LayerPruner(LayerPrunerConfig(**normalized))
    for name, part in (("token_merger", ours), ("layer_pruners", heads), ("discriminator", critic)):
        torch.save(part.state_dict(), tmp_path / f"{name}_step_1000.pt")
    parts = read_parts(tmp_path, 1000)
    for converted, part in (
        (convert_merger(parts["token_merger"], **settings), ours),
        (convert_pruners(parts["layer_pruners"], **normalized), heads),
        (convert_discriminator(parts["discriminator"], critic.config), critic),
    ):
        assert all(torch.equal(a, b) for a, b in zip(converted.state_dict().values(), part.state_dict().values()))
    token_merger = TokenMerger(TokenMergerConfig(**settings))
    checkpoint = torch.load(tmp_path / "token_merger_step_1000.pt")
    token_merger.load_state_dict(checkpoint)
    documented = LearnableTokenMerger(16, 0.5, internal_size=8)
    again = convert_merger(documented.state_dict(), merge_ratio=0.5)
    assert torch.equal(again.q_proj.weight, documented.q_proj.weight)
    pruners = LayerSpecificPruner(12, [4], d_internal=8)
    settings = {"hidden_size": 12, "layers": [4], "internal_size": 8, "architecture": "documented"}
    assert list(convert_pruners(pruners.state_dict(), **settings).heads) == ["4"]


def changed(module: nn.Module, **changes) -> dict:
    return module.state_dict() | changes


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: convert_merger(changed(Merger(), extra=torch.ones(1))), "'extra' is not among its weights"),
        (lambda: convert_merger({"q_proj.weight": torch.ones(8, 16)}), "importance_scorer.0.weight"),
        (
            lambda: convert_merger(changed(Merger(), **{"importance_scorer.1.weight": torch.ones(4)})),
            "'importance_scorer.1.weight' does not fit",
        ),
        (
            lambda: convert_pruners(changed(Pruners(), **{"pruners.10.norm.weight": torch.ones(8)}), num_attention_heads=2),
            "'heads.10.norm.weight' is not among its weights",
        ),
        (lambda: convert_pruners(Pruners().state_dict(), layers=[10, 20, 31]), r"but pruning_layers is \[10, 20, 31\]"),
        (lambda: convert_pruners({"scale": torch.ones(1)}), "has no layer number"),
        (
            lambda: convert_discriminator({"net.0.weight": torch.ones(2, 2)}, PruningDiscriminatorConfig(hidden_size=8)),
            "'net.0.weight' is not among its weights",
        ),
    ],
)  # fmt: skip
def test_a_name_that_does_not_fit_is_named(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()


def test_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"token_merger_step_N\.pt"):
        read_parts(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "token_merger_step_200.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "token_merger_step_1000.pt")
    assert set(read_parts(tmp_path)) == {"token_merger"}
    with pytest.raises(FileNotFoundError, match="it has steps 200, 1000"):
        read_parts(tmp_path, 300)
    (tmp_path / "broken.pt").write_bytes(b"no tensor")
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    for name, message in (("broken.pt", "damaged or no file"), ("other.pt", "holds no state dict")):
        with pytest.raises(ValueError, match=message):
            read_part(tmp_path / name)
