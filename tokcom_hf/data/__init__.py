"""Offline data generators, loaders of local files and Hub data sets, and collators."""
