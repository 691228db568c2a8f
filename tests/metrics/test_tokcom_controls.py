"""Controls of TokCom: what they lack, and that the model itself keeps it."""

import numpy as np
import pytest
import torch

from tests.helpers.tokcom_runs import Rows, block_model, posterior_model
from tokcom_hf.data.latent_rows import latent_statistics
from tokcom_hf.evaluation.tokcom_controls import tokcom_samplers, without_denoiser
from tokcom_hf.trainers.tokcom_stages import some_chunks


@pytest.fixture(scope="module")
def model():
    model = posterior_model(read_guesses=True).eval()
    model.fit_latents(*latent_statistics(model.vae, Rows()))
    model.posterior.fit(model, some_chunks(Rows(), 4))
    return model


def drawn(model, **settings) -> torch.Tensor:
    return model.generate(num_chunks=4, batch_size=4, generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize("settings", [{"block_size": 1}, {"block_size": 4}, {"sampler": "euler"}])
def test_without_its_denoiser_a_model_writes_as_with_one_that_returns_zeros(model, settings):
    control = without_denoiser(model)
    last = model.denoiser.output_proj
    before = {name: value.clone() for name, value in last.state_dict().items()}
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
        assert torch.equal(drawn(control, **settings), drawn(model, **settings))
        for parameter in last.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn(control, **settings), drawn(model, **settings))
    last.load_state_dict(before)


def test_the_table_has_a_row_without_the_denoiser_beside_each_row_of_the_dial(model):
    samplers = tokcom_samplers(model, {"num_steps": 2}, [4, 0])
    assert list(samplers) == [
        "heads alone", "TokCom, noise removed", "TokCom, one step", "TokCom, 2 steps", "TokCom, block 4",
        "TokCom, block all", "TokCom, 2 steps, denoiser removed", "TokCom, block 4, denoiser removed",
        "TokCom, block all, denoiser removed",
    ]  # fmt: skip
    assert samplers["TokCom, block 4, denoiser removed"].settings == {"num_steps": 2, "block_size": 4}
    rows = samplers["TokCom, noise removed"].rows(3, 16, seed=0)
    assert (rows == rows[:1]).all() and not np.array_equal(rows, samplers["TokCom, 2 steps"].rows(3, 16, seed=0))


def test_a_model_whose_denoiser_predicts_latents_cannot_do_without():
    model = block_model()
    assert not any("denoiser removed" in name for name in tokcom_samplers(model, {"num_steps": 2}, []))
    with pytest.raises(ValueError, match="Only a model with token_posterior"):
        without_denoiser(model)
