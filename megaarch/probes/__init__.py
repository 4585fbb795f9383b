"""What is measured inside trained models, for the arguments about decoders: docs/why.md.

Probes train nothing in the model. Each reads runs in one process, whatever layout trained them.
"""
