"""How the tables of the evaluator came to be, step by step (``preceptor.migrations``)."""
