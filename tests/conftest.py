"""Order of the suite, and what its files share."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import forks


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests start first, so that the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("readme") is None)


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """In the place of `sys.executable`: starts at once. torchrun starts its workers with it too.

    `TEST_PYTHON=real` takes the real one, as systems without Linux's pidfd do.
    """
    if os.environ.get("TEST_PYTHON") == "real" or not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    with (
        tempfile.TemporaryDirectory(prefix="py") as folder,
        forks(Path(folder)) as found,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PYTHON_EXEC", found)
        yield found
