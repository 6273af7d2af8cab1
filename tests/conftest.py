"""Fixtures that several folders share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What onward remembers about files goes into a directory of this session's."""
    os.environ["ONWARD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
