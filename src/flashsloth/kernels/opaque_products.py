"""Products that torch.compile calls as they are.

It takes a weight of oneDNN's products for a constant of the graph, and fails where it is a module's; loops over chunks
of a weight it would unroll.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("flashsloth", "FRAGMENT")


def opaque(schema: str, function: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which the compiler takes for an operator of torch's.

    Calling an operator costs as much as a small product, so that uncompiled the function itself is called.

    Args:
        schema: the operator, such as "product(Tensor left, Tensor right) -> Tensor".
        function: of the schema's arguments; neither changes nor returns any of them.
        shape: gives an empty tensor like the function's result, from the same arguments.
    """
    name = schema.partition("(")[0]
    # not `torch.library.custom_op`, whose checks at every call take longer than a small product
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashsloth::{name}", shape)
    operator = getattr(torch.ops.flashsloth, name).default

    def call(*args: Any) -> Tensor:
        return operator(*args) if torch.compiler.is_compiling() else function(*args)

    return call
