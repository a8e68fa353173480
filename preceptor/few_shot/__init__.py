"""Few-shot tasks (ARC): grids, their text, training documents, views of a query, SEAL's directives and ARC's files.

Pure: no torch, no service. What a student makes of it is measured by the evaluator with the worker as it is.
"""
