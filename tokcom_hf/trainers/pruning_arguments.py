"""Arguments of `TokenPruningTrainer`."""

from dataclasses import dataclass, field

from .base import CompressionTrainingArguments


@dataclass
class TokenPruningTrainingArguments(CompressionTrainingArguments):
    """Arguments of `TokenPruningTrainer`. Defaults are the documented numbers; KL loss and FLOPs budget are additions."""

    builds_own_optimizer = True

    merger_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the token merger."})
    pruner_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the layer pruners."})
    discriminator_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the discriminator."})
    lora_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of LoRA adapters."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters in the language model; 0 freezes it."})
    task_weight: float = field(default=25.0, metadata={"help": "Weight of the answers' cross-entropy."})
    adversarial_weight: float = field(default=1.0, metadata={"help": "Weight of the adversarial loss; 0 = none."})
    merge_sparsity_weight: float = field(
        default=1e-4, metadata={"help": "Weight of (expected number of kept tokens - target)²."}
    )
    merge_entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the entropy of each token's assignment to merged tokens."}
    )
    keep_rate_weight: float = field(default=10.0, metadata={"help": "Weight of the squared excess over the budget."})
    binarization_weight: float = field(
        default=0.1, metadata={"help": "Weight of mask · (1 - mask), 0 for hard masks."}
    )
    kl_weight: float = field(default=25.0, metadata={"help": "Weight of the KL loss to the unpruned model's answers."})
    guidance_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the loss between token scores and the unpruned model's attention to the tokens; 0 = none."
        },
    )
    loss_warmup: float = field(
        default=0.0,
        metadata={"help": "Share of training over which the weights of all losses but the task's grow from 0."},
    )
    temperature_start: float = field(default=1.0, metadata={"help": "Temperature of the masks at the start."})
    temperature_end: float = field(default=0.1, metadata={"help": "Temperature of the masks once annealed."})
    temperature_anneal_rate: float = field(
        default=0.5, metadata={"help": "Share of training over which the temperature falls, linearly."}
    )
    discriminator_reinit_probability: float = field(
        default=0.0, metadata={"help": "Probability per step of drawing the discriminator's weights anew."}
    )
    flops_budget: float = field(
        default=1.0, metadata={"help": "Share of the unpruned FLOPs above which accuracy_under_budget is negative."}
    )
    save_parts: bool = field(
        default=False,
        metadata={"help": "Also write checkpoints/{token_merger,layer_pruners,discriminator}_step_N.pt."},
    )
    eval_max_new_tokens: int = field(
        default=4, metadata={"help": "Longest generated answer in evaluations, in tokens."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError(
                "Token pruning trains in bf16 or fp32: one fp16 loss scaler cannot serve two optimizers. Set bf16 instead."
            )
        if not 0.0 < self.temperature_end <= self.temperature_start:
            raise ValueError(
                f"Need 0 < temperature_end <= temperature_start, got {self.temperature_end}, {self.temperature_start}."
            )
        for name in ("temperature_anneal_rate", "loss_warmup", "discriminator_reinit_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
