"""Training as the pruning documents describe it: schedules, losses, three optimizers, names, evaluations, files."""

import json
from pathlib import Path

import pytest
import torch
from transformers.integrations import TensorBoardCallback

from tests.helpers.pruned_vlm_tools import batch, tiny_vlm
from tests.helpers.pruning_run import make_trainer
from tokcom_hf import LayerPrunerConfig, PrunedVLM, TokenMerger, TokenMergerConfig
from tokcom_hf.pruning_checkpoint import read_parts
from tokcom_hf.trainers.pruning_losses import annealed_temperature

STEP = [
    "token_merger/merge_sparsity_loss",
    "layer_pruners/adv_loss",
    "layer_pruners/task_loss",
    "discriminator/real_loss",
    "discriminator/fake_loss",
    "disc_prob_real",
    "disc_prob_fake",
    "temperature",
]
EVALUATION = [
    "accuracy_baseline", "accuracy_soft", "accuracy_hard", "keep_ratio_merge", "avg_original_tokens", "avg_merged_tokens",
    "mask_mean", "mask_std", "mask_min", "mask_max", "disc_prob_real", "disc_prob_fake", "real_loss", "fake_loss",
    "temperature", "loss", "merge_sparsity_loss", "task_loss",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with an evaluation and a checkpoint every three, tracked by TensorBoard."""
    # The lowest declared versions are tested without it.
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder, eval_strategy="steps", eval_steps=3, save_steps=3, save_parts=True, load_best_model_at_end=True,
        metric_for_best_model="loss", discriminator_reinit_probability=0.0,
    )  # fmt: skip
    written: dict[str, list[float]] = {}
    writer = SummaryWriter(folder / "tensorboard")
    add = writer.add_scalar
    writer.add_scalar = lambda name, value, step: (
        written.setdefault(str(name), []).append(value),
        add(name, value, step),
    )
    trainer.add_callback(TensorBoardCallback(writer))
    trainer.train()
    return trainer, written


def test_every_step_and_evaluation_reaches_the_tracker_by_its_name(run):
    _, written = run
    assert not [name for name in STEP if len(written.get(name, ())) != 6]
    assert not [name for name in EVALUATION if len(written.get(f"eval/{name}", ())) != 2]
    assert written["temperature"] == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.1, 0.1])
    assert written["eval/temperature"] == pytest.approx([0.1, 0.1])
    assert written["eval/keep_ratio_merge"] == pytest.approx([10 / 16] * 2)
    assert written["eval/avg_merged_tokens"] == pytest.approx([10, 10])
    assert written["eval/avg_original_tokens"] == [16, 16]
    assert all(0 <= value <= 1 for name in ("disc_prob_real", "disc_prob_fake") for value in written[name])


def test_evaluation_statistics_are_over_vision_tokens(run):
    trainer, _ = run
    metrics = trainer.evaluate()
    masks = []
    model = trainer.unwrapped_model.eval()
    with torch.no_grad():
        for start in range(0, 10, 8):
            rows = trainer.data_collator([trainer.eval_dataset[i] for i in range(start, min(start + 8, 10))])
            output = model(**rows, pruning_mode="soft")
            for place, layer in enumerate((1, 3)):
                index = output.kept_index[layer]
                vision = (rows["input_ids"] == model.family.image_token_id).gather(1, index.clamp(min=0)) & (
                    index >= 0
                )
                masks.append(output.soft_masks[place][vision])
    mask = torch.cat(masks)
    assert len(mask) == 2 * 10 * 10  # two layers, ten rows of ten merged tokens: no text, no padding
    for name in ("mean", "std", "min", "max"):
        assert metrics[f"eval_mask_{name}"] == pytest.approx(getattr(mask, name)().item(), abs=1e-5)
    assert metrics["eval_disc_prob_real"] != metrics["eval_disc_prob_fake"]
    assert (
        metrics["eval_accuracy_baseline"] == trainer._evaluate_mode(trainer.eval_dataset, "origin")["accuracy"]["all"]
    )


def test_best_checkpoint_is_that_of_the_lowest_loss(run):
    trainer, written = run
    record = json.loads((Path(trainer.args.output_dir) / "best.json").read_text())
    losses = written["eval/loss"]
    lowest = losses.index(min(losses))
    assert record["metric"] == "loss" and record["value"] == pytest.approx(min(losses), rel=1e-5)
    assert record["step"] == 3 * (lowest + 1) and record["epoch"] == pytest.approx(record["step"] / 12)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{record['step']}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_documented_files_of_a_checkpoint(run):
    """`token_merger_step_N.pt` and its like: `load_state_dict` reads them; beside them the checkpoint to resume from."""
    trainer, _ = run
    folder = Path(trainer.args.output_dir) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{part}_step_{step}.pt" for part in ("discriminator", "layer_pruners", "token_merger") for step in (3, 6)
    ]
    parts = read_parts(folder)
    token_merger = TokenMerger(trainer.model.token_merger.config)
    token_merger.load_state_dict(torch.load(folder / "token_merger_step_6.pt"))
    assert set(parts) == {"token_merger", "layer_pruners", "discriminator"}
    assert torch.equal(parts["token_merger"]["log_scale"], token_merger.log_scale)
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-6"
    assert {"model.safetensors", "optimizer.pt", "auxiliary.pt"} <= {path.name for path in checkpoint.iterdir()}


def test_three_optimizers_with_rates_of_their_own(run):
    trainer, _ = run
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert set(groups) == {"merger", "pruners"}
    assert {id(p) for p in groups["merger"]["params"]} == {id(p) for p in trainer.model.token_merger.parameters()}
    assert {id(p) for p in groups["pruners"]["params"]} == {id(p) for p in trainer.model.layer_pruner.parameters()}
    own = {id(p) for group in trainer.adversary.optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in trainer.discriminator.parameters()}
    assert groups["merger"]["initial_lr"] == 1e-3
    assert trainer.adversary.optimizer.param_groups[0]["initial_lr"] == 5e-4


def test_temperature_follows_the_documented_formula():
    initial, final, anneal_rate = 1.0, 0.1, 0.5
    for step in range(101):
        progress = step / 100
        falling = initial - (progress / anneal_rate) * (initial - final)
        temperature = falling if progress < anneal_rate else final
        assert annealed_temperature(progress, initial, final, anneal_rate) == pytest.approx(temperature, abs=1e-12)


def test_losses_are_the_documented_ones(tmp_path):
    """adv: BCE(P(fake), 1); real: BCE(P(real), 1); fake: BCE(P(fake), 0); task: cross-entropy of the answer."""
    trainer = make_trainer(tmp_path, max_steps=1, kl_weight=0.0, keep_rate_weight=0.0, binarization_weight=0.0)
    logged: dict[str, float] = {}
    trainer.log_scalars = lambda prefix, values: logged.update(
        {f"{prefix}/{k}": torch.as_tensor(v).item() for k, v in values.items()}
    )
    rows = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    trainer.model.train()
    trainer.discriminator.eval()
    torch.manual_seed(0)
    loss, output = trainer.compute_loss(trainer.model, rows, return_outputs=True)
    states, answers = trainer.adversary.pair
    with torch.no_grad():
        probability = trainer.discriminator(states, answers).sigmoid()
    real, fake = probability[:4], probability[4:]
    entropy = torch.nn.functional.binary_cross_entropy
    assert logged["layer_pruners/adv_loss"] == pytest.approx(entropy(fake, torch.ones(4)).item(), rel=1e-4)
    predicted = output.logits[:, :-1].flatten(0, 1)
    task = torch.nn.functional.cross_entropy(predicted, rows["labels"][:, 1:].flatten(), ignore_index=-100)
    assert logged["layer_pruners/task_loss"] == pytest.approx(task.item(), rel=1e-5)
    whole = 25.0 * logged["layer_pruners/task_loss"] + logged["layer_pruners/adv_loss"]
    whole += 1e-4 * logged["token_merger/merge_sparsity_loss"]
    assert loss.item() == pytest.approx(whole, rel=1e-5)
    trainer.create_optimizer_and_scheduler(1)
    trainer.log_scalars("discriminator", trainer.adversary.step(0))
    assert logged["discriminator/real_loss"] == pytest.approx(entropy(real, torch.ones(4)).item(), rel=1e-4)
    assert logged["discriminator/fake_loss"] == pytest.approx(entropy(fake, torch.zeros(4)).item(), rel=1e-4)


def test_discriminator_reads_layers_from_the_end(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    output = trainer.model(**rows, pruning_mode="soft", output_hidden_states=True)
    assert trainer.discriminator.config.layers == [-1, -3, -5]
    states = trainer.adversary.states(output)
    assert all(torch.equal(state, output.hidden_states[layer]) for state, layer in zip(states, (-1, -3, -5)))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_discriminator_is_drawn_anew_with_the_documented_probability(tmp_path, probability):
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no", discriminator_reinit_probability=probability)
    drawn = []
    trainer.adversary.reinitialize = drawn.append
    trainer.train()
    assert len(drawn) == 3 * probability


def test_a_new_discriminator_forgets(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="no", discriminator_reinit_probability=0.0)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.discriminator.state_dict().items() if value.dim() == 2}
    assert trainer.adversary.optimizer.state
    trainer.adversary.reinitialize(0)
    assert not trainer.adversary.optimizer.state
    after = trainer.discriminator.state_dict()
    assert before and all(not torch.equal(value, after[name]) for name, value in before.items())
    # The new weights are bounded like the old ones.
    weight = trainer.discriminator.networks[0][1].weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=0.05)


def test_documented_heads_train(tmp_path):
    """Documented architecture and losses: every weight of merger and pruners moves."""
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="no", kl_weight=0.0, keep_rate_weight=0.0, binarization_weight=0.0
    )
    torch.manual_seed(0)
    sizes = {"architecture": "documented", "internal_size": 16}
    merger = TokenMergerConfig(feature_size=16, merger_type="simple", target_merge_tokens=8, **sizes)
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 3], selection="threshold", **sizes)
    trainer.model = trainer.model_wrapped = trainer._make_trainable(
        PrunedVLM.from_base(trainer.model.base, merger, pruner)
    )
    heads = [*trainer.model.token_merger.named_parameters(), *trainer.model.layer_pruner.named_parameters()]
    before = [parameter.detach().clone() for _, parameter in heads]
    trainer.train()
    still = [name for (name, parameter), old in zip(heads, before) if torch.equal(parameter, old)]
    # The bias of the keys adds the same to every score of a query: softmax takes it out again.
    assert not [name for name in still if not name.startswith("k_proj.bias")]
    assert trainer.evaluate()["eval_avg_merged_tokens"] == pytest.approx(8)


def test_pruners_train_without_a_merger(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=2)
    trainer.model.token_merger = trainer.model.config.token_merger = None
    trainer.train()
    metrics = next(line for line in trainer.state.log_history if "eval_keep_ratio_merge" in line)
    assert metrics["eval_keep_ratio_merge"] == pytest.approx(1.0) and "eval_merge_sparsity_loss" not in metrics


def test_modes_origin_soft_and_hard():
    torch.manual_seed(0)
    sizes = {"architecture": "documented", "internal_size": 16}
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1, 3], selection="threshold", **sizes)
    base = tiny_vlm("llava")
    model = PrunedVLM.from_base(base, None, pruner).eval()
    inputs = batch("llava")
    with torch.no_grad():
        for head in model.layer_pruner.heads.values():
            head.score[-1].weight.normal_(0.0, 50.0)
            head.score[-1].bias -= 0.1
        plain = base(**inputs).logits
        modes = {mode: model(**inputs, pruning_mode=mode) for mode in ("origin", "soft", "hard")}
    real = inputs["attention_mask"].bool()
    assert torch.allclose(modes["origin"].logits[real], plain[real], atol=1e-4)
    soft, hard = modes["soft"], modes["hard"]
    masks = torch.cat([mask.flatten() for mask in soft.soft_masks])
    assert ((masks > 0) & (masks < 1)).any() and not torch.allclose(soft.logits, modes["origin"].logits)
    kept = [(index >= 0).sum().item() for index in hard.kept_index]
    assert kept[3] < kept[0]  # removed for real, not damped
