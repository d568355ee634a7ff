"""The networks of the papers, smallest first. Energies are bias-free at the last layer, unnormalised.

``MLP`` can hold S independent networks in stacked weights: ``(S, B, in)`` -> ``(S, B, out)``. Seeds
and arms then train side by side in one batched matrix product instead of a Python loop over models.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ConvEnergy",
    "ConvGenerator",
    "MLP",
    "MLPEnergy",
    "MLPGenerator",
    "PointGenerator",
    "ResidualEnergy",
    "initialise",
]


aten = torch.ops.aten  # the activations' own backward passes, as autograd calls them


class StackedLinear(nn.Module):
    """x @ W + b with W ``(*stack, in, out)``: S independent layers when stack is ``(S,)``.

    Initialised like ``nn.Linear`` (uniform, bound 1/sqrt(in)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stack: int | None = None,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        lead, bound = () if stack is None else (stack,), 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(_uniform((*lead, inputs, outputs), bound, generator))
        self.bias = nn.Parameter(_uniform((*lead, 1, outputs), bound, generator)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x @ W + b: ``(*batch, in)``, or ``(S, *batch, in)`` for S layers -> the same with ``out`` last."""
        if self.bias is None:
            return x @ self.weight
        if x.ndim == 2:
            return torch.addmm(self.bias, x, self.weight)
        if self.weight.ndim == 2:
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return torch.baddbmm(self.bias, x, self.weight)


class StackedBatchNorm(nn.Module):
    """Batch normalisation of ``(B, C)`` or, a model at a time, of ``(S, B, C)``."""

    def __init__(self, channels: int, stack: int | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels * (stack or 1))

    def forward(self, x: Tensor) -> Tensor:
        """x normalised over the batch, a model at a time: ``(B, C)`` or ``(S, B, C)``, same shape out."""
        if x.ndim == 2:
            return self.norm(x)
        models, batch, channels = x.shape
        flat = x.transpose(0, 1).reshape(batch, models * channels)  # (B, S*C): statistics per model
        return self.norm(flat).reshape(batch, models, channels).transpose(0, 1)


class MLP(nn.Module):
    """Linear layers of the given sizes with an activation between them, S networks at once if ``stack``.

    ``gain`` multiplies the first layer's initial weights and biases: above 1 its units bend within the data
    rather than outside, and structure finer than the data's whole width is found sooner.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        stack: int | None = None,
        activation: type[nn.Module] = nn.SiLU,
        batch_norm: bool = False,
        last_bias: bool = True,
        gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            last = i == len(sizes) - 2
            layers.append(StackedLinear(a, b, stack, bias=last_bias or not last, generator=generator))
            if not last:
                layers += [StackedBatchNorm(b, stack)] if batch_norm else []
                layers.append(activation())
        self.layers = nn.Sequential(*layers)
        self.stack = stack
        if gain != 1.0:
            with torch.no_grad():
                for parameter in self.layers[0].parameters():
                    parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        """f(x): ``(*batch, in)``, or ``(S, *batch, in)`` for S models -> the same with ``out`` last."""
        return self.layers(x)

    def value_and_tangent(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and its directional derivative (grad f) v in one pass forward, differentiable in the weights.

        x: ``(*batch, in)``; v: of x's shape, or ``(P, *batch, in)`` for P directions at once. Returns
        ``(*batch, out)`` and the same behind v's leading dimension. Cheaper than a vector-Jacobian product
        of autograd, which must go back through the network and then through that way back once more.
        Raises ``ValueError`` for layers other than linear and SiLU.
        """
        for layer in self.layers:
            if isinstance(layer, StackedLinear):
                x, v = layer(x), v @ layer.weight
            elif isinstance(layer, nn.SiLU):
                x, v = _SiLUTangent.apply(x, v)
            else:
                raise ValueError(f"MLP knows the tangent of linear and SiLU layers, not of {layer}")
        return x, v


class _SiLUTangent(torch.autograd.Function):
    """silu(h) and silu'(h) v, with their backward pass by hand: far fewer operations than autograd's."""

    @staticmethod
    def forward(ctx: object, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid = h.sigmoid()
        value = h * sigmoid
        slope = torch.addcmul(sigmoid, value, 1 - sigmoid)  # silu' = sigma + h sigma (1 - sigma)
        ctx.save_for_backward(h, v, sigmoid, slope)
        return value, slope * v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad_value: Tensor, grad_tangent: Tensor) -> tuple[Tensor, Tensor]:
        h, v, sigmoid, slope = ctx.saved_tensors
        rest = 1 - sigmoid
        # silu'' = sigma (1 - sigma) (2 + h (1 - 2 sigma))
        curve = (rest - sigmoid).mul_(h).add_(2).mul_(rest).mul_(sigmoid)
        through = grad_tangent * v
        if through.ndim > h.ndim:
            through = through.sum(0)  # P directions share one point
        return torch.addcmul(grad_value * slope, through, curve), grad_tangent * slope


class MLPEnergy(nn.Module):
    """E: ``(B, *shape)`` -> ``(B,)``, or ``(S, B, *shape)`` -> ``(S, B)`` with stacked weights.

    SiLU by default: the energy's gradient is then smooth, which long chains need.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: tuple[int, ...] = (256, 256),
        stack: int | None = None,
        activation: type[nn.Module] = nn.SiLU,
        gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in (nn.SiLU, nn.ReLU):
            raise ValueError(f"MLPEnergy knows the slopes of SiLU and ReLU, not of {activation.__name__}")
        self.shape, self.stack, self.smooth = tuple(shape), stack, activation is nn.SiLU
        sizes = (math.prod(shape), *hidden, 1)
        self.net = MLP(sizes, stack, activation, last_bias=False, gain=gain, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """E(x): ``(B, *shape)`` -> ``(B,)``, or ``(S, B, *shape)`` -> ``(S, B)`` with stacked weights."""
        return self.net(x.flatten(-len(self.shape))).squeeze(-1)

    def member(self, index: int) -> MLPEnergy:
        """One of the stacked models as a network of its own, with a copy of its weights.

        Raises ``ValueError`` for a network that is not stacked, ``IndexError`` for a model it does not have.
        """
        if self.stack is None:
            raise ValueError("this network is not stacked")
        linear = [layer for layer in self.net.layers if isinstance(layer, StackedLinear)]
        widths = tuple(layer.weight.shape[-1] for layer in linear[:-1])
        one = MLPEnergy(self.shape, widths, activation=nn.SiLU if self.smooth else nn.ReLU)
        for mine, theirs in zip(one.parameters(), self.parameters(), strict=True):
            mine.data = theirs.data[index].reshape(mine.shape).clone()
        return one

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient in x, by hand: the backward pass of this network written out.

        The numbers are autograd's up to rounding; the sampler's inner loop is a quarter shorter, because
        no graph is built.
        """
        *inner, last = [layer for layer in self.net.layers if isinstance(layer, StackedLinear)]
        h, before = x.flatten(-len(self.shape)), []
        for layer in inner:
            before.append(layer(h))
            h = F.silu(before[-1]) if self.smooth else F.relu(before[-1])
        value = last(h).squeeze(-1)
        grad = last.weight.mT.expand_as(h)  # (*stack, 1, H) -> (*stack, B, H)
        for layer in reversed(inner):
            h = before.pop()
            grad = aten.silu_backward(grad, h) if self.smooth else aten.threshold_backward(grad, h, 0)
            grad = grad @ layer.weight.mT
        return value, grad.unflatten(-1, self.shape)

    def value_and_tangent(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """E and its slope grad E . v along v, differentiable in the weights; shapes as in ``MLP``."""
        flat = -len(self.shape)
        value, tangent = self.net.value_and_tangent(x.flatten(flat), v.flatten(flat))
        return value.squeeze(-1), tangent.squeeze(-1)


class MLPGenerator(nn.Module):
    """G: latents ``(*batch, z)`` -> images ``(*batch, *shape)`` in [-1, 1] by tanh, batch-normalised."""

    def __init__(
        self,
        shape: tuple[int, ...],
        latent: int = 16,
        hidden: tuple[int, ...] = (128, 256),
        stack: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.latent, self.stack = tuple(shape), latent, stack
        sizes = (latent, *hidden, math.prod(shape))
        self.net = MLP(sizes, stack, nn.ReLU, batch_norm=True, generator=generator)

    def forward(self, z: Tensor) -> Tensor:
        """G(z): ``(*batch, z)`` -> ``(*batch, *shape)`` in [-1, 1]."""
        return self.net(z).tanh().unflatten(-1, self.shape)


class PointGenerator(nn.Module):
    """G: latents ``(*batch, z)`` -> points ``(*batch, d)``: linear layers and ReLU, nothing normalised."""

    def __init__(
        self,
        dim: int = 2,
        latent: int = 2,
        hidden: tuple[int, ...] = (128, 128, 128),
        stack: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.latent, self.stack = (dim,), latent, stack
        self.net = MLP((latent, *hidden, dim), stack, nn.ReLU, generator=generator)

    def forward(self, z: Tensor) -> Tensor:
        """G(z): ``(*batch, z)`` -> ``(*batch, d)``."""
        return self.net(z)


class ConvEnergy(nn.Module):
    """The small convolutional energy of Nijkamp et al. 2020 ("vanilla"), for 28x28 and 32x32 images.

    conv 3x3, then three conv 4x4 of stride 2 that double the width, then a bias-free sum: ``(B, C, H, W)``
    -> ``(B,)``. Leaky ReLU 0.05, no normalisation. Width 32 at 32x32 costs 26 million multiplications.

    ``precision=torch.bfloat16`` computes the convolutions in that type, channels last, and the final sum in
    float32: E to about a per cent, for twice the speed or more where the device has units for it. Weights,
    states and gradients stay in float32.
    """

    slope = 0.05

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 32,
        generator: torch.Generator | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, height, side = shape
        self.shape, self.stack, self.precision = tuple(shape), None, precision
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])
        for i in range(3):
            self.convs.append(nn.Conv2d(width * 2**i, width * 2 ** (i + 1), 4, stride=2, padding=1))
        last = width * 8 * (height // 8) * (side // 8)
        self.head = nn.Linear(last, 1, bias=False)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """E(x): ``(B, C, H, W)`` -> ``(B,)``."""
        with _computing_in(self.precision, x):
            for conv in self.convs:
                x = F.leaky_relu(conv(x), self.slope)
        return self.head(x.flatten(1).to(self.head.weight.dtype)).squeeze(1)

    @torch.no_grad()  # it works in place
    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient in x, by hand: the backward pass of this network written out.

        The numbers are autograd's up to rounding. On a CPU a step is about a fifth shorter: channels-last
        convolutions need no re-ordering of their big inputs and outputs, and the activations are in place.
        """
        kind = self.precision or x.dtype
        # A copy: images of one channel count as channels-last already, and would stay as they are.
        last = x.device.type == "cpu" or kind != x.dtype
        h = x.to(kind, copy=True, memory_format=torch.channels_last) if last else x
        weights = [conv.weight.to(kind) for conv in self.convs]
        sides, outputs = [], []
        for conv, weight in zip(self.convs, weights, strict=True):
            sides.append(h.shape[2:])
            h = F.conv2d(h, weight, conv.bias.to(kind), conv.stride, conv.padding)
            h = F.leaky_relu_(h, self.slope)
            outputs.append(h)
        value = self.head(h.flatten(1).to(self.head.weight.dtype)).squeeze(1)
        grad = torch.empty_like(h).copy_(self.head.weight.unflatten(1, h.shape[1:]))  # (B, 8 width, H/8, W/8)
        for conv, weight in zip(reversed(self.convs), reversed(weights), strict=True):
            # In place. True: leaky ReLU's output stands for its input, which has the same sign.
            aten.leaky_relu_backward.grad_input(grad, outputs.pop(), self.slope, True, grad_input=grad)
            # The rows and columns on the far side that the stride left over, as 7 + 2 = 4 + 2 * 2 + 1.
            rest = [(n + 2 * p - k) % s for n, p, k, s in zip(
                sides.pop(), conv.padding, conv.kernel_size, conv.stride, strict=True)]  # fmt: skip
            grad = F.conv_transpose2d(grad, weight, None, conv.stride, conv.padding, rest)
        return value, grad.to(x.dtype).contiguous()


class ResidualEnergy(nn.Module):
    """The SNGAN-32 discriminator as an energy, without spectral norm, as in Hill et al. 2022.

    Four residual blocks of ``width`` (256 in the paper), the first two halving the image; ReLU, global
    average pool, bias-free linear: ``(B, C, H, W)`` -> ``(B,)``. ``precision`` as in ``ConvEnergy``: the pool
    and the linear layer stay in float32.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 64,
        generator: torch.Generator | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.stack, self.precision = tuple(shape), None, precision
        self.stem = nn.ModuleList(
            [nn.Conv2d(shape[0], width, 3, padding=1), _conv3(width), _conv1(shape[0], width)]
        )
        self.down = nn.ModuleList([_conv3(width), _conv3(width), _conv1(width, width)])
        self.flat = nn.ModuleList([nn.ModuleList([_conv3(width), _conv3(width)]) for _ in range(2)])
        self.head = nn.Linear(width, 1, bias=False)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """E(x): ``(B, C, H, W)`` -> ``(B,)``."""
        with _computing_in(self.precision, x):
            if self.precision is not None:
                x = x.contiguous(memory_format=torch.channels_last)
            first, second, skip = self.stem
            x = F.avg_pool2d(second(F.relu(first(x))), 2) + skip(F.avg_pool2d(x, 2))
            first, second, skip = self.down
            x = F.avg_pool2d(second(F.relu(first(F.relu(x)))), 2) + F.avg_pool2d(skip(x), 2)
            for first, second in self.flat:
                x = x + second(F.relu(first(F.relu(x))))
        return self.head(F.relu(x).to(self.head.weight.dtype).mean((2, 3))).squeeze(1)


class ConvGenerator(nn.Module):
    """The SNGAN-32 generator: ``(B, z)`` -> ``(B, C, H, W)`` in [-1, 1], for H = W from 5 to 32.

    Dense to 4x4, batch-normalised residual blocks that double the side (three up to 32x32, one for the 8x8
    digits), conv, tanh; a 28x28 image is the 32x32 one without its border.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent: int = 128,
        width: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if shape[1] != shape[2] or not 5 <= shape[1] <= 32:
            raise ValueError(f"ConvGenerator makes square images of side 5 to 32, not {shape[1:]}")
        self.shape, self.latent, self.stack, self.width = tuple(shape), latent, None, width
        self.dense = nn.Linear(latent, width * 16)
        self.blocks = nn.ModuleList([_UpBlock(width) for _ in range(math.ceil(math.log2(shape[1] / 4)))])
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, shape[0], 3, padding=1)
        initialise(self, generator)

    def forward(self, z: Tensor) -> Tensor:
        """G(z): ``(B, z)`` -> ``(B, C, H, W)`` in [-1, 1]."""
        x = self.dense(z).unflatten(1, (self.width, 4, 4))
        for block in self.blocks:
            x = block(x)
        x = self.out(F.relu(self.norm(x))).tanh()  # (B, C, 32, 32), or 8x8, 16x16
        border = (x.shape[-1] - self.shape[1]) // 2
        return x[:, :, border : border + self.shape[1], border : border + self.shape[2]]


class _UpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2, self.skip = _conv3(width), _conv3(width), _conv1(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x)), scale_factor=2, mode="bilinear", align_corners=False)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return h + self.skip(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


def _computing_in(precision: torch.dtype | None, x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast to ``precision`` on x's device, or nothing.

    Weights are cast anew in each call: a kept copy would go stale when the optimiser moves them, also within
    a recorded step that is replayed.
    """
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, dtype=precision, cache_enabled=False)


def _conv3(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def _conv1(inputs: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, width, 1)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    return (torch.rand(shape, generator=generator, device=device) * 2 - 1) * bound


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Glorot-uniform weights and zero biases (the official code's initialisation), from ``generator``."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            receptive = layer.weight[0, 0].numel() if layer.weight.ndim == 4 else 1
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive
            layer.weight.data = _uniform(tuple(layer.weight.shape), math.sqrt(6 / fans), generator)
            if layer.bias is not None:
                layer.bias.data = torch.zeros_like(layer.bias, device=layer.weight.device)
