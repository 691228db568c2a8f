"""Flow matching: formulas, time grids and samplers against cases with a known answer."""

import pytest
import torch

from tokcom_hf.models.flow_matching import (
    clean_to_velocity,
    interpolate,
    sample,
    sample_times,
    time_grid,
    velocity_to_clean,
    velocity_weight,
)


def test_velocity_is_the_derivative_of_the_path():
    noise, clean, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.1, 0.5, 0.8])
    x_t = interpolate(noise, clean, t)
    velocity = clean_to_velocity(clean, x_t, t)
    torch.testing.assert_close(velocity, clean - noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity_to_clean(velocity, x_t, t), clean)


def test_time_may_differ_per_position():
    noise, clean = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert interpolate(noise, clean, torch.tensor([[0.25, 1.0]]))[0, :, 0].tolist() == [0.25, 1.0]


@pytest.mark.parametrize("kind", ["uniform", "quadratic", "cosine"])
def test_time_grids_rise_from_start_to_one(kind):
    grid = time_grid(8, kind, start=0.25)
    assert len(grid) == 9 and grid[0] == 0.25 and grid[-1] == 1.0
    assert all(a < b for a, b in zip(grid, grid[1:]))


def test_unknown_names_and_zero_steps_raise():
    with pytest.raises(ValueError, match="num_steps"):
        time_grid(0)
    with pytest.raises(ValueError, match="time_grid must be one of"):
        time_grid(4, "spiral")
    with pytest.raises(ValueError, match="sampler must be one of"):
        sample(lambda x, t: x, torch.zeros(1, 1, 1), [0.0, 1.0], "magic")
    with pytest.raises(ValueError, match="time_distribution"):
        sample_times((2,), "cauchy", 0.0, 1.0)


@pytest.mark.parametrize("sampler", ["euler", "renoise", "heun"])
def test_every_sampler_reaches_a_known_target(sampler):
    target = torch.randn(2, 3, 4)
    result = sample(lambda x, t: target, torch.randn(2, 3, 4), time_grid(5), sampler)
    torch.testing.assert_close(result, target)


def gaussian_error(sampler: str, steps: int) -> float:
    """Exact posterior mean of x1 ~ N(3, 0.5²): the flow must carry N(0, 1) to it; error of the resulting deviation."""
    mean, std = 3.0, 0.5

    def denoise(x, t):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + t * std**2 / variance * (x - t * mean)

    x = torch.linspace(-2, 2, 101, dtype=torch.float64).view(1, -1, 1)
    result = sample(denoise, x, time_grid(steps), sampler)
    return (result - (mean + std * x)).abs().max().item()


def test_samplers_converge_and_heun_is_of_second_order():
    assert gaussian_error("euler", 64) < gaussian_error("euler", 8) / 4
    assert gaussian_error("heun", 16) < gaussian_error("euler", 32) / 2
    assert gaussian_error("euler", 256) < 0.02


def test_renoising_draws_from_its_generator():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(lambda x, t: x / 2, torch.ones(1, 2, 2), time_grid(4), "renoise", 1.0, generator)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_training_times_stay_inside_and_follow_their_distribution():
    generator = torch.Generator().manual_seed(0)
    t = sample_times((20000,), "logit_normal", -1.0, 0.8, generator)
    assert t.min() >= 1e-4 and t.max() <= 1 - 1e-4
    assert abs(torch.logit(t).mean().item() + 1.0) < 0.03
    assert abs(sample_times((20000,), "uniform", 0, 0, generator).mean().item() - 0.5) < 0.02


def test_velocity_weight_is_clamped():
    assert velocity_weight(torch.tensor([0.0, 0.5, 0.9999])).tolist() == pytest.approx([1.0, 4.0, 400.0], rel=1e-4)
