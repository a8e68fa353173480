"""Published ways to fine-tune a student, by name: what ``training.recipe`` of a run's config stands for.

A recipe gives a value to every training setting that changes what is computed, so that it stays what it is when a
default changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# The inner loop of SEAL (arXiv 2506.10943, knowledge-incorporation/src/inner/TTT_server.py) as it was published:
# transformers' Trainer with its defaults (AdamW, linear fall from the first step on, clipping at 1) and PEFT's default
# modules. The pad token is the end-of-sequence token, labels are a copy of the ids, so the pads are learnt; the
# attention mask hides them. The tokenizer cuts at 2,048 and adds no end-of-sequence token of its own: the first pad is
# what ends a document.
SEAL_COMPAT: Mapping[str, Any] = MappingProxyType(
    {
        "rank": 32,
        "alpha": 64.0,
        "target_modules": ("q_proj", "v_proj"),
        "learning_rate": 1e-3,
        "epochs": 10,
        "batch_size": 1,
        "gradient_accumulation": 1,
        "max_steps": 0,
        "warmup_share": 0.0,
        "schedule": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "replay_share": 0.0,
        "loss_mask": "all",
        "max_train_tokens": 0,
        "max_document_tokens": 0,
        "pad_to": 2048,
        "full": False,
    }
)

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType({"seal-compat": SEAL_COMPAT})
