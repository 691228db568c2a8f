"""A tiny VQGAN and its trainer."""

import torch

from tokcom_hf import VQGAN, VQGANConfig, VQGANDiscriminator, VQGANDiscriminatorConfig, VQGANImageProcessor
from tokcom_hf.data.images import ProceduralImages
from tokcom_hf.models.configuration_vqgan import READ_BY
from tokcom_hf.trainers.vqgan import VQGANTrainer, VQGANTrainingArguments

MODEL = {
    "image_size": 16,
    "codebook_size": 16,
    "codebook_dim": 8,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "downsample_factor": 4,
    "patch_size": 2,
    "num_res_blocks": 1,
    "mid_attention": False,
    "temperature": 0.0,
    "entropy_weight": 0.0,
    "codebook_init": "kmeans",
    "reset_interval": 2,
    "dead_code_unit": "mean",
    "balance_rate": 0.05,
}
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "perceptual": "random",
    "adversarial_start": 0.25,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "num_pictures": 4,
    "init_images": 16,
}


def trainer(folder, model_settings=None, **settings) -> VQGANTrainer:
    torch.manual_seed(0)
    model_settings = MODEL | (model_settings or {})
    if model_settings.get("quantizer") == "lfq":
        model_settings = {name: value for name, value in model_settings.items() if "lfq" in READ_BY.get(name, ["lfq"])}
    model = VQGAN(VQGANConfig(**model_settings))
    discriminator = VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=1))
    args = VQGANTrainingArguments(output_dir=str(folder), **(TRAINING | settings))
    processor = VQGANImageProcessor(16, size_divisor=4)
    return VQGANTrainer(
        model,
        args,
        discriminator,
        train_dataset=ProceduralImages(32, processor),
        eval_dataset=ProceduralImages(8, processor, first=1000),
        processing_class=processor,
    )


def state(network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
