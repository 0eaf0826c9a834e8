"""The public functions that plan: from tensors to a `Problem`, from problems to `PlanRecord`s, one or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, overload

import msgspec

from convplan import _ranges
from convplan._agreement import start_of
from convplan._choices import known, state
from convplan._counts import counts
from convplan._deciding import adopt, make_ready
from convplan._errors import SpecError
from convplan._plan import PlanRecord
from convplan._policy import Policy
from convplan._problem import (
    FLOAT_DTYPES,
    INPUT_DTYPES,
    OPS,
    READS,
    WRITES,
    Op,
    Problem,
    TensorSpec,
    padding_pairs,
    per_dim,
)
from convplan._runtime import check_policy

if TYPE_CHECKING:
    import torch

    from convplan.torch_ops.adapter import ConvArgs

Progress = Callable[[int, int, "PlanRecord | None"], object]


def problem(
    op: Op,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int | Sequence[int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    output_dtype: torch.dtype | None = None,
) -> Problem:
    """Describe a convolution of these tensors, or one of its gradients.

    Tensors may also be int8 or fp8, which torch's own convolutions do not take.

    Args:
        op: what to compute: `fprop` the convolution itself, `dgrad` the gradient of `x`, `wgrad` the gradient of `w`.
        x: input (N, C, spatial…) of the convolution.
        w: weight (K, C/groups, filter…); of a transposed one (C, K/groups, filter…).
        bias: (K,), of the output's dtype, or None; makes a difference to `fprop` only.
        stride, padding, dilation, groups: as in `convplan.conv2d`, padding entries may be (before, after) pairs.
        transposed, output_padding: describe a transposed convolution, which is planned as a dgrad with roles exchanged.
        output_dtype: of the tensor that is written: y, or the gradient. int8 tensors give int8, int32 or float32, fp8
            ones fp8, bfloat16, float16 or float32, all others their own. None: the inputs' (where two fp8 types mix,
            that of `x`).

    Returns:
        The problem. A gradient's incoming tensor is taken to lie in memory as the convolution's output does, and to
        have the dtype of `x`.

    Raises:
        SpecError: arguments that do not fit together.
    """
    from convplan.torch_ops.adapter import ConvArgs, forward_problem, output_layout

    if op not in OPS:
        raise SpecError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    spatial = x.dim() - 2
    if not 1 <= spatial <= 3:
        raise SpecError(f"input has {x.dim()} dimensions, expected 3, 4 or 5 (N, C, spatial): {tuple(x.shape)}")
    args = ConvArgs(
        per_dim("stride", stride, spatial),
        padding_pairs(padding, spatial),
        per_dim("dilation", dilation, spatial),
        transposed,
        per_dim("output_padding", output_padding, spatial),
        groups,
    )
    output = None if output_dtype is None else _dtype_name(output_dtype)
    if {_dtype_name(x.dtype), _dtype_name(w.dtype)} <= set(FLOAT_DTYPES):
        forward, layout = forward_problem(x, w, bias, args), output_layout(x, w, args)
    else:
        forward, layout = _narrow_forward(x, w, bias, args, output if op == "fprop" else None)
    found = forward if op == "fprop" else forward.gradients(layout)[0 if op == "dgrad" else 1]
    return found if output is None else found.with_output_dtype(output)


def _narrow_forward(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, args: ConvArgs, output: str | None
) -> tuple[Problem, str]:
    """The problem of a forward call with int8 or fp8 tensors, and the layout of the tensor that it writes.

    The adapter speaks of calls that torch can run, so it is asked about float32 tensors of the same sizes and strides,
    without memory; what their problem lacks (dtypes, alignments, the device) comes from the given ones.
    """
    import torch

    from convplan.torch_ops.adapter import alignment_bytes, check_same_place, forward_problem, output_layout

    check_same_place(x, w, bias)
    for name, tensor in (("input", x), ("weight", w)):
        if _dtype_name(tensor.dtype) not in INPUT_DTYPES:
            raise SpecError(f"{name} is {tensor.dtype}, expected one of {', '.join(INPUT_DTYPES)}")
    written = output or _dtype_name(x.dtype)
    if bias is not None and _dtype_name(bias.dtype) != written:
        raise SpecError(f"bias is {bias.dtype}, expected torch.{written}, the output's dtype")
    x_form, w_form, bias_form = (
        None if one is None else torch.empty_strided(one.shape, one.stride(), dtype=torch.float32, device="meta")
        for one in (x, w, bias)
    )
    assert x_form is not None
    assert w_form is not None
    form = forward_problem(x_form, w_form, bias_form, args)
    specs: dict[str, TensorSpec] = {
        letter: TensorSpec(spec.dims, spec.strides, _dtype_name(tensor.dtype), alignment_bytes(tensor))
        for letter, spec, tensor in zip(READS[form.op], form.inputs, (x, w), strict=True)
    }
    specs[WRITES[form.op]] = msgspec.structs.replace(form.output, dtype=written)
    problem = msgspec.structs.replace(form, **specs, device=x.device.type)
    return problem, output_layout(x_form, w_form, args)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan(problem: Problem, policy: Policy | None = None) -> PlanRecord:
    """The plan for a problem: the remembered one, the stored one, or a new one, which is then stored.

    Args:
        problem: what to compute.
        policy: the rules; None: those of `enable()`, else the defaults. Its effort is used at once, whatever
            `tune_after` says.

    Returns:
        The record with the chosen configuration, all evidence, `explain()` and `build()`.

    Raises:
        NoPlan: nothing survived; lists every candidate with its reason.
        ReplayMiss: replay mode, and the store has no such plan.
        PolicyError: the policy names an unknown engine. SpecError: the problem is empty.
    """
    record, _ = adopt(_checked(problem), _policy(policy))
    return record


def _policy(policy: Policy | None) -> Policy:
    return check_policy(state.policy if policy is None else policy)


def _checked(problem: Problem) -> Problem:
    if not isinstance(problem, Problem):
        raise SpecError(f"problem is {problem!r}, expected a convplan.Problem; convplan.problem(...) makes one")
    if problem.is_empty:
        raise SpecError(f"the problem has no elements, expected something to compute: {problem}")
    return problem


class Capture(Sequence[Problem]):
    """The problems that a block of code ran, each once, in the order in which they were first met."""

    def __init__(self) -> None:
        self._ran: dict[Problem, int] = {}
        self._gradients: dict[Problem, None] = {}

    def _observe(self, problem: Problem, gradients: tuple[bool, bool]) -> None:
        self._ran[problem] = self._ran.get(problem, 0) + 1
        if any(gradients):
            for wanted, gradient in zip(gradients, problem.gradients(), strict=True):
                if wanted:
                    self._gradients.setdefault(gradient)

    @property
    def calls(self) -> dict[Problem, int]:
        """How often each problem ran."""
        return dict(self._ran)

    @property
    def gradients(self) -> list[Problem]:
        """Gradients that autograd would ask for if the captured forwards were differentiated; not those that ran."""
        return [problem for problem in self._gradients if problem not in self._ran]

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        return list(self._ran)[index]

    def __len__(self) -> int:
        return len(self._ran)

    def __repr__(self) -> str:
        return f"<Capture of {len(self)} problems>"


@contextmanager
def capture() -> Iterator[Capture]:
    """Record the problems of all convolutions in a block, whether or not convplan is enabled there.

    Covers the functions of `torch.nn.functional`, modules, gradients that run in the block, and convplan's own
    functions, in all threads. The convolutions run as they would without it.
    """
    from convplan.torch_ops import override

    seen = Capture()
    with override.capturing(seen._observe):
        yield seen


def tune(
    problems: Iterable[Problem] | Problem | Callable[..., object],
    *args: object,
    policy: Policy | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[PlanRecord]:
    """Plan many problems now and store the plans, whatever `tune_after` says: measured at least, or searched where the
    policy's effort is `exhaustive`.

    Every plan is ready afterwards: the next call, under a policy that allows the same, runs it, and may be one that is
    captured into a CUDA graph. So a problem that is stored already costs restoring or building its plan, and on a GPU
    one run on tensors of its own. A plan that cannot be made ready is left to the problem's next call.

    Args:
        problems: problems, or a callable, which is called once under `capture()`. Its gradients count too:
            those that it computes itself, else those that its result could be differentiated by.
        args: passed to the callable.
        policy: the rules; None: those of `enable()`, else the defaults.
        force: measure again what is stored already.
        progress: called as `progress(done, total, record)` before the first and after each; record is None at first.

    Returns:
        One record for each different problem, in order. Those that are stored already are not measured again.

    Raises:
        NoPlan: nothing runs one of them; those planned before it stay stored.
        SpecError: an entry is no problem, or the callable ran no convolution.
    """
    found = _collect(problems, args)
    given = _policy(policy)
    wanted = given if given.effort == "exhaustive" else given.replace(effort="measure")
    records: list[PlanRecord | None] = [None] * len(found)
    first = start_of(len(found), wanted)  # ranks of a job begin at different places, and so share the work
    if progress is not None:
        progress(0, len(found), None)
    for done, place in enumerate((*range(first, len(found)), *range(first)), start=1):
        record, _ = adopt(_checked(found[place]), wanted, force=force)
        make_ready(found[place], wanted)
        records[place] = record
        if progress is not None:
            progress(done, len(found), record)
    return [record for record in records if record is not None]


def _collect(problems: Iterable[Problem] | Problem | Callable[..., object], args: tuple[object, ...]) -> list[Problem]:
    if isinstance(problems, Problem):
        return [problems]
    if not callable(problems) and not isinstance(problems, Iterable):
        raise SpecError(f"problems is {problems!r}, expected problems or a callable that runs convolutions")
    if not callable(problems):
        return list(dict.fromkeys(_checked(one) for one in problems))
    with capture() as seen:
        problems(*args)
    if not len(seen):
        raise SpecError(f"{problems!r} ran no convolution that convplan plans, expected at least one")
    # A weight's gradient among the problems can only come from a backward that the callable ran itself.
    differentiated = any(one.op == "wgrad" for one in seen)
    return list(seen) if differentiated else [*seen, *seen.gradients]


class Stats(dict[str, int]):
    """What happened in this process so far: counters by their names, and beside them what is no counter.

    Attributes:
        planning_s: seconds that planning took, tuning included, in all threads together.
        tuning_s: of these, seconds for problems that were measured.
        engines: for each engine, how many of the problems that this process remembers now run by it. This is no
            counter, and a reset leaves it.
    """

    def __init__(
        self, counters: dict[str, int], *, planning_s: float, tuning_s: float, engines: dict[str, int]
    ) -> None:
        super().__init__(counters)
        self.planning_s, self.tuning_s, self.engines = planning_s, tuning_s, engines


def stats(reset: bool = False) -> Stats:
    """What happened in this process so far.

    Args:
        reset: set every counter, and the seconds, to zero after reading.

    Returns:
        A dictionary, with times and engines as attributes (see `Stats`). hits: calls that found their plan ready;
        misses: calls that did not. planned: problems planned anew, of which tuned: by measuring. from_store:
        problems whose plan the store held. from_relative: problems that run by the choice of a tuned relative.
        from_rank: plans taken over from another rank of the job. replay_misses: times that replay mode did not find
        a problem in the store, whether it raised or ran an untuned plan. restored: plans made ready from their
        serialized form. compiled: plans that had to be compiled at run time to be made ready, beside what planning
        tries. fell_back: times that a next-ranked plan or stock torch stepped in. failed: plannings that found
        nothing, and plans that failed while running. left_to_torch: misses for which convplan does not plan, such
        as those of integers. capture_misses: problems met in a CUDA graph's capture without a plan.
    """
    counters, spent_s = counts.read(reset)
    return Stats(counters, **spent_s, engines=known.choices.engines())


class _Profiling:
    """What `profiling` returns: gives back, at the end of a `with` block, what held before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        _switch_ranges(self._before)


def profiling(on: bool = True) -> AbstractContextManager[None]:
    """Give every run of a plan a range of its own in profilers, named after engine, knobs and problem.

    Holds at once and for all threads, also for plans that are in use already; as a `with` statement, until its block
    ends. At first the environment variable `CONVPLAN_RANGES` decides (1: on; default off). Off, ranges cost nothing;
    on, a few microseconds a call.

    Args:
        on: True: `torch.profiler` shows the ranges, and on a GPU so do tools that read NVTX. False: no ranges.
    """
    if not isinstance(on, bool):
        raise TypeError(f"found {on!r}, expected True or False")
    before = _ranges.switch.on
    _switch_ranges(on)
    return _Profiling(before)


def _switch_ranges(on: bool) -> None:
    if _ranges.switch.on != on:
        _ranges.switch.on = on
        state.touch()  # every caller binds its plan anew
