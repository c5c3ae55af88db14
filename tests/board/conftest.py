"""Runs and sweeps written by hand, with outcomes that a test knows."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # board_world.py beside this file
