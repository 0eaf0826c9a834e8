"""Architectures of `transformers` with a convolution, forward and backward, in stock torch and under `enable()`.

`transformers.json` says of every architecture which class is run and how it is made small, or why it is not run.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.compat import CPU_POLICIES
from helpers.compat_models import compare
from helpers.fresh import fresh_process

transformers = pytest.importorskip("transformers")
TABLE = json.loads(Path(__file__).with_name("transformers.json").read_text(encoding="utf-8"))

pytestmark = [
    pytest.mark.skipif(
        transformers.__version__ != TABLE["transformers"],
        reason=f"the table of architectures is that of transformers {TABLE['transformers']}",
    ),
    # The models' own.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with fresh_process():
        yield
    logging.getLogger("transformers").setLevel(before)


def test_the_table_names_every_architecture_with_a_convolution() -> None:
    named = [*TABLE["run"], *TABLE["skipped"]]
    assert sorted(named) == tiny_models.families()
    assert all(TABLE["skipped"].values())


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("family", TABLE["run"])
def test_an_architecture_computes_what_it_does_in_stock_torch(family: str) -> None:
    name, level, shape = TABLE["run"][family]
    kind = next(kind for kind in tiny_models.model_classes(family) if kind.__name__ == name)
    model = tiny_models.build(kind, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = compare(model, tiny_models.inputs(model, shape), tiny_models.run, CPU_POLICIES["matmul"])
    assert wrong == [], "\n".join(wrong[:20])
    assert not torch.is_autocast_enabled("cpu")
