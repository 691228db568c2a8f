"""What every model, sampler and trainer computes from fixed seeds, as hashes: shows that moving code changed no bit.

    python -m tests.reference_values values.json            # writes
    python -m tests.reference_values values.json --compare  # exit code 1 where a bit differs, and says which

Hashes hold on one machine and one version of torch only; sums beside them hold to rounding elsewhere.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

STEPS = 8


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """A hash of names and bits, and the sum of absolute values."""
    code, total = hashlib.sha256(), 0.0
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        code.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        code.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        total += float(value.double().abs().nan_to_num(posinf=0.0).sum())
    return {"hash": code.hexdigest()[:16], "sum": total}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def models() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Forward and generation of every row of the matrix."""
    from tests.hub.rows import ROWS, outputs, tensors

    for row in ROWS:
        model = row.build()
        yield f"forward {row.name}", outputs(row, model)
        if row.generate is not None:
            torch.manual_seed(0)
            yield f"generate {row.name}", tensors(row.generate(model))


def samplers() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every sampler of TokCom, in blocks and in whole rows."""
    from tests.helpers.tokcom_runs import block_model, row_model

    for name, model in (("blocks", block_model()), ("rows", row_model())):
        for sampler in ("euler", "heun", "renoise"):
            seeded = torch.Generator().manual_seed(3)
            ids = model.eval().generate(num_chunks=4, num_steps=4, sampler=sampler, batch_size=2, generator=seeded)
            yield f"sampler {sampler}, {name}", {"ids": ids}


def trainers(work: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Weights after eight steps of every trainer."""
    import tokcom_hf
    from tests.helpers import joint_lfq_run, pruning_run, tokcom_runs

    steps = {"max_steps": STEPS}
    yield "TokComVAETrainer", weights(trained(tokcom_runs.vae_trainer(work / "vae", **steps)))
    (work / "denoiser").mkdir()
    yield "DenoiserTrainer", weights(trained(tokcom_runs.denoiser_trainer(work / "denoiser", **steps)))
    distilled = weights(trained(tokcom_runs.distillation_trainer(work / "distilled", **steps)))
    yield "DistillationTrainer", {name.removeprefix("denoiser."): value for name, value in distilled.items()}
    small = {"max_steps": STEPS, "save_strategy": "no", "report_to": "none"}
    yield "JointLFQTrainer", weights(trained(joint_lfq_run.make_trainer(work / "lfq", **small)))
    yield "TokenPruningTrainer", weights(trained(pruning_run.make_trainer(work / "pruning", **small)))
    shape = {"image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "patch_size": 2}
    shape |= {"channel_multipliers": [1, 2], "downsample_factor": 4, "num_res_blocks": 1, "mid_attention": False}
    for quantizer in ("ema", "fsq", "lfq"):
        yield (
            f"VQGANTrainer, {quantizer}",
            weights(trained(vqgan_trainer(tokcom_hf, work / quantizer, shape, quantizer))),
        )


def trained(trainer):
    trainer.train()
    return trainer


def vqgan_trainer(package, folder: Path, shape: dict, quantizer: str):
    from tokcom_hf.data.images import ProceduralImages

    torch.manual_seed(0)
    if quantizer != "ema":
        shape = {name: value for name, value in shape.items() if name not in ("codebook_size", "codebook_dim")}
    processor = package.VQGANImageProcessor(16, size_divisor=4)
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "adversarial_start": 0.25, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "num_pictures": 4, "init_images": 16,
    }  # fmt: skip
    return package.VQGANTrainer(
        package.VQGAN(package.VQGANConfig(quantizer=quantizer, **shape)),
        package.VQGANTrainingArguments(**settings),
        package.VQGANDiscriminator(package.VQGANDiscriminatorConfig(base_channels=8, num_layers=1)),
        train_dataset=ProceduralImages(32, processor),
        eval_dataset=ProceduralImages(8, processor, first=1000),
        processing_class=processor,
    )


def all_values() -> dict[str, dict[str, object]]:
    torch.set_num_threads(1)
    found = {}
    # Trainers print their losses.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as work:
        for part in (models(), samplers(), trainers(Path(work))):
            for name, tensors in part:
                found[name] = digest(tensors)
    return found


if __name__ == "__main__":
    path, values = Path(sys.argv[1]), all_values()
    if "--compare" not in sys.argv:
        path.write_text(json.dumps(values, indent=1) + "\n")
    else:
        former = json.loads(path.read_text())
        differing = [name for name in former | values if former.get(name) != values.get(name)]
        print(f"{len(values) - len(differing)} of {len(values)} equal", *differing, sep="\n  ")
        raise SystemExit(bool(differing))
