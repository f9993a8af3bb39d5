"""Reading what XLA's compiler for AMD GPUs made, and loading it where there is neither a GPU nor ROCm."""
