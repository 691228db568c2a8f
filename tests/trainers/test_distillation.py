"""Distillation: a student of two steps comes close to where eight steps of the teacher end, and is saved as such."""

import pytest
import torch
from transformers import AutoModel

from tests.helpers.tokcom_runs import (
    Rows,
    block_model,
    denoiser_trainer,
    distillation_trainer,
    posterior_model,
    row_model,
    settings,
    vae_trainer,
)
from tokcom_hf import DistillationTrainer, DistillationTrainingArguments, TokComModel
from tokcom_hf.data.latent_rows import latent_statistics
from tokcom_hf.models.tokcom_denoise import PathPoint
from tokcom_hf.models.tokcom_flow_matching import sample, small_times, step_times
from tokcom_hf.trainers import tokcom_distillation
from tokcom_hf.trainers.tokcom_stages import some_chunks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that has learned to count."""
    folder, rows = tmp_path_factory.mktemp("teacher"), Rows(counting=True)
    model = block_model(self_conditioning=False, time_distribution="logit_normal", block_sizes=[1])
    quick = {"rows": rows, "logging_steps": 50, "learning_rate": 1e-2}
    vae_trainer(folder, model.vae, max_steps=150, **quick).train()
    denoiser_trainer(folder, model, max_steps=150, **quick).train()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trainer(teacher, tmp_path_factory):
    trainer = distillation_trainer(
        tmp_path_factory.mktemp("student"), teacher, Rows(counting=True), max_steps=240, learning_rate=2e-3,
        logging_steps=20, teacher_steps=8, student_steps=2,
    )  # fmt: skip
    trainer.train()
    return trainer


@torch.no_grad()
def end_point(teacher, denoiser, steps: int) -> torch.Tensor:
    """Where a denoiser ends in so many steps from the same noise, behind the same texts."""
    context = teacher.context(Rows(8, counting=True).ids)[:, :-1:4].flatten(0, 1)
    noise = torch.randn(len(context), 1, 16, generator=torch.Generator().manual_seed(5))

    def denoise(x, t):
        return denoiser(x, torch.full((1,), t), context, return_dict=True).clean_latents

    return sample(denoise, noise, step_times(teacher.config, steps))


def test_two_steps_of_the_student_end_where_eight_of_the_teacher_do(teacher, trainer):
    wanted = end_point(teacher, teacher.denoiser, 8)
    before = (end_point(teacher, teacher.denoiser, 2) - wanted).square().mean()
    after = (end_point(teacher, trainer.model.eval(), 2) - wanted).square().mean()
    assert before > 0.02 and after < 0.6 * before


def test_the_saved_folder_takes_two_steps_by_default(trainer, tmp_path, monkeypatch):
    trainer.distilled().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.num_steps == 2
    expected = trainer.model.denoiser.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.denoiser.state_dict().items())
    calls = []
    model.denoiser.register_forward_hook(lambda *arguments: calls.append(1))
    model.generate(num_chunks=3)
    assert len(calls) == 2 * 3
    model.generate(num_chunks=3, num_steps=5)
    assert len(calls) == 2 * 3 + 5 * 3
    assert trainer.teacher.config.num_steps == 8


def test_a_number_of_steps_in_the_teachers_generation_config_does_not_outlive_it(trainer):
    trainer.teacher.generation_config.num_steps = 8
    try:
        model, counted = trainer.distilled(), []
        model.denoiser.register_forward_hook(lambda *_: counted.append(1))
        model.generate(num_chunks=1)
        assert len(counted) == 2
    finally:
        trainer.teacher.generation_config.num_steps = None


def test_gradients_are_the_students_alone(tmp_path):
    run = distillation_trainer(tmp_path, posterior_model(read_guesses=True), max_steps=1)
    run.train()
    assert all(parameter.grad is None for parameter in run.teacher.parameters())
    # What is distilled can be trained as a whole, like a model that is loaded.
    assert all(parameter.requires_grad for parameter in run.distilled().parameters())


def test_padding_is_not_followed(tmp_path):
    """A row of which only the beginning is text trains the student as if the rest were not there."""

    class Padded(Rows):
        def __init__(self, filler: int):
            super().__init__(4)
            self.filler = filler

        def __getitem__(self, index):
            ids, mask = self.ids[index].clone(), torch.ones(16, dtype=torch.long)
            ids[8:], mask[8:] = self.filler, 0
            return {"input_ids": ids, "attention_mask": mask}

    found = []
    for filler in (0, 7):
        run = distillation_trainer(tmp_path / str(filler), block_model(block_sizes=[1]), Padded(filler), max_steps=3)
        run.train()
        found.append(run.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


@pytest.mark.parametrize("sampler", ["euler", "heun", "multistep", "renoise"])
def test_the_student_is_trained_where_generation_takes_it(tmp_path, sampler):
    """What it is shown at its second time is where its own first step ends, self-conditioning included."""
    model = block_model(sampler=sampler, block_sizes=[1])
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    run = distillation_trainer(tmp_path, model, max_steps=8, learning_rate=0.0)
    calls = []

    def remember(module, given, named, result):
        trained = result.clean_latents.requires_grad
        calls.append((given[0], given[1].item(), named["self_condition"], result.clean_latents.detach(), trained))

    run.model.register_forward_hook(remember, with_kwargs=True)
    run.train()
    ends = [index for index, (*_, t, _, _, trained) in enumerate(calls) if trained and t > 0]
    assert ends
    for index in ends:
        x, t, condition, *_ = calls[index]
        first = index - (2 if sampler == "heun" else 1)
        x0, start, _, clean, _ = calls[first]
        assert start == 0.0 and t == pytest.approx(0.5)
        torch.testing.assert_close(condition, calls[index - 1][3])
        if sampler in ("euler", "multistep"):
            # The first of several steps has no prediction before it.
            torch.testing.assert_close(x, (1 - t) * x0 + t * clean)
        elif sampler == "heun":
            ahead, _, _, again, _ = calls[index - 1]
            torch.testing.assert_close(ahead, (1 - t) * x0 + t * clean)
            torch.testing.assert_close(x, x0 + t * ((clean - x0) + (again - ahead) / (1 - t)) / 2)
        else:
            fresh = (x - t * clean) / (1 - t)
            assert abs(fresh.std() - 1) < 0.2 and (fresh - x0).abs().mean() > 0.5


def test_a_student_whose_first_step_the_heads_take_learns_the_others(tmp_path):
    """It starts there from where small steps along the heads' prediction end."""
    model = posterior_model(block_sizes=[1], recent_size=0)
    model.fit_latents(*latent_statistics(model.vae, Rows()))
    model.posterior.fit(model, some_chunks(Rows(), 4))
    run = distillation_trainer(tmp_path, model, max_steps=3)
    calls = []
    run.model.register_forward_hook(lambda module, given, result: calls.extend(given[1].tolist()))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert calls and all(t == pytest.approx(0.5) for t in calls)
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    student = run.distilled()
    noise = {"generator": torch.Generator().manual_seed(1)}
    assert student.generate(num_chunks=2, **noise).shape == (1, 8) and student.config.sampler == "multirate"
    with pytest.raises(ValueError, match="the heads take the first step; student_steps must be at least 2, got 1"):
        distillation_trainer(tmp_path, model, student_steps=1)


@pytest.mark.parametrize("steps", [1, 2])
def test_recent_tokens_learn_the_first_step_too(tmp_path, monkeypatch, steps):
    """In its small steps they correct what the heads say."""
    model = posterior_model(block_sizes=[1])
    model.fit_latents(*latent_statistics(model.vae, Rows()))
    model.posterior.fit(model, some_chunks(Rows(), 4))
    run = distillation_trainer(tmp_path, model, max_steps=8, student_steps=steps)
    trained, predict = [], type(model.posterior).predict

    def remember(self, model, x_t, timesteps, context, earlier, labels, learns):
        if labels is not None:
            trained.append(timesteps.item())
        assert not learns  # A student writes as it will in generation.
        return predict(self, model, x_t, timesteps, context, earlier, labels, learns)

    monkeypatch.setattr(type(model.posterior), "predict", remember)
    before = {name: value.clone() for name, value in model.recent.state_dict().items()}
    run.train()
    first = [t for t in trained if t < run.times[1] - 1e-6]
    assert first and min(first) > 0 and (steps == 1) == (len(first) == len(trained))
    student = run.distilled()
    assert any(not torch.equal(value, before[name]) for name, value in student.recent.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in run.teacher.recent.state_dict().items())
    calls = []
    student.denoiser.register_forward_hook(lambda *_: calls.append(1))
    assert student.generate(num_chunks=2).shape == (1, 8) and len(calls) == 2 * (steps - 1)


def test_the_student_has_times_of_its_own_where_they_are_given(tmp_path):
    model = posterior_model(block_sizes=[1], step_quantiles=True, time_distribution="logit_normal")
    run = distillation_trainer(tmp_path, model, student_power=0.6)
    student = run.distilled()
    student.save_pretrained(tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved").config
    assert run.times == [0.0, pytest.approx(0.5**0.6), 1.0] == step_times(saved, saved.num_steps)
    assert (saved.step_power, saved.step_quantiles) == (0.6, False) and model.config.step_quantiles


def test_a_call_of_the_student_learns_from_the_small_steps_that_rest_on_it(tmp_path, monkeypatch):
    """Each prediction that is trained stands on the student's own path, at a small time behind the call it rests on."""
    model = posterior_model(block_sizes=[1])
    model.fit_latents(*latent_statistics(model.vae, Rows()))
    model.posterior.fit(model, some_chunks(Rows(), 4))
    run = distillation_trainer(tmp_path, model, max_steps=24)
    trained, walked, predict = [], [], type(model.posterior).predict

    def remember(self, model, x_t, timesteps, context, earlier, labels, learns):
        if labels is not None:
            trained.append((x_t, timesteps.item(), earlier))
        assert not learns  # A student writes as it will in generation.
        return predict(self, model, x_t, timesteps, context, earlier, labels, learns)

    def walk(denoise, x, times, *more, **named):
        walked.append((times, sample(denoise, x, times, *more, **named)))
        return walked[-1][1]

    monkeypatch.setattr(type(model.posterior), "predict", remember)
    monkeypatch.setattr(tokcom_distillation, "sample", walk)
    run.train()
    times = small_times(*run.times[1:])[:-1]
    behind = [(x_t, t, earlier) for x_t, t, earlier in trained if t > 0.5 + 1e-6]
    assert len({t for _, t, _ in behind}) >= 4
    for x_t, t, earlier in behind:
        assert min(abs(t - small) for small in times) < 1e-6
        assert isinstance(earlier, PathPoint) and torch.allclose(earlier.timesteps, torch.tensor(run.times[1]))
        assert any(way[0] == run.times[1] and torch.equal(end, x_t) for way, end in walked)


def test_sample_tables_show_the_student_at_its_own_steps(tmp_path, monkeypatch):
    run = distillation_trainer(tmp_path, max_steps=1, student_steps=2)
    seen, generate = [], TokComModel.generate
    monkeypatch.setattr(
        TokComModel, "generate", lambda self, **given: seen.append(given["num_steps"]) or generate(self, **given)
    )
    tables = run.sample_tables(lambda ids: ["text"] * len(ids))
    assert seen == [2] and {name: list(table) for name, table in tables.items()} == {
        "distillation/samples": ["generated"],
        "distillation/denoising": ["text", "denoised from t=0.5", "token accuracy"],
    }
    run.args.sample_steps = 3
    run.sample_tables(lambda ids: ["text"] * len(ids))
    assert seen == [2, 3]


def test_a_model_without_a_context_is_distilled_too(tmp_path):
    run = distillation_trainer(tmp_path, row_model(), max_steps=2)
    run.train()
    assert run.distilled().generate(num_chunks=4).shape == (1, 16)


def test_what_it_cannot_do_is_said(tmp_path):
    arguments = DistillationTrainingArguments(**settings(tmp_path))
    with pytest.raises(ValueError, match=r"needs the trained TokComModel"):
        DistillationTrainer(args=arguments, train_dataset=Rows())
    for steps in ({"student_steps": 0}, {"student_steps": 8}, {"teacher_steps": 1}):
        with pytest.raises(ValueError, match="student_steps must be at least 1 and fewer than teacher_steps"):
            DistillationTrainingArguments(**settings(tmp_path, **steps))
    with pytest.raises(ValueError, match=r"student_power must be above 0, got 0\.0"):
        DistillationTrainingArguments(**settings(tmp_path, student_power=0.0))
    with pytest.raises(ValueError, match="with student_steps=1 there are none, leave it out"):
        DistillationTrainingArguments(**settings(tmp_path, student_power=0.5, student_steps=1))
    run = distillation_trainer(tmp_path, max_steps=1)
    run.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="leave compute_metrics out"):
        run.evaluate()
