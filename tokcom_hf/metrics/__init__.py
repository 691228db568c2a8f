"""Metrics as plain functions of tensors and arrays."""
