"""`fuse_training`: a model for training whose batch norms are computed with what is before them and what follows.

Where there is no batch norm, but a convolution, a ReLU and a convolution, the ReLU's backward pass becomes part of the
gradient that the later one computes (`gated_call`).

What is here walks the modules of a copy of the model, as `fuse` does: what can be traced gets a forward of generated
code, in which one call (`normalized_call`) takes the place of a convolution, a batch norm, a sum and an activation. All
modules stay where they are, so that the model's class, its attributes and its `state_dict` are as before.

Whether a module is in training mode is read while the model runs: a trace sees it as something computed.
"""

from __future__ import annotations

import builtins
import copy
import linecache
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Graph, Node

from convplan import _runtime
from convplan._errors import FuseError, SpecError
from convplan._policy import Policy
from convplan.torch_ops import fuse_patterns as patterns
from convplan.torch_ops.fuse import FusionReport, recorded
from convplan.torch_ops.fuse_graphs import Chain, Fused, Rewriting, Traced, Tracer, Untraceable, traced
from convplan.torch_ops.gated import RELU
from convplan.torch_ops.gated_call import GatedCall
from convplan.torch_ops.normalized_call import NormalizedCall, Place

log = logging.getLogger("convplan.fuse")

GATE = "relu backward"  # what a report calls it

Tensor = torch.Tensor
_Norm = nn.modules.batchnorm._BatchNorm
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GATED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fuse_training(model: nn.Module, *, policy: Policy | None = None) -> nn.Module:
    """A model for training: batch norms computed with the convolution before them, and the sum and activation behind.

    A ReLU that stands between two convolutions is differentiated with the input's gradient of the later one.

        fast = convplan.fuse_training(model)
        print(fast.fusion_report)

    The new model has the model's own parameters and buffers, so that an optimizer of either trains both, and its class,
    attributes and `state_dict` keys. It follows `train()` and `eval()`. The caller's model stays as it was.

    Args:
        model: in whatever mode, on its device. What of it can be traced is rewritten; the rest is kept as it is.
        policy: the rules for the convolutions; None: those of `enable()` at the time of each call, else the defaults.

    Returns:
        The new model, with a `fusion_report`: for each batch norm what is computed with it, and what ended that; and
        each convolution whose ReLU's backward pass is computed with the gradient of the next one.

    Raises:
        FuseError: the model cannot be copied or is compiled, scripted or fused already.
        SpecError: the model is no module.
        PolicyError: the policy names an engine that is not registered.

    Concurrency: tracing changes torch's modules for the time it takes, so nothing else may run meanwhile.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise FuseError(model=name, reason="it is a ScriptModule, expected the module that it was made from")
    if hasattr(model, "_orig_mod"):
        raise FuseError(model=name, reason="it is compiled: fuse the model, then compile what comes out")
    if any(isinstance(vars(one).get("forward"), Forward) for one in model.modules()):
        raise FuseError(model=name, reason="it is fused for training already, expected the model as it was before")
    if policy is not None:
        _runtime.check_policy(policy)
    walk = _Walk(_sharing_copy(model), policy)
    new = walk.run()
    kind = "module" if any(GATE in row.parts for row in walk.rows) else "batch norm"
    report = FusionReport(tuple(walk.rows), dict(walk.untraced), kind)
    new.fusion_report = report  # type: ignore[assignment]
    log.info("fused %s: %s", name, ", ".join(f"{count} x {part}" for part, count in report.counts.items()) or "nothing")
    return new


def _sharing_copy(model: nn.Module) -> nn.Module:
    """The model's modules anew, with its own parameters and buffers."""
    memo: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except Exception as exc:  # whatever a module of the user's raises
        raise FuseError(model=type(model).__name__, reason=f"it cannot be copied: {exc}") from exc


def _modes() -> tuple[Any, ...]:
    """Switches that a graph has no room for: gradients and autocast."""
    kinds = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _TrainingTracer(Tracer):
    """Traces what a module asks of its own mode as something that is looked up when the code runs."""

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """A node of the graph."""
        if _modes() != self._modes:
            raise Untraceable("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Its arguments; from here on its modules are being traced."""
        given = super().create_args_for_root(root_fn, is_module, concrete_args)
        for path, one in self.root.named_modules():
            if not path or not self.is_leaf_module(one, path):
                target = f"{path}.training" if path else "training"
                one.__dict__["training"] = self.create_proxy("get_attr", target, (), {})
        return given

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """A graph, in which modes that nobody asked for are not looked up."""
        self._modes = _modes()
        modes = [(one, one.training) for one in root.modules()]
        try:
            graph = super().trace(root, concrete_args)
        finally:
            for one, mode in modes:
                one.__dict__["training"] = mode
        for node in list(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        return graph


class Forward:
    """A module's forward, from the code of a graph.

    Args:
        module: whose forward it is.
        source: of a function `forward`, whose first argument is the module.
        names: what the source calls by names of its own.
    """

    def __init__(self, module: nn.Module, source: str, names: dict[str, Any]) -> None:
        self._module, self._source, self._names = module, source, names
        self._ready()

    def _ready(self) -> None:
        file = f"<convplan.fuse_training {type(self._module).__name__} {id(self):x}>"
        found: dict[str, Any] = dict(self._names)
        exec(compile(self._source, file, "exec"), found)  # which torch.fx wrote, from the module's own code
        linecache.cache[file] = (len(self._source), None, self._source.splitlines(keepends=True), file)
        self._run: Callable[..., Any] = found["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns."""
        return self._run(self._module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """With modules of Python's by their names."""
        named = {k: v.__name__ for k, v in self._names.items() if isinstance(v, types.ModuleType)}
        return {
            "module": self._module, "source": self._source, "imported": named,
            "names": {k: v for k, v in self._names.items() if k not in named},
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        from importlib import import_module

        self._module, self._source = state["module"], state["source"]
        self._names = state["names"] | {k: import_module(v) for k, v in state["imported"].items()}
        self._ready()


class _Walk:
    """From a model to its parts.

    Args:
        model: a copy, which is changed.
        policy: as of `fuse_training`.
    """

    def __init__(self, model: nn.Module, policy: Policy | None) -> None:
        self.rows: list[Fused] = []
        self.untraced: dict[str, str] = {}
        self._model, self._policy = model, policy
        self._recorded = tuple(recorded(model))
        self._seen: set[int] = set()

    def run(self) -> nn.Module:
        """The whole model."""
        self._look_at(self._model, "")
        return self._model

    def _look_at(self, module: nn.Module, path: str) -> None:
        if id(module) in self._seen or not _has_work(module):
            return
        self._seen.add(id(module))
        if isinstance(module, _Norm):
            self.rows.append(Fused(path, (), _why_not(module) or "what is around it is not known"))
            return
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            self._parts(module, path)
            return
        found = traced(module, self._keep, is_model=not path, kind=_TrainingTracer)
        if isinstance(found, str):
            self.untraced[path] = found
            self._parts(module, path)
            return
        self._rewrite(module, path, found)

    def _keep(self, module: nn.Module) -> str:
        if isinstance(module, self._recorded):
            return f"the model records what {type(module).__name__} returns"
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
            return f"is a {type(module).__name__}"
        if isinstance(module, _Norm):
            return _why_not(module)
        return patterns.is_touched(module)

    def _parts(self, module: nn.Module, path: str) -> None:
        for name, part in module.named_children():
            self._look_at(part, f"{path}.{name}" if path else name)

    def _rewrite(self, module: nn.Module, path: str, found: Traced) -> None:
        before = f"{path}." if path else ""
        for target, reason in found.kept.items():
            one = module.get_submodule(target)
            if not isinstance(one, _Norm) and _has_work(one):
                self.untraced[before + target] = reason
                self._parts(one, before + target)
        rewriting = _Rewriting(module, found.graph, lambda _: "", self._policy)
        self.rows += [row._replace(name=before + row.name) for row in rewriting.run()]
        if not rewriting.calls:
            return
        code = found.graph.python_code("self")
        names = {k: v for k, v in code.globals.items() if getattr(builtins, k, code) is not v}
        module.__dict__["forward"] = Forward(module, code.src, names)


def _has_work(module: nn.Module) -> bool:
    """Whether there is a batch norm in a module, or more than one convolution."""
    parts = list(module.modules())
    return any(isinstance(one, _Norm) for one in parts) or sum(isinstance(one, _GATED) for one in parts) > 1


class _Rewriting(Rewriting):
    """Batch norms of one graph, and ReLUs between convolutions. Arguments as of `Rewriting`; no module is replaced."""

    def run(self) -> list[Fused]:
        """Rewrite the graph, and say what became of each of its batch norms, and which ReLUs have a gate."""
        self.calls: list[NormalizedCall | GatedCall] = []
        self.pass_identities()
        found = [
            self._fuse_norm(node)
            for node in list(self.graph.nodes)
            if node.op == "call_module" and isinstance(self.modules[str(node.target)], _Norm)
        ]
        found += self._put_gates()
        self.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
        return found

    def _put_gates(self) -> list[Fused]:
        """Convolutions that hand a ReLU's result to one other, and these: each becomes one call."""
        chains = {node: chain for node in self.graph.nodes if (chain := self._with_relu(node)) is not None}
        gates: dict[Node, Node] = {}  # the later convolution, and the earlier one
        for node, chain in chains.items():
            users = list(chain.nodes[-1].users)
            if chain.activation is not None and len(users) == 1 and users[0] in chains:
                gates[users[0]] = node
        names = {node: str(node.target) for node in chains}
        for node, chain in chains.items():
            if node in gates or node in gates.values():
                last = chain.nodes[-1]
                relu = self._place(str(last.target)) if len(chain.nodes) > 1 and last.op == "call_module" else None
                call = GatedCall(
                    f"gated_{len(self.calls)}_{names[node].replace('.', '_')}", self._place(names[node]),
                    chain.activation is not None, relu, node in gates, self._policy,
                )  # fmt: skip
                self.calls.append(call)
                self.replace(chain, call, node.args)
        return [Fused(names[one], (GATE,), f"with the gradient of {names[later]}") for later, one in gates.items()]

    def _with_relu(self, node: Node) -> Chain | None:
        """A convolution that can be one call, with the ReLU that alone takes its result."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _GATED) or patterns.called(node, self.modules) is None:
            return None
        if patterns.why_not(module, trains=True):
            return None
        users = list(node.users)
        if len(users) == 1 and patterns.activation_of(users[0], self.modules) == RELU:
            chain = Chain((node, users[0]), activation=RELU)
            if not self.written_between(chain):
                return chain
        return Chain((node,))

    def _fuse_norm(self, node: Node) -> Fused:
        target = str(node.target)
        reason = _why_not(self.modules[target])
        if not reason and patterns.called(node, self.modules) is None:
            reason = "is called with more than its input"
        if reason:
            return Fused(target, (), reason)
        conv, without = self._before(node)
        start = Chain((node,)) if conv is None else Chain((conv, node), names=("convolution",))
        if conv is not None and self.written_between(start):
            conv, start, without = None, Chain((node,)), "what the convolution reads may be written to before the norm"
        chain, ended = self.longest(start, foldable=False)
        ended = "; ".join(filter(None, (without, ended)))
        if chain.nodes == (node,):
            return Fused(target, (), ended or "nothing follows it")
        call = NormalizedCall(
            f"normalized_{len(self.calls)}_{target.replace('.', '_')}".rstrip("_"),
            None if conv is None else self._place(str(conv.target)),
            self._place(target), chain.sum, chain.activation, self._policy,
        )  # fmt: skip
        self.calls.append(call)
        self.replace(chain, call, (start.nodes[0].args[0],))
        return Fused(target, chain.names, ended)

    def _before(self, node: Node) -> tuple[Node | None, str]:
        """The convolution whose result a norm takes, or why there is none."""
        source = node.args[0]
        if not isinstance(source, Node) or source.op != "call_module":
            return None, ""
        module = self.modules[str(source.target)]
        if not isinstance(module, patterns.CONVOLUTIONS):
            return None, ""
        reason = patterns.why_not(module, trains=True)
        if not reason and patterns.called(source, self.modules) is None:
            reason = "is called with more than its input"
        if not reason and len(source.users) > 1:
            reason = f"its result is used {len(source.users)} times"
        return (None, f"{source.target}: {reason}") if reason else (source, "")

    def _place(self, target: str) -> Place:
        owner, _, name = target.rpartition(".")
        return Place(self.modules[owner], name)

    def longer(self, chain: Chain, user: Node, foldable: bool) -> Chain | str:
        """The chain with its only user, which is no norm."""
        if user.op == "call_module" and isinstance(self.modules[str(user.target)], _Norm):
            return f"then {self.named(user)}"
        found = super().longer(chain, user, foldable)
        if not isinstance(found, str) and found.sum is not chain.sum:
            reason = self._cannot_wait(user, found)
            return reason or found
        return found

    def _cannot_wait(self, node: Node, chain: Chain) -> str:
        """Why a sum has to stay: its other side may be written to before the backward pass looks at it."""
        if chain.sum is not None and chain.sum.alpha != 1:
            return f"it is added times {chain.sum.alpha:g}"
        residual = chain.residual
        assert residual is not None
        for user in residual.users:
            if user is not node and residual in patterns.writes(user, self.modules):
                return f"{self.named(user)} may write into what is added"
        return ""

    def named(self, node: Node) -> str:
        """A node, for people."""
        return "a fused call" if isinstance(node.target, (NormalizedCall, GatedCall)) else super().named(node)


def _why_not(norm: nn.Module) -> str:
    """Why a batch norm is left as it is; empty where it is one to compute with its neighbours."""
    if type(norm) not in _NORMS:
        return f"is a {type(norm).__name__}, which computes something else"
    touched = patterns.is_touched(norm)
    if touched:
        return touched
    own: Any = norm
    if own.momentum is None and own.track_running_stats:
        return "its momentum is None: a cumulative average is kept"
    if set(own._parameters) != {"weight", "bias"} or own._modules:
        return "has parameters or modules that batch norms do not have"
    if any(type(one) is not nn.Parameter or type(one.data) is not Tensor for one in own.parameters(recurse=False)):
        return "its weight or bias is no plain parameter"
    return ""
