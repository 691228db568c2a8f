"""Plain metric functions: tensors or arrays in, dictionaries of floats out."""
