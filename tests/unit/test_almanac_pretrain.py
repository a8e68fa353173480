"""Promises of the script that makes the models: an interrupted training is the same training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from worlds.pretrain import IGNORED, Schedule, collate, loss_of, train  # noqa: E402

SCHEDULE = Schedule(steps=6, learning_rate=1e-2, warm_up=2, report_every=6, save_every=2)


class PowerCut(Exception):
    pass


def tiny() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return collate([([1, 2, step], [3, 4]), ([5], [6, 7, 8])], pad_id=0)


def weights(model: transformers.PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_training_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, halves = tiny(), tiny()
    train("whole", whole, batch_at, SCHEDULE, tmp_path)

    def until_the_power_fails(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 5:
            raise PowerCut
        return batch_at(step)

    with pytest.raises(PowerCut):
        train("halves", halves, until_the_power_fails, SCHEDULE, tmp_path)
    resumed = tiny()
    train("halves", resumed, batch_at, SCHEDULE, tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), weights(tiny()))


def test_only_completions_carry_loss() -> None:
    ids, labels = batch_at(9)
    assert ids.tolist() == [[1, 2, 9, 3, 4], [5, 6, 7, 8, 0]]
    assert labels.tolist() == [[IGNORED] * 3 + [3, 4], [IGNORED, 6, 7, 8, IGNORED]]
    model = tiny()
    before, _ = loss_of(model, ids, labels)
    labels[0, 3] = 5  # another gold token: the loss must notice
    after, _ = loss_of(model, ids, labels)
    assert before.item() != after.item()


def test_the_rate_rises_falls_and_restarts() -> None:
    schedule = Schedule(steps=300, learning_rate=1.0, warm_up=10, first_steps=200, restart=150, restart_rate=0.5)
    rates = [schedule.rate(step) for step in range(300)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[149] < 0.3
    assert rates[150] == pytest.approx(0.5)
    assert 0.05 <= rates[299] < 0.06
    assert all(a >= b for a, b in pairwise(rates[10:150]))
