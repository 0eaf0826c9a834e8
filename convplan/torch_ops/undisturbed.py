"""Keeping Dynamo out of convplan's inside, where it has nothing to find.

Where a compiled program has a part that Dynamo gave up on, that part runs as ever, but Dynamo looks at every Python
function called from it, one by one: also at those that stand behind torch's convolution, and at all that planning
calls. It would compile the lot, or fail at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def undisturbed(function: F) -> F:
    """Have Dynamo run a function, and all that it calls, as it stands. Costs its calls nothing.

    It can still be traced as part of a function that calls it.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
