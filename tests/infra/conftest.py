"""One stack of services for every test here that may share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.infra.stacks import PASSED, Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Services without authentication on SQLite, started on what was made without them.

    Version 1 serves, 2 passed, 3 was refused.
    """
    made = Stack(tmp_path_factory.mktemp("stack") / "home")
    made.optimize("promoted", "registered", "refused")
    assert made.serves() == PASSED
    made.up()
    try:
        yield made
    finally:
        made.down()
