"""TensorRT measured: CLIP encoders, refit, precision, sparsity."""
