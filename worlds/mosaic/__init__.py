"""The mosaic: small grids and the rules that change them, with a tiny student that knows rules by their names, and a
tiny teacher that chooses how the student is trained on a few demonstrations of one.

Read in this order: ``rules`` (what can be done to a grid), ``tasks`` (what a run learns from), ``directives`` (what a
teacher may choose), then ``lessons`` and ``build`` (how the models were made). Only the last two import torch.
"""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""Where the shipped models lie: ``teacher`` and ``student``, both Llama-shaped."""
