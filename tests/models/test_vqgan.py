"""VQGAN, its discriminator and pipelines as Hugging Face models."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from tokcom_hf import VQGAN, VQGANConfig, VQGANDiscriminator, VQGANDiscriminatorConfig, VQGANImageProcessor

TINY = {
    "image_size": 16,
    "codebook_size": 16,
    "codebook_dim": 8,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "downsample_factor": 4,
    "patch_size": 2,
    "num_res_blocks": 1,
    "codebook_init": "data",
}


def tiny(**settings) -> VQGAN:
    torch.manual_seed(0)
    other = settings.get("quantizer", "ema") != "ema"
    return VQGAN(VQGANConfig(**(TINY | ({"codebook_init": "uniform"} if other else {}) | settings)))


def images(batch=2, channels=3, height=16, width=16) -> torch.Tensor:
    return torch.rand(batch, channels, height, width) * 2 - 1


@pytest.mark.parametrize("quantizer", ["ema", "fsq", "lfq"])
def test_forward_names_its_losses_and_trains_every_parameter(quantizer):
    model = tiny(quantizer=quantizer).train()
    output = model(images(4))
    assert output.reconstruction.shape == (4, 3, 16, 16) and output.codes.shape == (4, 4, 4)
    config = model.config
    total = output.reconstruction_loss + config.commitment_weight * output.commitment_loss
    torch.testing.assert_close(output.loss, total + config.entropy_weight * output.entropy_loss)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_any_divisible_size_and_other_sizes_are_refused():
    model = tiny().eval()
    assert model.encode(images(1, 3, 8, 28)).shape == (1, 2, 7)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(images(1, 3, 10, 16))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        model(images(1, 1))
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        model.decode_codes(torch.full((1, 4, 4), 16))
    with pytest.raises(ValueError, match="shape"):
        model.decode_codes(torch.zeros(4, 4, dtype=torch.long))


@pytest.mark.parametrize(("into", "out"), [(1, 1), (2, 2), (4, 4), (1, 3)])
def test_channels_in_and_out(into, out):
    model = tiny(in_channels=into, out_channels=out)
    labels = images(2, out) if into != out else None
    assert model(images(2, into), labels=labels).reconstruction.shape == (2, out, 16, 16)


def test_different_channels_without_target_are_refused():
    with pytest.raises(ValueError, match="labels"):
        tiny(in_channels=1)(images(1, 1))


def test_decoded_codes_equal_the_reconstruction_and_encoding_ignores_training_mode():
    model = tiny()
    model(images(4))
    codes = model.encode(images(2).zero_())
    assert model.training and torch.equal(codes, model.eval().encode(images(2).zero_()))
    pixels = images()
    output = model(pixels)
    torch.testing.assert_close(model.decode_codes(output.codes), output.reconstruction, atol=1e-4, rtol=0)


def test_save_and_load_keep_codes_codebook_and_statistics(tmp_path):
    model = tiny().train()
    model(images(8))
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, VQGAN)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    pixels = images()
    assert torch.equal(model.encode(pixels), again.encode(pixels))


def test_bf16_weights_keep_the_codebook_in_float32(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = VQGAN.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16 and model.quantizer.codebook.dtype == torch.float32
    assert model(images()).reconstruction.isfinite().all()


def test_expansion_through_the_model_survives_saving(tmp_path):
    model = tiny().train()
    model(images(8))
    before = model.quantizer.codebook.clone()
    model.expand_codebook(24)
    model.save_pretrained(tmp_path)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config.codebook_size == 24 and torch.equal(again.quantizer.codebook[:16], before)
    with pytest.raises(ValueError, match="exceed 24"):
        again.expand_codebook(8)
    with pytest.raises(ValueError, match="ema"):
        tiny(quantizer="lfq").expand_codebook(32)


def test_discriminator_judges_patches(tmp_path):
    model = VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=2))
    assert model(images(2, 3, 32, 32)).logits.shape == (2, 1, 6, 6)
    with pytest.raises(ValueError, match="at least 12"):
        model(images(1, 3, 8, 8))
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), VQGANDiscriminator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan")
    model = tiny().train()
    model(images(8))
    model.save_pretrained(path)
    VQGANImageProcessor(16, size_divisor=4).save_pretrained(path)
    return path


def test_pipelines(folder):
    picture = Image.new("RGB", (40, 30), "red")
    tokenize = pipeline("vq-tokenize", model=str(folder))
    result = tokenize(picture)
    assert result["length"] == 16 and len(result["codes"]) == 4
    reconstruct = pipeline("vq-reconstruction", model=str(folder))
    first, second = reconstruct([picture, picture])
    assert first["image"].size == (16, 16) and first["codes"] == second["codes"] == result["codes"]
    back = tokenize(torch.tensor(result["codes"]))["image"]
    assert back.tobytes() == first["image"].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_loads_in_a_fresh_process_with_and_without_the_package(folder, installed):
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (16, 16), "teal"))["pixel_values"]
    expected = AutoModel.from_pretrained(folder).eval().encode(pixels).tolist()
    script = f"""
import importlib.abc, sys
installed = {installed}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "tokcom_hf":
            raise ImportError("not installed")
if installed:
    import tokcom_hf
else:
    sys.meta_path.insert(0, Block())
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
remote = {{}} if installed else {{"trust_remote_code": True}}
model = AutoModel.from_pretrained({str(folder)!r}, **remote).eval()
processor = AutoImageProcessor.from_pretrained({str(folder)!r}, **remote)
assert ("tokcom_hf" in sys.modules) == installed
print(model.encode(processor(Image.new("RGB", (16, 16), "teal"))["pixel_values"]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected)


def test_balancing_switched_on_later_starts_even_and_keeps_the_trained_codes(tmp_path):
    model = tiny().train()
    model(images(8))
    model.save_pretrained(tmp_path)
    balanced = VQGAN.from_pretrained(tmp_path, balance_rate=0.05)
    before, after = model.quantizer.state_dict(), balanced.quantizer.state_dict()
    assert after.pop("penalty").eq(0).all() and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_training_on_an_image_with_nan_is_refused_and_costs_no_code():
    model = tiny(codebook_init="kmeans").train()
    pixels = images(4)
    pixels[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="finite features"):
        model(pixels)
    with pytest.raises(ValueError, match="Encoding needs finite features"):
        model.encode(pixels)
    assert not model.quantizer.initialized and model.quantizer.codebook.isfinite().all()


def test_threads_encode_as_one_thread_does():
    model = tiny(temperature=50.0).train()
    model(images(4))
    batches = [images(2) for _ in range(16)]
    expected = [model.encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(model.encode, batches), expected))


def test_the_image_processor_follows_its_arguments_or_names_them(tmp_path):
    image = Image.new("RGB", (40, 20), "teal")
    processor = VQGANImageProcessor(16, size_divisor=4)
    processor.save_pretrained(tmp_path)
    again = VQGANImageProcessor.from_pretrained(tmp_path)
    assert processor(image)["pixel_values"].shape == again(image)["pixel_values"].shape == (1, 3, 16, 16)
    assert processor(image, image_size=8, num_channels=1)["pixel_values"].shape == (1, 1, 8, 8)
    assert processor(image, resize_mode="none")["pixel_values"].shape == (1, 3, 20, 40)
    for call in (lambda: processor(image, return_tensor="pt"), lambda: VQGANImageProcessor(16, return_tensor="pt")):
        with pytest.raises(TypeError, match="'return_tensor'"):
            call()
    with pytest.raises(ValueError, match="multiple of 4"):
        processor(image, image_size=7)
