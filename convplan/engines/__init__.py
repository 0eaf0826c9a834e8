"""The engines, one module or folder each, and the registry that holds them.

`base` has the protocol and the data; every other module implements one engine and imports no other engine. Built-in
engines are made here, when the registry is first asked, in the order that breaks ties.
"""

from __future__ import annotations

from collections.abc import Iterable

from convplan.engines.base import Engine, Registry


def _builtin() -> Iterable[Engine]:
    from convplan.engines.aten import AtenEngine
    from convplan.engines.composed import ComposedEngine
    from convplan.engines.cudnn.engine import CudnnEngine
    from convplan.engines.fake import FakeEngine
    from convplan.engines.fft import FftEngine
    from convplan.engines.matmul import MatmulEngine
    from convplan.engines.onednn import OnednnEngine

    fusing = (OnednnEngine(), ComposedEngine())
    return (CudnnEngine(), AtenEngine(), MatmulEngine(), FftEngine(), *fusing, FakeEngine())


registry = Registry(_builtin)


def register_engine(engine: Engine, *, replace: bool = False) -> None:
    """Make an engine known to every later planning in this process.

    Args:
        engine: an object with the members of the `Engine` protocol (`convplan.engines.base`).
        replace: exchange an engine of the same name.

    Raises:
        SpecError: the object lacks a member, or the name is taken and `replace` is False.
    """
    registry.register(engine, replace=replace)
