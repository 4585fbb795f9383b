"""Generation: prompts, cached steps (decode.py), sampling, text, and answers (generate.py)."""
