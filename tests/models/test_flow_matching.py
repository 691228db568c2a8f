"""Flow matching: formulas, times and samplers against cases with a known answer."""

import pytest
import torch

from tokcom_hf.models.tokcom_flow_matching import (
    FIRST,
    LAST,
    MOST_SMALL,
    SMALL_STEP,
    denoising_steps,
    interpolate,
    quantile_times,
    sample,
    sampling_times,
    small_times,
    training_times,
    velocity,
    velocity_weight,
)


def test_velocity_is_the_derivative_of_the_path():
    noise, clean = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    for t in (0.1, 0.5, 0.8):
        x_t = interpolate(noise, clean, torch.full((3,), t))
        v = velocity(clean, x_t, t)
        torch.testing.assert_close(v, clean - noise, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x_t + (1 - t) * v, clean)


def test_time_may_differ_per_position():
    noise, clean = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert interpolate(noise, clean, torch.tensor([[0.25, 1.0]]))[0, :, 0].tolist() == [0.25, 1.0]


def test_the_weighted_error_of_clean_latents_is_that_of_the_velocity():
    noise, clean, predicted, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4), 0.3
    x_t = interpolate(noise, clean, torch.full((3,), t))
    error = (velocity(predicted, x_t, t) - (clean - noise)).square()
    torch.testing.assert_close(velocity_weight(torch.tensor(t)) * (predicted - clean).square(), error)


def test_velocity_weight_is_clamped():
    assert velocity_weight(torch.tensor([0.0, 0.5, 0.9999])).tolist() == pytest.approx([1.0, 4.0, 400.0], rel=1e-4)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_sampling_times_rise_from_start_to_one(power, start):
    times = sampling_times(8, power, start)
    assert len(times) == 9 and times[0] == start and times[-1] == 1.0
    assert all(a < b for a, b in zip(times, times[1:]))
    assert times[4] == pytest.approx(start + (1 - start) * 0.5**power)


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_training_times_fall_equally_often_between_quantile_times(start):
    times = quantile_times(8, -0.75, 0.7, start)
    assert len(times) == 9 and times[0] == start and times[-1] == 1.0
    drawn = training_times((100_000,), "logit_normal", -0.75, 0.7, torch.Generator().manual_seed(0))
    counts = torch.histogram(drawn[drawn >= start], torch.tensor(times)).hist
    assert counts.std() < 0.03 * counts.mean()


def test_from_a_noise_level_on_as_many_steps_are_taken_as_documented():
    assert denoising_steps(50, 0.9) == 5 and denoising_steps(50, 0.5) == 25 and denoising_steps(50, 0.0) == 50
    assert denoising_steps(4, 0.9) == 1 and denoising_steps(10, 0.99) == 1 and denoising_steps(50, 0.33) == 33
    # Each share of whole steps is met, although 1 − k / n is no binary fraction.
    assert all(denoising_steps(n, k / n) == n - k for n in (3, 7, 10, 50, 100) for k in range(n))


@pytest.mark.parametrize("sampler", ["euler", "renoise", "heun", "multistep"])
@pytest.mark.parametrize("steps", [1, 5])
def test_every_sampler_reaches_a_known_target(sampler, steps):
    target = torch.randn(2, 3, 4)
    result = sample(lambda x, t: target, torch.randn(2, 3, 4), sampling_times(steps), sampler)
    torch.testing.assert_close(result, target)


@pytest.mark.parametrize(("sampler", "passes"), [("euler", 4), ("renoise", 4), ("heun", 7), ("multistep", 4)])
def test_passes_of_the_network(sampler, passes):
    seen = []
    sample(lambda x, t: seen.append(t) or x, torch.zeros(1, 1, 1), sampling_times(4), sampler)
    assert len(seen) == passes and max(seen) == 0.75


class Remembered:
    """Calls and what stands in for them between two, by name and time."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t):
        self.seen.append(("call", t))
        return x

    def between(self, x, t):
        self.seen.append(("between", t))
        return x


def test_multirate_makes_small_steps_between_its_calls():
    found = Remembered()
    times = [0.0, 0.3, 0.6, 1.0]
    sample(found, torch.zeros(1, 1, 1), times, "multirate")
    assert [t for name, t in found.seen if name == "call"] == times[:-1]
    assert found.seen[0] == ("call", 0.0) and found.seen[1] == ("between", FIRST)
    small = torch.tensor([t for _, t in found.seen], dtype=torch.float64)
    assert (small.diff() > 0).all() and small[-1].item() == pytest.approx(LAST)
    # In equal steps of log(t / (1 − t)) from one call to the next.
    for first, last, steps in ((FIRST, 0.3, 8), (0.3, 0.6, 3), (0.6, LAST, 6)):
        inside = torch.logit(small[(small >= first - 1e-9) & (small <= last + 1e-9)])
        rises = inside.diff()
        torch.testing.assert_close(rises, rises[:1].expand(len(rises)))
        assert len(rises) == steps
        assert SMALL_STEP * 2 / 3 < rises[0] < SMALL_STEP * 4 / 3
    # Where one call serves the whole way, fewer and longer steps.
    assert len([t for t in small_times(0.0, 1.0) if FIRST - 1e-9 <= t <= LAST + 1e-9]) == MOST_SMALL + 1
    # Also where a step ends before FIRST or begins behind LAST.
    for now, following in ((0.0, 0.004), (0.98, 1.0)):
        times = small_times(now, following)
        assert times == sorted(set(times)) and times[0] == now and times[-1] == following and len(times) > 2


MEAN, STD = 3.0, 0.5


def gaussian(x: torch.Tensor, t: float) -> torch.Tensor:
    """The posterior mean of x1 ~ N(3, 0.5²) given x_t = (1 − t) · x0 + t · x1 with x0 ~ N(0, 1)."""
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + t * STD**2 / variance * (x - t * MEAN)


def gaussian_error(sampler: str, steps: int) -> float:
    """The flow carries x0 to 3 + 0.5 · x0 exactly; the largest error over x0."""
    x = torch.linspace(-2, 2, 101, dtype=torch.float64).view(1, -1, 1)
    result = sample(gaussian, x, sampling_times(steps), sampler)
    return (result - (MEAN + STD * x)).abs().max().item()


def test_samplers_converge_and_two_are_of_second_order():
    assert gaussian_error("euler", 64) < gaussian_error("euler", 8) / 4
    assert gaussian_error("heun", 16) < gaussian_error("euler", 32) / 2
    assert gaussian_error("heun", 32) < gaussian_error("heun", 8) / 8
    assert gaussian_error("multistep", 16) < gaussian_error("euler", 32) / 2
    assert gaussian_error("multistep", 32) < gaussian_error("multistep", 8) / 4
    assert gaussian_error("euler", 256) < 0.02


def test_renoising_reaches_the_mean_and_draws_from_its_generator():
    def run(seed: int, noise_std: float = 1.0, steps: int = 8) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(gaussian, torch.randn(4000, 1, 1), sampling_times(steps), "renoise", noise_std, generator)

    assert run(0, steps=1).unique().tolist() == [MEAN]
    result = run(0)
    assert abs(result.mean().item() - MEAN) < 0.05 and 0.1 < result.std().item() < 1.2 * STD
    x = torch.ones(1, 2, 2)

    def again(seed: int, noise_std: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(lambda x, t: x / 2, x, sampling_times(4), "renoise", noise_std, generator)

    assert torch.equal(again(0, 1.0), again(0, 1.0)) and not torch.equal(again(0, 1.0), again(1, 1.0))
    assert torch.equal(again(0, 0.0), again(1, 0.0)) and not torch.equal(again(0, 0.5), again(0, 1.0))


def test_training_times_stay_inside_and_follow_their_distribution():
    generator = torch.Generator().manual_seed(0)
    t = training_times((20000,), "logit_normal", -1.0, 0.8, generator)
    assert t.min() >= 1e-4 and t.max() <= 1 - 1e-4
    assert abs(torch.logit(t).mean().item() + 1.0) < 0.03 and abs(torch.logit(t).std().item() - 0.8) < 0.03
    uniform = training_times((20000, 2), "uniform", 0, 0, generator)
    assert uniform.shape == (20000, 2) and abs(uniform.mean().item() - 0.5) < 0.02
    assert abs(uniform.std().item() - 12**-0.5) < 0.01
