"""Part of `kept`: what Inductor generates calls the kernels of convplan's operators, and not the operators.

By itself Inductor calls an operator that it does not know through torch's dispatcher, which then calls the operator's
kernel. At that point nothing is left for the dispatcher to decide, and it costs the host half as much as a small
convolution. All else stays as Inductor treats such operators: only the line of generated Python that calls one names
another function. Where Inductor writes C++, or has no place to say this, it calls the operators.

Generated code imports this module by itself, wherever it is loaded from.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from convplan.torch_ops.fused_library import kept_fused_convolution as fused_convolution
from convplan.torch_ops.library import kept_convolution as convolution
from convplan.torch_ops.library import kept_input_gradient as input_gradient
from convplan.torch_ops.library import kept_weight_gradient as weight_gradient

log = logging.getLogger("convplan.compile")

# By the names of their operators. Dynamo leaves them alone (`undisturbed`) since those were registered.
_KERNELS = {
    "convolution": convolution,
    "input_gradient": input_gradient,
    "weight_gradient": weight_gradient,
    "fused_convolution": fused_convolution,
}

_CALLED = "convplan_kept"  # this module's name in generated code


@functools.cache
def call_kernels() -> bool:
    """Have Inductor write calls of the kernels from now on; False where this version of it has no place for that.

    It keeps a table of operators whose calls are written in their own way, by the names that it calls them by.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
        from torch._inductor.codegen.wrapper import ExternKernelAllocLine
        from torch._inductor.virtualized import V
    except ImportError as exc:
        log.debug("compiled code calls operators by the dispatcher: %s", exc)
        return False

    class KernelLine(ExternKernelAllocLine):
        """The line that Inductor writes for such an operator, with another function in it."""

        def codegen(self, code: Any) -> None:
            node: Any = self.node
            operator = node.python_kernel_name
            self.wrapper.add_import_once(f"from convplan.torch_ops import kept_calls as {_CALLED}")
            node.python_kernel_name = f"{_CALLED}.{names[operator]}"
            try:
                super().codegen(code)
            finally:  # a node may be written more than once
                node.python_kernel_name = operator

    def write(node: Any, writeline: Callable[[Any], None]) -> None:
        line = ExternKernelAllocLine if V.graph.cpp_wrapper else KernelLine
        writeline(line(V.graph.wrapper_code, node))

    names = {f"torch.ops.convplan.{name}.kept": name for name in _KERNELS}
    CUSTOM_EXTERN_KERNEL_CODEGEN.update({operator: CustomCodegen(python=write) for operator in names})
    return True
