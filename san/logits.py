# SPDX-License-Identifier: MIT
"""SANLogits: the output of a SAN head, as two views with equal values and different gradients.

Slicing Adversarial Networks (SAN, arXiv:2301.12811) train the last linear layer `scale * <direction, h(x)>`
of a discriminator with two objectives at once. Every head returns one `SANLogits`, in every training phase.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

# Names of torch functions that act on both views. All are linear, so the values stay equal and each view
# keeps its own gradient route. Joining and arithmetic have more operands to check.
_SHAPE = """
    reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes movedim unbind split chunk
    select narrow index_select gather flip repeat repeat_interleave
"""
_LINEAR = """
    detach clone cuda sum mean neg negative
    avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d interpolate
"""
_ONE_OPERAND = {*_SHAPE.split(), *_LINEAR.split()}
_JOIN = {"cat", "concat", "concatenate", "stack"}
_ARITHMETIC = {  # torch's name -> ours, with SANLogits on the left and on the right
    **dict.fromkeys(("add", "__add__", "__radd__"), ("__add__", "__radd__")),
    **dict.fromkeys(("sub", "subtract", "__sub__"), ("__sub__", "__rsub__")),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), ("__mul__", "__rmul__")),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), ("__truediv__", "__rtruediv__")),
}


class _UnsupportedOperationError(TypeError, AttributeError):
    """Also an AttributeError, so that `hasattr`, `copy` and `pickle` see a missing attribute, not a crash."""


@dataclass(frozen=True, eq=False, repr=False)
class SANLogits:
    """Two views of the same logits: equal in value, different in where their gradients flow.

    * `fun` trains the features and the scale. Log it, read it at inference, let the generator maximise it.
    * `dir` trains the unit direction and nothing else. Only the discriminator loss reads it (`san.losses`).

    Both are floating-point tensors of one shape, any number of dimensions. Linear operations that a
    discriminator applies to its logits work on both views: view, reshape, flatten, squeeze, unsqueeze,
    permute, transpose, expand, contiguous, indexing, iteration over the batch, split, chunk, unbind, select,
    gather, repeat, ..., sum, mean, average pooling, interpolation, to/float/half/..., detach; sums and
    differences of heads; and addition of, multiplication or division by a constant: a number, or a tensor
    that does not require grad. `torch.cat`, `torch.stack` and the `torch.` forms of the above work too.

    Unpacking walks over the batch, as for a tensor: write `logits.fun, logits.dir`, not `fun, dir = logits`.

    Raises TypeError for every other operation, and for views that are not floating-point tensors; ValueError
    for views that differ in shape, dtype or device.

    >>> logits = SANLogits(fun=torch.ones(2, 1, 4, 4), dir=torch.ones(2, 1, 4, 4))
    >>> joined = torch.cat([logits.flatten(1), logits.view(2, -1) / 2], dim=1)
    >>> joined.shape, joined.mean().fun.item(), joined.mean().dir.item()
    (torch.Size([2, 32]), 0.75, 0.75)
    """

    fun: Tensor
    dir: Tensor

    __array_ufunc__ = None  # a NumPy number on the left of `*` leaves the product to us

    def __post_init__(self) -> None:
        for name, view in (("fun", self.fun), ("dir", self.dir)):
            if not isinstance(view, Tensor) or not view.is_floating_point():
                kind = view.dtype if isinstance(view, Tensor) else type(view).__name__
                raise TypeError(f"SANLogits.{name} is {kind}, but must be a floating-point torch.Tensor")
        for name in ("shape", "dtype", "device"):
            fun, dir_ = getattr(self.fun, name), getattr(self.dir, name)
            if fun != dir_:
                raise ValueError(f"SANLogits views must have the same {name}, got fun {fun} and dir {dir_}")

    @classmethod
    def plain(cls, logits: Tensor) -> SANLogits:
        """Logits of a head without a separate direction: all gradients go through `fun`, `dir` is a constant.

        For a plain GAN head, so that the code around it sees one type. The direction term of a SAN loss
        then has a value and no gradient.
        """
        return cls(fun=logits, dir=logits.detach())

    # Size and type, as of a tensor.

    @property
    def shape(self) -> torch.Size:
        return self.fun.shape

    @property
    def ndim(self) -> int:
        return self.fun.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.fun.dtype

    @property
    def device(self) -> torch.device:
        return self.fun.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.fun.size(dim)

    def dim(self) -> int:
        return self.fun.dim()

    def numel(self) -> int:
        return self.fun.numel()

    def __len__(self) -> int:
        return len(self.fun)

    def __repr__(self) -> str:
        return f"SANLogits(fun={self.fun!r}, dir={self.dir!r})"

    # Shape. Arguments are those of the tensor methods.

    def view(self, *shape: Any) -> SANLogits:
        return _on_both(Tensor.view, self, *shape)

    def reshape(self, *shape: Any) -> SANLogits:
        return _on_both(Tensor.reshape, self, *shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> SANLogits:
        return _on_both(Tensor.flatten, self, start_dim, end_dim)

    def squeeze(self, dim: int | tuple[int, ...] | None = None) -> SANLogits:
        return _on_both(Tensor.squeeze, self, *([] if dim is None else [dim]))

    def unsqueeze(self, dim: int) -> SANLogits:
        return _on_both(Tensor.unsqueeze, self, dim)

    def permute(self, *dims: Any) -> SANLogits:
        return _on_both(Tensor.permute, self, *dims)

    def transpose(self, dim0: int, dim1: int) -> SANLogits:
        return _on_both(Tensor.transpose, self, dim0, dim1)

    def expand(self, *sizes: Any) -> SANLogits:
        return _on_both(Tensor.expand, self, *sizes)

    def contiguous(self) -> SANLogits:
        return _on_both(Tensor.contiguous, self)

    # Parts.

    def __getitem__(self, index: Any) -> SANLogits:
        return _on_both(Tensor.__getitem__, self, index)

    def __iter__(self) -> Iterator[SANLogits]:
        """One SANLogits per sample."""
        if self.ndim == 0:
            raise TypeError("iteration over SANLogits without dimensions; read .fun or .dir")
        return iter(self.unbind(0))

    def unbind(self, dim: int = 0) -> tuple[SANLogits, ...]:
        return _on_both(Tensor.unbind, self, dim)

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[SANLogits, ...]:
        return _on_both(Tensor.split, self, split_size, dim)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[SANLogits, ...]:
        return _on_both(Tensor.chunk, self, chunks, dim)

    # Type and device.

    def to(self, *args: Any, **kwargs: Any) -> SANLogits:
        return _on_both(Tensor.to, self, *args, **kwargs)

    def float(self) -> SANLogits:
        return _on_both(Tensor.float, self)

    def double(self) -> SANLogits:
        return _on_both(Tensor.double, self)

    def half(self) -> SANLogits:
        return _on_both(Tensor.half, self)

    def bfloat16(self) -> SANLogits:
        return _on_both(Tensor.bfloat16, self)

    def cpu(self) -> SANLogits:
        return _on_both(Tensor.cpu, self)

    def detach(self) -> SANLogits:
        return _on_both(Tensor.detach, self)

    # Arithmetic: heads are added, constants scale and shift.

    def sum(self, *args: Any, **kwargs: Any) -> SANLogits:
        return _on_both(Tensor.sum, self, *args, **kwargs)

    def mean(self, *args: Any, **kwargs: Any) -> SANLogits:
        return _on_both(Tensor.mean, self, *args, **kwargs)

    def __neg__(self) -> SANLogits:
        return _on_both(Tensor.neg, self)

    def __add__(self, addend: SANLogits | Real | Tensor) -> SANLogits:
        _require_addend(addend, "addition")
        return _on_both(torch.add, self, addend)

    def __radd__(self, addend: Real | Tensor) -> SANLogits:
        if isinstance(addend, list):
            return NotImplemented  # `rows += logits` extends a list by the samples, as with a tensor
        return self + addend

    add = __add__

    def __sub__(self, addend: SANLogits | Real | Tensor) -> SANLogits:
        _require_addend(addend, "subtraction")
        return _on_both(torch.sub, self, addend)

    def __rsub__(self, addend: Real | Tensor) -> SANLogits:
        return -self + addend

    sub = __sub__

    def __mul__(self, factor: Real | Tensor) -> SANLogits:
        _require_constant(factor, "multiplication")
        return _on_both(torch.mul, self, factor)

    __rmul__ = __mul__
    mul = __mul__

    def __truediv__(self, divisor: Real | Tensor) -> SANLogits:
        _require_constant(divisor, "division")
        return _on_both(torch.div, self, divisor)

    div = __truediv__

    # Everything else says what to do.

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if name in _ONE_OPERAND:
            return _on_both(func, *args, **kwargs)
        if name in _JOIN:
            _require_all_san(args[0] if args else kwargs["tensors"], name)
            return _on_both(func, *args, **kwargs)
        if name in _ARITHMETIC and len(args) == 2 and not kwargs:
            (left, right), (method, reflected) = args, _ARITHMETIC[name]
            return getattr(left, method)(right) if isinstance(left, cls) else getattr(right, reflected)(left)
        return _unsupported(name)

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("__"):
            if name in _ONE_OPERAND:  # the rarer ones; the common ones are methods above
                return functools.partial(_on_both, getattr(Tensor, name), self)
            _unsupported(name)
        raise AttributeError(f"'SANLogits' object has no attribute '{name}'")


def _on_both(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` twice: with the fun views, then with the dir views of all SANLogits among arguments."""
    fun, dir_ = (
        function(*(_pick(a, view) for a in args), **{k: _pick(a, view) for k, a in kwargs.items()})
        for view in ("fun", "dir")
    )
    if isinstance(fun, Tensor):
        return SANLogits(fun, dir_)
    return tuple(SANLogits(f, d) for f, d in zip(fun, dir_, strict=True))


def _pick(argument: Any, view: str) -> Any:
    if isinstance(argument, SANLogits):
        return getattr(argument, view)
    if isinstance(argument, (list, tuple)) and any(isinstance(a, SANLogits) for a in argument):
        return [_pick(a, view) for a in argument]
    return argument


def _require_constant(operand: Any, operation: str) -> None:
    """A trained factor must send its gradient through one view only, and only the caller knows which."""
    if isinstance(operand, Tensor) and operand.requires_grad:
        raise TypeError(
            f"{operation} of SANLogits by a tensor that requires grad is ambiguous: write "
            "SANLogits(logits.fun * factor, logits.dir * factor.detach()), or use factor.detach(); "
            "an inner product of features and class vectors is san.project(features, class_vectors)"
        )
    if not isinstance(operand, (Real, Tensor)):
        raise TypeError(
            f"{operation} of SANLogits by a {type(operand).__name__}: only by a number, or by a tensor that "
            "does not require grad; use .fun for losses and inference, .dir for the direction term"
        )


def _require_addend(operand: Any, operation: str) -> None:
    if isinstance(operand, Tensor) and operand.requires_grad:
        raise TypeError(
            f"{operation} of SANLogits and a tensor that requires grad: wrap a plain head's logits with "
            "SANLogits.plain(tensor), or add .fun (for losses, inference) and .dir apart"
        )
    if not isinstance(operand, (SANLogits, Real, Tensor)):
        raise TypeError(
            f"{operation} of SANLogits and a {type(operand).__name__}: only of SANLogits, a number, or a tensor "
            "that does not require grad; use .fun for losses and inference, .dir for the direction term"
        )


def _require_all_san(tensors: Any, name: str) -> None:
    odd = next((t for t in tensors if not isinstance(t, SANLogits)), None)
    if odd is not None:
        raise TypeError(
            f"torch.{name} got SANLogits together with a {type(odd).__name__}: wrap a plain head's logits "
            "with SANLogits.plain(tensor), or join .fun (for losses, inference) and .dir apart"
        )


def _unsupported(name: str) -> NoReturn:
    raise _UnsupportedOperationError(
        f"SANLogits does not support '{name}': its two views train different parameters. Use .fun for "
        "generator losses, logging and inference, .dir for the discriminator's direction term (see "
        "san.losses); for another linear operation build SANLogits(fun=..., dir=...) from both views"
    )


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(self: SANLogits, *args: Any) -> NoReturn:
        _unsupported(name)

    method.__name__ = name
    return method


# Python looks operators up on the class, past __getattr__: without these, `logits == 0` would pass silently.
_REFUSED_OPERATORS = """
    rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul abs invert and or xor
    eq ne lt le gt ge bool float int index setitem contains array
"""
for _name in _REFUSED_OPERATORS.split():
    setattr(SANLogits, f"__{_name}__", _refuse(f"__{_name}__"))
