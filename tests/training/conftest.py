"""Lets the tests of this folder import `rl_toys`, and keeps accelerate's global state from leaking between them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Every test may make an `Accelerator` with settings of its own."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
