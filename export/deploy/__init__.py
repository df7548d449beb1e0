"""What runs a bundle elsewhere: TensorRT, Triton, C++."""
