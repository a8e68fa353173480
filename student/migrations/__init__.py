"""How the tables of the student came to be, step by step (``preceptor.migrations``)."""
