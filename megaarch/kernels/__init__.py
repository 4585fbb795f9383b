"""The project's own fused kernels (csrc/), an operation a file: those of `model.fused_kernels`, opt-in
torch operators that run on CUDA and, as their own test, on a CPU; and those that a CPU runs unasked
(qkv_rope.py, gated_activation.py, cross_entropy.py, rms_norm.py)."""
