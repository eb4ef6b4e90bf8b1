"""Lets the tests of this folder import `rl_toys`, the policies and episodes that they share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
