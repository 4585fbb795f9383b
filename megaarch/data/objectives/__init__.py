"""Objectives: pure functions that turn a row of tokens into an Example. One file a family: the rule,
the bound on its lengths, and the conditional forms in which held-out text is scored.

An objective may be a mixture. Its components have raw lengths of their own, so the loader draws
the component of a sample, by weight, and then calls it. `config/catalogue.py` lists them.
"""
