"""Reading the output of XLA's compiler for AMD GPUs, and loading that compiler without a GPU or ROCm."""
