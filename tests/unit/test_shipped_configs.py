from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_the_shipped_world_measures_on_thirty_passages_or_more_with_candidates_for_the_fixed_strategy() -> None:
    config = load_config(CONFIGS / "almanac.toml")
    assert config.tasks.heldout >= 30
    assert config.heldout.fixed_strategies
