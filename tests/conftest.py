"""Order of the suite: the longest tests start first, so that the other worker does the rest meanwhile."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("readme") is None)
