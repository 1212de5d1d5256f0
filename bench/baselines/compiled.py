"""``torch.compile`` as a baseline: a graph of static shapes for each case, or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

MOST_GRAPHS = 256  # of one function: sizes, dtypes and numbers of threads


@functools.cache  # compiling takes far longer than measuring: each case once in a process
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under ``torch.compile``: the first call of each case compiles a graph of its static shapes.

    Sets options for the whole process: a call that passes the recompilation limit raises instead of running eagerly,
    and no saved tensor is donated to the backward, which may then run repeatedly (``retain_graph=True``).
    """
    import torch._dynamo  # takes seconds, and not every process compiles
    import torch._functorch.config

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 8 * MOST_GRAPHS
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)
