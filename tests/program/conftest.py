"""Fixtures that several tests of the program share."""

import shutil

import pytest


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of what the module's own fixture `trained` has trained, for a test that changes it."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"
