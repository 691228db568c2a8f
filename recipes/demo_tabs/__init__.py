"""What the tabs of recipes/demo.py compute: plain functions of a pipeline and the visitor's input."""
