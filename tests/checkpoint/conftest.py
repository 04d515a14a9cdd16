"""A fixture that saves weight files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a state dict: `save(state, name="x.pth", **other_entries)`."""

    def save_state(state: dict[str, torch.Tensor], name: str = "x.pth", **entries: Any) -> Path:
        path = tmp_path / name
        torch.save({"state_dict": state, **entries} if entries else state, path)
        return path

    return save_state
