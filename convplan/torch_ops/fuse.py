"""`fuse`: a new model for inference whose convolutions take in what follows them.

What is here walks the modules of a copy of the model, from the whole to its parts: what can be traced becomes a graph
and is rewritten (`fuse_graphs`), what cannot is kept as it is and looked into. The modules that stand in the new model
are in `fused_modules`. A pass for `torch.compile`, which needs no tracing here, is in `kept`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from convplan import _runtime
from convplan._errors import FuseError, SpecError
from convplan._policy import Policy
from convplan.report._table import table
from convplan.torch_ops.fuse_graphs import Fused, Reader, Rewriting, Traced, traced
from convplan.torch_ops.fuse_patterns import CONVOLUTIONS, is_touched, why_not
from convplan.torch_ops.fused_modules import FusedCall, FusedConv

log = logging.getLogger("convplan.fuse")

Tensor = torch.Tensor
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

# How far a fused model's output may be from the model's, as a share of the largest number in it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class FusionReport(NamedTuple):
    """What `fuse` or `fuse_training` did: printed, a table.

    Args:
        rows: for each convolution, or batch norm, its name, what it took in, and what ended that.
        untraced: modules that could not be traced, with the reasons; what is in them was looked at part by part.
        kind: what the rows are about.
        passes: concatenations and max pools that take one pass over memory on a GPU: modules by their paths, calls of
            functions by their names in the graph.
    """

    rows: tuple[Fused, ...]
    untraced: Mapping[str, str]
    kind: str = "convolution"
    passes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many of them took in each kind of thing."""
        parts = [part for row in self.rows for part in row.parts]
        return {part: parts.count(part) for part in dict.fromkeys(parts)}

    def __str__(self) -> str:
        lines = [table({self.kind: "left", "fused": "left", "and then": "left"}, [
            (row.name, " + ".join(row.parts) or "-", row.ended or "-") for row in self.rows
        ])]  # fmt: skip
        lines += [f"by one pass on a GPU: {', '.join(self.passes)}"] if self.passes else []
        lines += [f"not traced: {name or 'the model'}: {reason}" for name, reason in self.untraced.items()]
        return "\n".join(lines)


def fuse(
    model: nn.Module, example_inputs: Inputs | None = None, *, strict: bool = False, policy: Policy | None = None
) -> nn.Module:
    """A new model for inference: batch norms folded, and bias, sums and activations computed with the convolutions.

        fast = convplan.fuse(model.eval())
        print(fast.fusion_report)

    The caller's model stays as it was. Parameters that nothing is folded into share memory with it.

    Args:
        model: in eval mode. What of it can be traced is rewritten; the rest is kept as it is.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dictionary of named ones.
            The new model is run with them once, and its report then says which sums had to be computed apart.
        strict: run both models on example_inputs, and compare all that they return.
        policy: the rules for the convolutions; None: those of `enable()` at the time of each call, else the defaults.

    Returns:
        The new model, with a `fusion_report`. A `torch.fx.GraphModule` where the whole model could be traced, else of
        the model's own class.

    Raises:
        FuseError: the model cannot be fused, or `strict` found a difference.
        SpecError: arguments of the wrong kind.
        PolicyError: the policy names an engine that is not registered.

    Concurrency: tracing changes torch's modules for the time it takes, so nothing else may run meanwhile.
    """
    _check(model, example_inputs, strict)
    if policy is not None:
        _runtime.check_policy(policy)
    name = type(model).__name__
    walk = _Walk(_copied(model), policy)
    fused = walk.run()
    if not walk.found_any and walk.rows:
        raise FuseError(model=name, reason=walk.untraced.get("", "none of its convolutions can be replaced"))
    report = FusionReport(tuple(walk.rows), dict(walk.untraced), passes=tuple(walk.passes))
    if example_inputs is not None:
        report = _tried(model, fused, example_inputs, report, strict)
    fused.fusion_report = report  # type: ignore[assignment]
    log.info("fused %s: %s", name, ", ".join(f"{count} x {part}" for part, count in report.counts.items()) or "nothing")
    return fused


def _check(model: object, example_inputs: object, strict: bool) -> None:
    if not isinstance(model, nn.Module):
        raise SpecError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    if strict and example_inputs is None:
        raise SpecError("strict is True and example_inputs is None, expected inputs to compare both models on")
    if example_inputs is not None and not isinstance(example_inputs, (Tensor, tuple, list, Mapping)):
        found = type(example_inputs).__name__
        raise SpecError(f"example_inputs is {found}, expected a tensor, a tuple of arguments or a dictionary of them")
    name = type(model).__name__
    if model.training:
        raise FuseError(model=name, reason="it is in training mode, expected eval mode: call model.eval() first")
    if isinstance(model, torch.jit.ScriptModule):
        raise FuseError(model=name, reason="it is a ScriptModule, expected the module that it was made from")
    if hasattr(model, "_orig_mod"):
        raise FuseError(model=name, reason="it is compiled: fuse the model, then compile what comes out")


def _copied(model: nn.Module) -> nn.Module:
    """The model's modules and buffers anew; parameters anew too, but on the memory of the model's."""
    memo: dict[int, Any] = {}
    for one in model.parameters():
        if type(one) is nn.Parameter and type(one.data) is Tensor:
            memo[id(one)] = nn.Parameter(one.detach(), requires_grad=one.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except Exception as exc:  # whatever a module of the user's raises
        raise FuseError(model=type(model).__name__, reason=f"it cannot be copied: {exc}") from exc


class FusedGraph(fx.GraphModule):
    """A graph module in eval mode that keeps its report when it is copied or pickled."""

    def _settle(self) -> None:
        for one in self.modules():
            if one is self or type(one) is nn.Module:  # which graph modules make anew, to hold others
                one.training = False

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        new: FusedGraph = super().__deepcopy__(memo)  # type: ignore[assignment]
        new._settle()
        if "fusion_report" in self.__dict__:
            new.fusion_report = self.fusion_report
        return new

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        rebuild, parts = super().__reduce__()
        return _rebuilt, (rebuild, *parts)


def _rebuilt(rebuild: Callable[..., fx.GraphModule], held: dict[str, Any], imports: str) -> FusedGraph:
    plain = rebuild(held, imports)
    new = FusedGraph(plain, plain.graph, plain.__class__.__name__)
    new._settle()
    if "fusion_report" in held:
        new.fusion_report = held["fusion_report"]
    return new


class _Walk:
    """From a model to its parts.

    Args:
        model: a copy, which is changed.
        policy: as of `fuse`.
    """

    def __init__(self, model: nn.Module, policy: Policy | None) -> None:
        self.rows: list[Fused] = []
        self.passes: list[str] = []
        self.untraced: dict[str, str] = {}
        self.found_any = False
        self._model, self._policy = model, policy
        self._recorded = tuple(recorded(model))
        self._done: dict[int, nn.Module] = {}
        uses: dict[int, int] = {}
        for _, one in model.named_parameters(remove_duplicate=False):
            uses[id(one)] = uses.get(id(one), 0) + 1
        self._shared = {one for one, count in uses.items() if count > 1}

    def run(self) -> nn.Module:
        """The whole model."""
        return self._replacement(self._model, "")

    def _replacement(self, module: nn.Module, path: str) -> nn.Module:
        """What stands for a module in the new model; the module itself, changed inside, where it cannot be traced."""
        if id(module) in self._done:
            return self._done[id(module)]
        new = self._looked_at(module, path)
        self._done[id(module)] = new
        return new

    def _looked_at(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, CONVOLUTIONS):
            return self._alone(module, path)
        if not any(isinstance(one, CONVOLUTIONS) for one in module.modules()) and path:
            return module
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            self._parts(module, path)
            return module
        found = traced(module, self._keep, is_model=not path)
        if isinstance(found, str):
            self.untraced[path] = found
            self._parts(module, path)
            return module
        return self._rewritten(module, path, found)

    def _keep(self, module: nn.Module) -> str:
        if isinstance(module, self._recorded):
            return f"the model records what {type(module).__name__} returns"
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
            return f"is a {type(module).__name__}"
        return is_touched(module)

    def _parts(self, module: nn.Module, path: str) -> None:
        for name, part in list(module.named_children()):
            new = self._replacement(part, f"{path}.{name}" if path else name)
            if new is not part:
                module._modules[name] = new

    def _alone(self, module: nn.Module, path: str) -> nn.Module:
        """A convolution of which nobody knows what follows it."""
        reason = why_not(module) or self._barred(module)
        own: Any = module
        parts = ("bias",) if not reason and own.bias is not None else ()
        self.rows.append(Fused(path, parts, reason or ("" if not path else "what follows it is not known")))
        if reason:
            return module
        self.found_any = self.found_any or not path
        return FusedConv(own, own.weight, own.bias, policy=self._policy)

    def _rewritten(self, module: nn.Module, path: str, found: Traced) -> nn.Module:
        before = f"{path}." if path else ""
        for target, reason in found.kept.items():
            one = module.get_submodule(target)
            if not isinstance(one, CONVOLUTIONS) and any(isinstance(m, CONVOLUTIONS) for m in one.modules()):
                self.untraced[before + target] = reason
                self._parts(one, before + target)
                self._done[id(one)] = one
        rewriting = Rewriting(module, found.graph, self._barred, self._policy)
        rows = rewriting.run()
        self.rows += [row._replace(name=before + row.name) for row in rows]
        self.passes += [before + name for name in rewriting.passes]
        self.found_any = self.found_any or bool(rows)
        found.graph._tracer_cls = Reader
        new = FusedGraph(module, found.graph, type(module).__name__)
        new._settle()
        return new

    def _barred(self, module: nn.Module) -> str:
        shared = any(id(one) in self._shared for one in module.parameters())
        return "its weight or bias is shared with another module" if shared else ""


def recorded(model: nn.Module) -> Iterator[type]:
    """Classes whose results a model of transformers collects by themselves, if asked for."""
    for one in model.modules():
        wanted = getattr(type(one), "_can_record_outputs", None)
        if not isinstance(wanted, Mapping):
            continue
        for value in wanted.values():
            for spec in value if isinstance(value, (list, tuple)) else (value,):
                kind = getattr(spec, "target_class", spec)
                if isinstance(kind, type) and issubclass(kind, nn.Module):
                    yield kind


# --- looking at what came out


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _tried(model: nn.Module, fused: nn.Module, inputs: Inputs, report: FusionReport, strict: bool) -> FusionReport:
    """Run the new model once; the report with what only then is known.

    Raises:
        FuseError: it fails where the model does not, or `strict` and they differ.
    """
    name = type(model).__name__
    with torch.no_grad():
        expected = _call(model, copy.deepcopy(inputs)) if strict else None
        try:
            found = _call(fused, copy.deepcopy(inputs))
        except Exception as exc:
            raise FuseError(model=name, reason=f"the fused model fails on example_inputs: {exc}") from exc
    if strict:
        _compare(name, expected, found)
    apart = {path for path, one in fused.named_modules() if isinstance(one, FusedCall) and one.sums_apart}
    note = "its sum is computed apart: another shape, dtype or layout is added"
    return report._replace(rows=tuple(row._replace(ended=note) if row.name in apart else row for row in report.rows))


def _compare(name: str, expected: Any, found: Any) -> None:
    from torch.utils import _pytree

    (right, shape), (mine, own) = (_pytree.tree_flatten_with_path(one) for one in (expected, found))
    if shape != own or len(right) != len(mine):
        raise FuseError(model=name, reason=f"the fused model returns {own}, the model {shape}")
    for (path, one), (_, other) in zip(right, mine, strict=True):
        where = f"output{_pytree.keystr(path)}"
        if not isinstance(one, Tensor):
            continue
        if not isinstance(other, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
            looks = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in (other, one) if isinstance(t, Tensor))
            raise FuseError(model=name, reason=f"{where} of the fused model and the model are {looks}")
        _compare_tensor(name, where, one, other)


def _compare_tensor(name: str, where: str, one: Tensor, other: Tensor) -> None:
    if not one.is_floating_point():
        if not torch.equal(one, other):
            raise FuseError(model=name, reason=f"{where} differs in {int((one != other).sum())} of {one.numel()}")
        return
    allowed = TOLERANCES.get(one.dtype, TOLERANCES[torch.bfloat16])
    if not one.numel():
        return
    right, mine = one.double(), other.double()
    alike = (right == mine) | (right.isnan() & mine.isnan())
    off = (right - mine).abs().masked_fill(alike, 0.0).nan_to_num(float("inf"), float("inf"))
    finite = right[right.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    largest = float(off.max())
    if largest > allowed * size:
        place = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        raise FuseError(
            model=name,
            reason=f"{where} differs by {largest:.3g} at {place}: {float(mine[place]):.6g} fused, "
            f"{float(right[place]):.6g} in the model, expected at most {allowed:g} of the largest number, {size:.3g}",
        )
