"""A pytest plugin: of timm's own `tests/test_models.py`, what concerns a network, over chosen names.

::

    python -m pytest -p tests.backbones.timm_suite --over res2netplus50,scalenet50 -c TIMM/pyproject.toml \
        TIMM/tests/test_models.py

timm's file asks `timm.list_models` for the names that it runs over. Here it gets the chosen ones, also where it asks
for those of certain modules only: its tests of intermediates leave the Res2Nets, timm's own too, out by
`FEAT_INTER_FILTERS`. Its tests of named networks are left out. The file itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm

import r2kit.backbones  # noqa: F401  registers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--over", required=True, help="names of networks, separated by commas")


def _chosen(config: pytest.Config) -> set[str]:
    return set(config.getoption("--over").split(","))


def pytest_configure(config: pytest.Config) -> None:
    every: Callable[..., list[str]] = timm.list_models
    chosen = _chosen(config)

    def list_models(filter: Any = "", module: Any = "", **options: Any) -> list[str]:
        return [name for name in every(filter, **options) if name.partition(".")[0] in chosen]

    timm.list_models = list_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = _chosen(config)
    ours, others = [], []
    for item in items:
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        of_ours = isinstance(name, str) and name.partition(".")[0] in chosen  # not a string where a list was empty
        (ours if of_ours else others).append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=others)
