"""A process as it is right after import, and engines that are registered for one test only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import convplan
from convplan import _choices, _counts, _runtime
from convplan.engines import registry
from convplan.engines.base import Engine


@contextmanager
def fresh_process() -> Iterator[None]:
    """Off, with no policy, no choice, no ready plan, no open store and no counter; the registry as it was, afterwards.

    Ready plans of other threads go with their threads; the calling thread's are dropped by the changed token.
    """
    engines = registry._loaded()
    _reset()
    try:
        yield
    finally:
        for name in registry.names():
            registry.unregister(name)
        for engine in engines.values():
            registry.register(engine)
        _reset()


def _reset() -> None:
    convplan.disable()
    _choices.state.policy = convplan.Policy()
    _choices.state.captures = ()
    _runtime.forget()
    _runtime.local.callers.clear()
    _counts._warned.clear()
    convplan.stats(reset=True)
    _counts.counts.families_s = _counts.counts.tuning_s = 0.0


@contextmanager
def registered(*engines: Engine) -> Iterator[None]:
    """Engines that are known inside the block."""
    for engine in engines:
        convplan.register_engine(engine)
    try:
        yield
    finally:
        for engine in engines:
            if engine.name in registry.names():
                registry.unregister(engine.name)
