"""Embedded offline data sets, local-file and Hub loaders, collators."""
