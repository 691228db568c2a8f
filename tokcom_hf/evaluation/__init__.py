"""Runs models to measure them: samplers, protocols, drawing, answering, denoising."""
