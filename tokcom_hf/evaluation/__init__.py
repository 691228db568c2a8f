"""Runs models to evaluate them: text sampling, image generation, question answering, denoising."""
