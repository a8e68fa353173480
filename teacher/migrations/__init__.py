"""How the tables of the teacher came to be, step by step (``preceptor.migrations``)."""
