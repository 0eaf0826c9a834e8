"""The same as `test_shipping`, run where the GPU tests run: a ResNet-50, tuned by one user and replayed by another."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SOURCE = Path(__file__).parent.parent / "test_shipping.py"
_spec = importlib.util.spec_from_file_location("shipping_on_any_device", _SOURCE)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)

test_a_resnet50_is_replayed_by_another_user = (
    _module.test_another_user_replays_exported_plans_to_the_bit_without_tuning_or_compiling
)
