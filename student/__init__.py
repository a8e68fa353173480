"""The student: a registry of base models (gRPC StudentService) and the worker that fine-tunes them (Celery)."""
