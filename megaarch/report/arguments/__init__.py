"""The seven arguments for decoders: which cells they are judged on, by which rules, and how they are drawn."""
