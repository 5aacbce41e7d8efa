"""A convolution on channels-last memory, forward and each gradient, by whatever computes it soonest.

A 1x1 convolution is a product of matrices over the rows of channels-last memory: by the direct kernel, which strided
3x3 convolutions have too, by one that leaves the weights unpacked where they are many, or by a library's. A 3x3
convolution with stride 1 goes forward, and back to its input and its weights, through Winograd's filtering. Other
gradients of the weights have a kernel; the rest goes through torch's operator. On a GPU everything is torch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2kit.backbones.fast import (
    direct,
    memory,
    native,
    norm_act,
    product,
    squares,
    weight_grad,
    winograd,
    winograd_grad,
)
from r2kit.backbones.fast.norm_act import Norm
from r2kit.backbones.fast.tile import FinishArgs, finish

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Conv:
    """One convolution without its tensors; every pair is (height, width).

    Attributes:
        kernel: Size of the kernel.
        stride: Step.
        pad: Zeros around the image.
        dilation: Distance of the taps.
        groups: Groups of channels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def of(module: nn.Conv2d) -> Conv | None:
        """Return the convolution that `module` is, or None if it pads otherwise than with a number of zeros."""
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        kernel, stride, pad, dilation = (
            (int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        return Conv(kernel, stride, pad, dilation, module.groups)

    @property
    def is_product(self) -> bool:
        """Whether it is a product of matrices."""
        return self.kernel == (1, 1) and self.pad == (0, 0) and self.groups == 1

    def is_filter(self, chans: int, out_size: tuple[int, int]) -> bool:
        """Whether Winograd's filtering suits it.

        Args:
            chans: Channels read.
            out_size: Height and width written; a single pixel has too little in common with its neighbours.
        """
        plain = self.kernel == (3, 3) and self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and max(self.pad) <= 2 and min(out_size) >= 2 and chans >= squares.NARROWEST

    def is_direct(self, chans: int, count: int) -> bool:
        """Whether the direct kernel suits it.

        Args:
            chans: Channels read.
            count: Pixels written, of all images.
        """
        if self.is_product:
            return chans <= direct.widest(count)
        plain = self.stride != (1, 1) and self.dilation == (1, 1) and self.groups == 1
        return plain and self.kernel != (1, 1) and chans >= squares.NARROWEST

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output."""
        sides = zip((height, width), self.kernel, self.stride, self.pad, self.dilation, strict=True)
        tall, wide = ((side + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, dil in sides)
        return tall, wide

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output, channels-last and new.

        Args:
            x: (B, C, H, W), channels-last; may be some channels of a wider tensor.
            weight: As torch's.
            bias: As torch's.
        """
        size = self.out_size(x.shape[2], x.shape[3])
        if self._has_kernel(x, weight, size):
            out = room(x, len(weight), size)
            self._convolve(x, weight, size, finish(rows(out), bias))
            return out
        if self.is_product and not x.is_cuda:
            x = self._met(x)
            matrix = weight.flatten(1).t()
            out = room(x, len(weight), (x.shape[2], x.shape[3]))
            if bias is None:
                torch.mm(rows(x), matrix, out=rows(out))
            else:
                torch.addmm(bias, rows(x), matrix, out=rows(out))
            return out
        out = torch.conv2d(x, weight, bias, self.stride, self.pad, self.dilation, self.groups)
        return out.contiguous(memory_format=torch.channels_last)

    def finished(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Norm,
        *,
        y: Tensor | None = None,
        res: Tensor | None = None,
        add: Tensor | None = None,
        y2: Tensor | None = None,
    ) -> Tensor | None:
        """Write the output with a norm of fixed statistics and its activation behind it.

        Args:
            x: As in `forward`.
            weight: As in `forward`.
            bias: As in `forward`.
            norm: What stands behind the convolution.
            y: (R, K) rows for the output; None, without `y2`, makes room for it.
            res: See `norm_act.forward`.
            add: See `norm_act.forward`.
            y2: See `norm_act.forward`.

        Returns:
            The room made, (B, K, OH, OW), channels-last; else None.
        """
        size = self.out_size(x.shape[2], x.shape[3])
        made = None
        if self._has_kernel(x, weight, size):
            if y is None and y2 is None:
                made = room(x, len(weight), size)
                y = rows(made)
            self._convolve(x, weight, size, finish(y, bias, norm, res=res, add=add, y2=y2))
            return made
        sums = self.forward(x, weight, bias)
        if y is None and y2 is None:
            made, y = sums, rows(sums)
        norm_act.forward(rows(sums), norm, None, y, res=res, add=add, y2=y2)
        return made

    def input_grad(
        self, dy: Tensor, x: Tensor, weight: Tensor, into: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Return the gradient of `x`, channels-last.

        Args:
            dy: Gradient of the output, channels-last; may be some channels of a wider tensor.
            x: As given to `forward`; only its shape matters.
            weight: As given to `forward`.
            into: Like `x`; the gradient is added to it, in place where that is less work.
            out: Like `x`, may be some channels of a wider tensor; the gradient is written here. Not with `into`.
        """
        size = (x.shape[2], x.shape[3])
        known = x.dtype in _DTYPES and not x.is_cuda
        if self.is_product and known and self.is_direct(dy.shape[1], len(rows(dy))):
            grad = into
            if grad is None:
                grad = room(x, x.shape[1], size) if out is None else out
            end = finish(rows(grad))
            direct.convolve(dy, weight, size, self.stride, (0, 0), end, back=True, adds=into is not None)
            return grad
        if self.is_product and not x.is_cuda:
            matrix = weight.flatten(1)
            if self.stride != (1, 1):
                grad = into
                if grad is None:
                    grad = torch.zeros_like(x, memory_format=torch.channels_last) if out is None else out.zero_()
                self._met(grad, copy=False).add_(images(rows(dy) @ matrix, dy.shape[0], dy.shape[2], dy.shape[3]))
                return grad
            if into is not None:
                rows(into).addmm_(rows(dy), matrix)
                return into
            grad = room(x, x.shape[1], size) if out is None else out
            torch.mm(rows(dy), matrix, out=rows(grad))
            return grad
        filtered = self.is_filter(dy.shape[1], size)
        if known and (filtered or self.is_direct(dy.shape[1], len(rows(x)))):
            grad = room(x, x.shape[1], size) if out is None else out
            if filtered:
                pad = (2 - self.pad[0], 2 - self.pad[1])
                winograd.convolve(dy, weight, size, pad, finish(rows(grad)), turned=True)
            else:
                direct.convolve(dy, weight, size, self.stride, self.pad, finish(rows(grad)), back=True)
        else:
            grad = self._torch_grad(dy, x, weight, 0).contiguous(memory_format=torch.channels_last)
            if out is not None:
                grad = out.copy_(grad)
        return grad if into is None else into.add_(grad)

    def weight_grad(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of `weight`, in whatever memory layout; arguments as in `input_grad`."""
        even = all(a == b for a, b in (self.stride, self.pad, self.dilation))
        owned = even and self.groups == 1 and x.shape[1] >= squares.NARROWEST and x.dtype == torch.float32
        if x.is_cuda:
            grad = self._torch_grad(dy, x, weight, 1)
        elif self.is_product and not (owned and native.has_wide_vectors()):
            grad = memory.empty(x, (len(weight), x.shape[1], 1, 1))
            torch.mm(rows(dy).t(), rows(self._met(x)), out=grad.flatten(1))
            return grad
        elif self._has_filtered_weights(x, dy):
            grad = winograd_grad.weight_grad(x, dy, self.pad)
        elif owned:
            grad = weight_grad.weight_grad(x, dy, self.kernel, self.stride[0], self.pad[0], self.dilation[0])
        else:
            grad = self._torch_grad(dy, x, weight, 1)
        return grad

    def _has_filtered_weights(self, x: Tensor, dy: Tensor) -> bool:
        """Whether Winograd's filtering suits the gradient of the weights."""
        size = (dy.shape[2], dy.shape[3])
        suits = self.is_filter(min(x.shape[1], dy.shape[1]), size) and x.dtype in _DTYPES
        return suits and len(x) * squares.count(4, size) >= winograd_grad.FEWEST and squares.square_side(size) == 4

    def _has_kernel(self, x: Tensor, weight: Tensor, out_size: tuple[int, int]) -> bool:
        """Whether a kernel goes forward."""
        chans, count = x.shape[1], len(x) * out_size[0] * out_size[1]
        suits = self.is_direct(chans, count) or self.is_filter(chans, out_size) or self._is_unpacked(weight)
        return suits and x.dtype in _DTYPES and not x.is_cuda

    def _is_unpacked(self, weight: Tensor) -> bool:
        """Whether the product that leaves weights unpacked suits it."""
        return self.is_product and weight.stride(1) == 1

    def _convolve(self, x: Tensor, weight: Tensor, out_size: tuple[int, int], end: FinishArgs) -> None:
        """Go forward by the kernel."""
        if self.is_direct(x.shape[1], len(x) * out_size[0] * out_size[1]):
            direct.convolve(x, weight, out_size, self.stride, self.pad, end)
        elif self.is_product:
            product.convolve(self._met(x), weight, end)
        else:
            winograd.convolve(x, weight, out_size, self.pad, end)

    def _torch_grad(self, dy: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        """Return the gradient of the input (0) or the weight (1) by torch's own operator."""
        mask = (which == 0, which == 1, False)
        places = (self.stride, self.pad, self.dilation)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *places, False, (0, 0), self.groups, mask)[
            which
        ]

    def _met(self, x: Tensor, *, copy: bool = True) -> Tensor:
        """Return the pixels that a 1x1 convolution meets; copied if there are gaps between them."""
        if self.stride == (1, 1):
            return x
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return x.contiguous(memory_format=torch.channels_last) if copy else x


def rows(x: Tensor) -> Tensor:
    """Return (B, C, H, W) in channels-last memory as its (B * H * W, C) rows, without a copy."""
    batch, chans, height, width = x.shape
    step = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0)
    return x.as_strided((batch * height * width, chans), (step, 1))


def room(like: Tensor, chans: int, size: tuple[int, int]) -> Tensor:
    """Return new memory for (B, `chans`, *size), channels-last."""
    return memory.empty(like, (len(like), chans, *size))


def images(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return (B * H * W, C) rows as (B, C, H, W) in channels-last memory, without a copy."""
    return x.view(batch, height, width, x.shape[1]).permute(0, 3, 1, 2)
