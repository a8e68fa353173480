"""How the tables of the orchestrator came to be, step by step (``preceptor.migrations``)."""
