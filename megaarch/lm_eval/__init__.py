"""lm-evaluation-harness over our models: what reaches a model (request_forms.py), its log-likelihoods (score.py),
the harness's model class (model.py) and its command (command.py). lm_eval is imported by the last two."""
