"""What the tabs of recipes/demo.py compute: plain functions of a pipeline and of what a person typed."""
