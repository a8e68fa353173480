"""The almanac: a generated valley of fictional people, with a tiny teacher and two tiny students that know part of it.

Read in this order: ``facts`` (people, attributes, phrasings), ``passages`` (what a run learns from), ``edits`` (what a
teacher may write), ``memory`` (what the student must not forget), then ``pretrain`` and ``build`` (how the models were
made). Only the last two import torch.
"""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""Where the shipped models lie: ``teacher``, ``student`` (Llama-shaped), ``student_qwen2`` (Qwen2-shaped)."""
