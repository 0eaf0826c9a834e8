"""Part of `fuse`: modules become graphs, and in a graph convolutions take in what follows them.

`traced` finds what can be traced: modules inside that cannot be are calls in the graph, for `fuse` to look into.
`Rewriting` finds, for each convolution of a graph, the longest run of norm, sum and activation behind it that can be
computed with it, and puts one call in its place; then it replaces concatenations and max pools (`between`). What a node
is, is asked of `fuse_patterns`.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx import Graph, Node

from convplan._activations import Resolved
from convplan._policy import Policy
from convplan.torch_ops import fuse_patterns as patterns
from convplan.torch_ops.between import Joined, Pooled
from convplan.torch_ops.fused_modules import FusedCall, FusedConv, Norm, Sum, folded

Tensor = torch.Tensor

_ASKS_OF_THE_KIND = ("ndim", "device")  # what a convolution and a norm leave as they found it
_ASKS = ("dtype", "device", "ndim", "shape", "is_cuda")


class Untraceable(Exception):
    """Something that a trace would get wrong."""


class _Proxy(fx.Proxy):
    """Says that it is a tensor where it must be one."""

    _is_param = _is_buffer = False  # which torch asks of whatever says that it is a tensor

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor if self.tracer.yields_tensor(self.node) else _Proxy  # type: ignore[attr-defined]


def _noted(write: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    return method


for _write in patterns.IN_PLACE:
    setattr(_Proxy, f"__{_write.__name__}__", _noted(_write))


class Reader(fx.Tracer):
    """Traces the code of graphs that `fuse` made, when they are unpickled."""

    def proxy(self, node: Node) -> fx.Proxy:
        """What stands for a node's result."""
        return _Proxy(node, self)

    def yields_tensor(self, node: Node) -> bool:
        """Whether a node yields a tensor for sure."""
        return False

    def create_arg(self, a: Any) -> Any:
        """What a node takes for an argument."""
        if issubclass(type(a), fx.Proxy):  # its class may say otherwise
            return a.node
        if type(a) is OrderedDict:  # which torch would make a plain dictionary of
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        return super().create_arg(a)


class Tracer(Reader):
    """Traces down to torch's own modules and to those that `keep` names, and remembers in which module it failed.

    Args:
        keep: whether a module is to stay one call.
        is_model: whether what is traced is the model that the caller gave, which is called with tensors.
    """

    def __init__(self, keep: Callable[[nn.Module], bool], is_model: bool) -> None:
        super().__init__()
        self._keep, self._is_model = keep, is_model
        self.blamed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one call."""
        return self._keep(m) or patterns.computes_plainly(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What stands for a module's result."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.blamed = self.blamed or m
            raise

    def yields_tensor(self, node: Node) -> bool:
        """Whether a node yields a tensor for sure."""
        if node.op == "placeholder":
            if not self._is_model:
                raise Untraceable(f"it asks what kind of thing {node.target!r} is")
            return True
        if node.op != "call_module":
            return False
        return type(self.root.get_submodule(str(node.target))).__module__.startswith("torch.nn.modules")

    def create_arg(self, a: Any) -> Any:
        """What a node takes for an argument."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, (dict, list)) and type(a) not in (dict, list, OrderedDict):
            raise Untraceable(f"it makes a {type(a).__name__}")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = {id(buffer) for buffer in self.root.buffers()}
            if id(a) not in known and a not in self.tensor_attrs:
                raise Untraceable("it makes tensors of its own, which a trace would take for constants")
        return super().create_arg(a)


class Traced(NamedTuple):
    """A module as a graph, and the calls in it of modules that could not be traced, with the reasons."""

    graph: Graph
    kept: dict[str, str]


def traced(
    module: nn.Module, keep: Callable[[nn.Module], str], *, is_model: bool, kind: type[Tracer] = Tracer
) -> Traced | str:
    """A module's graph, or why there is none.

    Args:
        module: in eval mode; it is left as it was.
        keep: why a module inside is to stay one call; empty where it need not.
        is_model: as of the tracer.
        kind: of the tracer.
    """
    found = keep(module) or _asks_for_more(module)
    if found:
        return found
    failed: dict[type, str] = {}

    def stays(one: nn.Module) -> bool:
        return type(one) in failed or bool(keep(one))

    while True:
        tracer, before = kind(stays, is_model), _state(module)
        blamed: nn.Module | None = None
        reason = ""
        try:
            graph = tracer.trace(module)
        except Exception as exc:  # whatever a forward raises when it is given no tensors
            blamed, reason = tracer.blamed or module, _told(exc)
        written = _restore(before)
        if blamed is None and written is not None:
            blamed, reason = written, "its forward writes to its own attributes"
        if blamed is None:
            return Traced(graph, dict(_kept(graph, module, lambda one: failed.get(type(one), "") or keep(one))))
        if blamed is module or type(blamed) in failed:
            return reason
        failed[type(blamed)] = reason


def _told(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    said = lines[0] if lines else ""
    return said if isinstance(exc, Untraceable) else f"{type(exc).__name__}: {said}"


def _asks_for_more(module: nn.Module) -> str:
    """Why a forward's arguments are not known beforehand: it can be called in more than one way."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return "its forward has no signature"
    for one in parameters:
        if one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) or one.default is not one.empty:
            return f"its forward can be called with or without {one.name!r}"
    return ""


def _state(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """What every module holds, and what is in the containers that it holds."""
    found = []
    for one in module.modules():
        held = dict(vars(one))
        inside = {k: type(v)(v) for k, v in held.items() if type(v) in (dict, list)}
        found.append((one, held, inside))
    return found


def _restore(before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> nn.Module | None:
    """Put everything back; the first module that had changed."""
    changed: nn.Module | None = None
    for one, held, inside in before:
        now = vars(one)
        same = now.keys() == held.keys() and all(now[k] is v for k, v in held.items())
        for key, content in inside.items():
            container = held[key]
            if len(container) == len(content) and all(map(operator.is_, _values(container), _values(content))):
                continue
            same = False
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
        if not same:
            changed = changed or one
            now.clear()
            now.update(held)
    return changed


def _values(container: dict[Any, Any] | list[Any]) -> Collection[Any]:
    return container.values() if isinstance(container, dict) else container


def _kept(graph: Graph, module: nn.Module, why: Callable[[nn.Module], str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op == "call_module":
            reason = why(module.get_submodule(str(node.target)))
            if reason:
                yield str(node.target), reason


# --- rewriting


class Chain(NamedTuple):
    """A convolution with what follows it as far as this goes.

    Args:
        nodes: the convolution's first, each the only user of the one before.
        norm: to fold into its weight.
        sum, residual: what is added, and how.
        activation: computed last.
        names: what was taken in, for people.
    """

    nodes: tuple[Node, ...]
    norm: Norm | None = None
    sum: Sum | None = None
    residual: Node | None = None
    activation: Resolved | None = None
    names: tuple[str, ...] = ()


class Fused(NamedTuple):
    """What became of one convolution: what it took in, and what ended that."""

    name: str
    parts: tuple[str, ...]
    ended: str


class Rewriting:
    """Convolutions of one graph.

    Args:
        module: whose graph it is; its convolutions are replaced in it where they stand.
        graph: is changed.
        barred: why a convolution module is to be left alone; empty where it is not.
        policy: what the new modules are given.

    Attributes:
        passes: what was replaced and is no convolution: modules by their paths, calls by their names in the graph.
    """

    def __init__(
        self, module: nn.Module, graph: Graph, barred: Callable[[nn.Module], str], policy: Policy | None
    ) -> None:
        self._module, self.graph, self._policy, self._barred = module, graph, policy, barred
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.passes: list[str] = []
        self._uses: dict[int, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                one = id(self.modules[str(node.target)])
                self._uses[one] = self._uses.get(one, 0) + 1

    def run(self) -> list[Fused]:
        """Rewrite the graph, and say what became of each of its convolutions."""
        self.pass_identities()
        found = []
        for node in list(self.graph.nodes):
            module = self._convolution(node)
            if module is not None:
                self._ask_before(node)
                reason = patterns.why_not(module) or self._barred(module) or self._entangled(node, module)
                found.append(self._fuse(node, module) if not reason else Fused(str(node.target), (), reason))
            elif patterns.functional_call(node) is not None:
                self._ask_before(node)
                found.append(self._fuse_call(node))
        self._pass_between()
        self.graph.lint()
        return found

    def _pass_between(self) -> None:
        """Replace concatenations and max pools by modules that take one pass over memory."""
        for node in list(self.graph.nodes):
            joined, pooled = patterns.joined(node), patterns.pooled(node, self.modules)
            if joined is not None:
                self._replace_one(node, Joined(joined[1]), joined[0])
            elif pooled is not None:
                self._replace_one(node, Pooled(pooled[1]), (pooled[0],))

    def _replace_one(self, node: Node, module: nn.Module, given: tuple[Node, ...]) -> None:
        self.passes.append(str(node.target) if node.op == "call_module" else node.name)
        self.replace(Chain((node,)), self._added(node, module), given)

    def _added(self, node: Node, module: nn.Module) -> str:
        """The name of a new module, after a node, that nothing has yet."""
        target = f"fused_{node.name}"
        while hasattr(self._module, target):
            target += "_"
        self._module.add_module(target, module)
        self.modules[target] = module
        return target

    def _convolution(self, node: Node) -> nn.Module | None:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, patterns.CONVOLUTIONS) else None

    def _entangled(self, node: Node, module: nn.Module) -> str:
        """Why one call of a convolution cannot be replaced without anything else noticing."""
        uses = self._uses[id(module)]
        if uses > 1:
            return f"is called {uses} times"
        if patterns.called(node, self.modules) is None:
            return "is called with more than its input"
        target = str(node.target)
        for other in self.graph.nodes:
            if other.op == "call_module" and target.startswith(f"{other.target}."):
                return f"belongs to {other.target}, which is called too"
            if other.op == "get_attr" and str(other.target).startswith(f"{target}."):
                reads = [user for user in other.users if not _is_question(user, _ASKS)]
                if reads:
                    return f"its {str(other.target)[len(target) + 1 :]} is read elsewhere"
        return ""

    def pass_identities(self) -> None:
        """Take out what does nothing."""
        for node in list(self.graph.nodes):
            module = patterns.called(node, self.modules)
            if type(module) is nn.Identity and not patterns.is_touched(module):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _ask_before(self, node: Node) -> None:
        """Questions about the number of dimensions and the device are asked of the input, which has the same ones."""
        source = node
        while source is not None:
            users = [user for user in source.users if not _is_question(user, _ASKS_OF_THE_KIND)]
            for user in [user for user in source.users if user not in users]:
                if node.args:
                    user.replace_input_with(source, node.args[0])  # type: ignore[arg-type]
            norm = patterns.norm_of(users[0], self.modules, self._constant) if len(users) == 1 else ""
            if source is not node or not isinstance(norm, Norm):
                return
            source = users[0]

    # --- one convolution

    def _fuse(self, node: Node, module: Any) -> Fused:
        chain, ended = self.longest(Chain((node,)), foldable=True)
        pair = None
        if chain.norm is not None:
            channels = chain.norm.mean.numel()
            pair = folded(module, chain.norm) if channels == module.out_channels else None
            if pair is None:
                ended = f"the folded weight does not fit {str(module.weight.dtype).removeprefix('torch.')}"
                if channels != module.out_channels:
                    ended = f"the batch norm has {channels} channels"
                chain = Chain((node,))
        weight, bias = pair or (module.weight, module.bias)
        new = FusedConv(module, weight, bias, chain.sum, chain.activation, self._policy)
        target = str(node.target)
        owner, _, name = target.rpartition(".")
        setattr(self._module.get_submodule(owner), name, new)
        self.modules[target] = new
        self.replace(chain, target, node.args)
        parts = (("bias",) if module.bias is not None else ()) + chain.names
        return Fused(target, parts, ended)

    def _fuse_call(self, node: Node) -> Fused:
        call = patterns.functional_call(node)
        assert call is not None
        chain, ended = self.longest(Chain((node,)), foldable=False)
        name = f"call of {getattr(node.target, '__name__', node.target)} ({node.name})"
        if len(chain.nodes) == 1:
            return Fused(name, (), ended)
        new = FusedCall(call.geometry, chain.sum, chain.activation, self._policy)
        self.replace(chain, self._added(node, new), (call.x, call.weight, call.bias))
        return Fused(name, (("bias",) if call.bias is not None else ()) + chain.names, ended)

    def replace(self, chain: Chain, target: str | Callable[..., Any], given: tuple[Any, ...]) -> None:
        """Put the call of a module, by its path, or of a function where the chain ends."""
        last = chain.nodes[-1]
        operands = given if chain.residual is None else (*given, chain.residual)
        with self.graph.inserting_before(last):
            if isinstance(target, str):
                new = self.graph.call_module(target, operands)
            else:
                new = self.graph.call_function(target, operands)
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        for node in reversed(chain.nodes):
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            for source in sources:
                if source.op == "get_attr" and not source.users:
                    self.graph.erase_node(source)

    def longest(self, start: Chain, *, foldable: bool) -> tuple[Chain, str]:
        """The longest chain with this start that can be computed where it ends, and why it ends there."""
        chains, ended = self._chains(start, foldable)
        reason = ended
        for chain in reversed(chains):
            hazard = self.written_between(chain)
            if not hazard:
                return chain, reason
            reason = hazard
        return chains[0], reason

    def _chains(self, start: Chain, foldable: bool) -> tuple[list[Chain], str]:
        """All chains from a convolution, each longer than the one before, and what ends the last."""
        chains = [start]
        while True:
            chain = chains[-1]
            last = chain.nodes[-1]
            users = list(last.users)
            if len(users) != 1:
                return chains, f"the result is used {len(users)} times"
            found = self.longer(chain, users[0], foldable)
            if isinstance(found, str):
                return chains, found
            chains.append(found)
            if found.activation is not None:
                return chains, ""

    def longer(self, chain: Chain, user: Node, foldable: bool) -> Chain | str:
        """The chain with its only user; why not, where that cannot be taken in."""
        if user.op == "output":
            return ""
        last, reasons = chain.nodes[-1], []
        nodes = (*chain.nodes, user)
        norm = patterns.norm_of(user, self.modules, self._constant)
        if isinstance(norm, Norm):
            if len(chain.nodes) == 1 and foldable and user.all_input_nodes[0] is last:
                return chain._replace(nodes=nodes, norm=norm, names=(*chain.names, "batch norm"))
            return "then a batch norm" if foldable else "then a batch norm, and the weight is computed"
        reasons.append(norm)
        if chain.sum is None:
            found = patterns.sum_of(user, last)
            if not isinstance(found, str):
                reason = self._cannot_add(user, *found)
                return reason or chain._replace(
                    nodes=nodes, sum=found[0], residual=found[1], names=(*chain.names, "add")
                )
            reasons.append(found)
        activation = patterns.activation_of(user, self.modules)
        if not isinstance(activation, str):
            return chain._replace(nodes=nodes, activation=activation, names=(*chain.names, activation.name))
        return next(filter(None, [*reasons, activation]), f"then {self.named(user)}")

    def named(self, node: Node) -> str:
        """A node, for people."""
        if node.op == "call_module":
            if isinstance(self.modules[str(node.target)], (FusedCall, *patterns.CONVOLUTIONS)):
                return str(node.target)
            return f"{type(self.modules[str(node.target)]).__name__} {node.target}"
        return getattr(node.target, "__name__", str(node.target))

    def _cannot_add(self, node: Node, sum: Sum, residual: Node) -> str:
        """Why a sum has to stay: what it writes into may be seen elsewhere."""
        if not sum.in_place or sum.convolution_first:
            return ""
        others = [user for user in residual.users if user is not node]
        before = set(_between(self.graph, None, node))
        seen = any(user not in before or not patterns.is_fresh(user, self.modules) for user in others)
        if seen or not patterns.is_fresh(residual, self.modules):
            return f"the sum writes into {residual.target if residual.op == 'call_module' else residual.name}"
        return ""

    def written_between(self, chain: Chain) -> str:
        """Computing all at the end must not see what is written between: only memory of their own may be."""
        for node in _between(self.graph, chain.nodes[0], chain.nodes[-1]):
            if node in chain.nodes:
                continue
            for target in patterns.writes(node, self.modules):
                if len(target.users) > 1 or not patterns.is_fresh(target, self.modules):
                    return f"{self.named(node)}, which is computed before the end, may write into what is read"
        return ""

    def _constant(self, node: Any) -> Tensor | None:
        """The parameter or buffer that a node yields."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        holder = self._module.get_submodule(owner)
        held: Tensor | None = holder._parameters.get(name)
        held = holder._buffers.get(name) if held is None else held
        plain = held is not None and type(held) in (Tensor, nn.Parameter)
        return held if plain and not patterns.is_touched(holder) else None


def _is_question(node: Node, names: tuple[str, ...]) -> bool:
    """Whether a node only asks what kind of tensor another is."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in names
    return node.op == "call_method" and node.target in ("dim", "ndimension") and "ndim" in names


def _between(graph: Graph, first: Node | None, last: Node) -> Iterator[Node]:
    """Nodes after one and before another, in the order they are computed in."""
    started = first is None
    for node in graph.nodes:
        if node is last:
            return
        if started:
            yield node
        started = started or node is first
