"""Plans that survive the process, as the runtime uses them: serialized when stored, restored when found again (C1).

cuDNN's own plans are restored in `tests/cudnn` and, running, in `tests/gpu`; here a scripted engine counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.fresh import fresh_process

import convplan
from convplan import Built, Candidate, EngineConfig, Notes, PlanRejected, Policy, Problem, Support, _runtime
from convplan.engines.fake import convolve_by_taps

SERIALIZED = b"how to run it"
POLICY = Policy(engines=("keeps",), tune_after=1, budget_s=0.01)


class Keeps:
    """An engine that says that building compiles, and counts what is built and what restored."""

    name = "keeps"
    by_default = False

    def __init__(self) -> None:
        self.built = self.restored = 0
        self.takes_back = True

    def supports(self, problem: Problem) -> Support:
        return Support(True)

    def configs(self, problem: Problem, effort: str) -> Sequence[Candidate]:
        notes = Notes(behavior=("RUNTIME_COMPILATION",))
        return [Candidate(EngineConfig.of(self.name), notes=notes, workspace_bytes=0)]

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        self.built += 1
        return self._made(problem)

    def restore(self, problem: Problem, config: EngineConfig, policy: Policy, serialized: bytes) -> Built:
        if serialized != SERIALIZED or not self.takes_back:
            raise PlanRejected(engine=self.name, config=str(config), reason="it is of another time")
        self.restored += 1
        return self._made(problem)

    def _made(self, problem: Problem) -> Built:
        def run(
            first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
        ) -> torch.Tensor:
            y = convolve_by_taps(problem, first, second, bias).to(first.dtype)
            return y if out is None else out.copy_(y)

        return Built(run, 0, serialize=lambda: SERIALIZED)


@pytest.fixture
def keeps() -> Iterator[Keeps]:
    with fresh_process():
        engine = Keeps()
        convplan.register_engine(engine)
        yield engine


def convolve() -> torch.Tensor:
    torch.manual_seed(0)
    return convplan.conv2d(torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 2), policy=POLICY)


def later() -> dict[str, int]:
    """As another process begins: what is stored is all that is left."""
    _runtime.forget()
    return convplan.stats(reset=True)


@pytest.mark.behaviour("C1")
def test_a_later_process_restores_and_builds_nothing(keeps: Keeps) -> None:
    y = convolve()
    assert (keeps.built, keeps.restored) == (1, 0), "what planning built is what runs"
    assert later()["tuned"] == 1
    assert torch.equal(convolve(), y)
    assert (keeps.built, keeps.restored) == (1, 1)
    stats = convplan.stats()
    assert {name: stats[name] for name in ("from_store", "restored", "compiled", "planned")} == {
        "from_store": 1,
        "restored": 1,
        "compiled": 0,
        "planned": 0,
    }


def test_what_its_engine_does_not_take_back_is_built_anew_and_counted(keeps: Keeps) -> None:
    y = convolve()
    later()
    keeps.takes_back = False
    assert torch.equal(convolve(), y)
    assert (keeps.built, keeps.restored) == (2, 0)
    stats = convplan.stats()
    assert (stats["from_store"], stats["restored"], stats["compiled"]) == (1, 0, 1)


def test_a_store_without_serialized_plans_is_built_from(keeps: Keeps, tmp_path: object) -> None:
    y = convolve()
    convplan.export_plans(f"{tmp_path}/plans.json", serialized=False)
    convplan.clear_plans()
    convplan.import_plans(f"{tmp_path}/plans.json")
    later()
    assert torch.equal(convolve(), y)
    assert (keeps.built, keeps.restored) == (2, 0)
    assert convplan.stats()["compiled"] == 1
