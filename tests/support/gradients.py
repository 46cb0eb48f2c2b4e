"""Gradients against finite differences."""

from collections.abc import Callable

from torch import Tensor
from torch.autograd import gradcheck


def slopes_agree(function: Callable[[Tensor], Tensor], point: Tensor) -> bool:
    """Whether autograd's gradient of a float64 function is that of finite differences, in random directions.

    Raises:
        GradcheckError: they differ; it says where.
    """
    return gradcheck(function, point, fast_mode=True)
