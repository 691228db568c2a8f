"""The accelerate configurations: each is read by accelerate; what sharding cannot do is refused."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tests.helpers.processes import ROOT
from tokcom_hf import DenoiserTrainer, VQGANTrainer
from tokcom_hf.trainers.sharding import prepare_sharding, replicate

CONFIGS = ROOT / "recipes" / "configs" / "accelerate"
KINDS = {
    "multi_gpu": ("MULTI_GPU", "multi_gpu"),
    "two_cpu_processes": ("MULTI_GPU", "multi_gpu"),
    "fsdp2": ("FSDP", "use_fsdp"),
    "deepspeed_zero2": ("DEEPSPEED", "use_deepspeed"),  # parsed, not run: deepspeed is no dependency
}


def test_every_configuration_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_configuration(name):
    kind, launcher = KINDS[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.use_cpu == (name == "two_cpu_processes")
    given = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args = _validate_launch_command(given)[0]
    assert args.num_processes == 2
    assert [one for one in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, one)] == [launcher]
    if name == "deepspeed_zero2":
        assert (args.zero_stage, args.mixed_precision, args.gradient_accumulation_steps) == (2, "bf16", 1)


def sharded(kind=DenoiserTrainer, plugin=None, **changes) -> SimpleNamespace:
    """What `prepare_sharding` reads of a trainer."""
    args = {"ema_decay": 0.0, "muon_learning_rate": 0.0, "load_best_model_at_end": False} | changes
    settings = {
        "fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False,
    } | (plugin or {})  # fmt: skip
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**settings))
    accelerator = SimpleNamespace(state=state)
    trainer = kind.__new__(kind)
    trainer.__dict__ |= {"args": SimpleNamespace(**args), "accelerator": accelerator, "is_fsdp_enabled": True}
    return trainer


@pytest.mark.parametrize(("changes", "told"), [
    ({"ema_decay": 0.9}, "ema_decay needs whole weights"),
    ({"muon_learning_rate": 1e-3}, "muon_learning_rate needs whole weights"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end needs whole weights"),
    ({"guidance_weight": 1.0}, "guidance_weight needs whole weights"),
    ({"kind": VQGANTrainer}, "VQGANTrainer needs whole weights in every step"),
    ({"plugin": {"state_dict_type": "SHARDED_STATE_DICT"}}, "FULL_STATE_DICT"),
    ({"plugin": {"cpu_ram_efficient_loading": True}}, "loses buffers"),
    ({"plugin": {"fsdp_version": 1}}, "fsdp_version: 2"),
])  # fmt: skip
def test_what_sharding_cannot_do_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        prepare_sharding(sharded(**changes))


def test_deepspeed_with_a_discriminator_is_refused():
    with pytest.raises(ValueError, match="drives one network"):
        replicate(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED), torch.nn.Linear(1, 1))
