"""`hf_rnn::mlp_scan`: torch's products and functions, written in place, on any device."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import operator

gelu, gelu_backward = torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _along(x: Tensor, y: Tensor) -> Tensor:
    """mean(x y) over the last dimension, kept."""
    return (x * y).mean(-1, keepdim=True)


def _backward_shapes(memory, in_weight, weights, biases, out_weight, out_bias, mask, eps, memories, a, h, scale, grad):
    time, batch, *_ = memories.shape
    return (
        a.new_empty(time, batch, a.shape[3]),
        torch.empty_like(memory),
        [torch.empty_like(w) for w in (in_weight, *weights)],
        [torch.empty_like(b) for b in biases],
        torch.empty_like(out_weight),
        out_weight.new_empty(out_weight.shape[0]),
    )


@operator("mlp_scan_backward", fake=_backward_shapes)
def scan_backward(
    memory: Tensor,
    in_weight: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    memories: Tensor,
    a: Tensor,
    h: Tensor,
    scale: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """From what `scan` returned and the gradient of memories (T, B, K, D) to those of x, as (T, B, S), of the memory,
    of in_weight and the weights, of the biases, of out_weight and of out_bias."""
    (time, batch, tokens, size), depth = memories.shape, len(weights)
    du, da = torch.empty_like(memories), torch.empty_like(a)
    inner = _scale(h[:-1], eps) if time else h[:-1]
    normed = h[:-1] * inner
    g = torch.zeros_like(memory)
    for t in reversed(range(time)):
        g = g + grad[t]
        stays = None
        if mask is not None:
            real = mask[:, t, None, None]
            stays, g = g.masked_fill(real, 0), g.masked_fill(~real, 0)
        # with m = u s: du = s (g - m mean(g m)); where nothing was read, g is 0
        torch.mul(torch.addcmul(g, memories[t], _along(g, memories[t]), value=-1), scale[t], out=du[t])
        dh = du[t].view(batch, -1) @ out_weight
        gelu_backward(dh, a[depth, t], grad_input=da[depth, t])
        for n in reversed(range(depth)):
            d = da[n + 1, t] @ weights[n]
            d = torch.addcmul(d, normed[n, t], _along(d, normed[n, t]), value=-1).mul_(inner[n, t])
            gelu_backward(d, a[n, t], grad_input=da[n, t])
            da[n, t] += da[n + 1, t]
        g = (da[0, t] @ in_weight).view_as(memory)
        if stays is not None:
            g = g + stays
    before = torch.cat([memory[None], memories[:-1]]).view(time * batch, tokens * size)
    rows = [*da.flatten(1, 2)]
    outputs = du.view(time * batch, tokens * size)
    grads = [rows[0].t() @ before, *(d.t() @ y.view(d.shape) for d, y in zip(rows[1:], normed, strict=True))]
    grad_biases = [d.sum(0) for d, _ in zip(rows[1:], biases, strict=False)]
    grad_out = outputs.t() @ h[depth].flatten(0, 1)
    return da[0].clone(), g, grads, grad_biases, grad_out, outputs.sum(0)


def _shapes(x, memory, in_weight, weights, biases, out_weight, out_bias, mask, eps, training):
    batch, time, size = x.shape
    kept = time if training else 0
    inner = x.new_empty(len(weights) + 1, kept, batch, size)
    scale = x.new_empty(kept, batch, memory.shape[1], 1)
    return x.new_empty(time, batch, *memory.shape[1:]), inner, torch.empty_like(inner), scale


def _save(ctx, inputs, output) -> None:
    _, memory, in_weight, weights, biases, out_weight, out_bias, mask, eps, training = inputs
    if not training:
        raise RuntimeError("hf_rnn::mlp_scan: called with training=False on tensors that require gradients")
    ctx.eps, ctx.depth, ctx.biases = eps, len(weights), len(biases)
    ctx.save_for_backward(memory, in_weight, out_weight, out_bias, mask, *output, *weights, *biases)


def _backward(ctx, grad, *_):
    memory, in_weight, out_weight, out_bias, mask, memories, a, h, scale, *others = ctx.saved_tensors
    weights, biases = others[: ctx.depth], others[ctx.depth :]
    grad_x, grad_memory, (grad_in, *grad_weights), grad_biases, grad_out, grad_out_bias = scan_backward(
        memory, in_weight, weights, biases, out_weight, out_bias, mask, ctx.eps, memories, a, h, scale, grad
    )
    grad_out_bias = None if out_bias is None else grad_out_bias
    grads = grad_x.transpose(0, 1), grad_memory, grad_in, grad_weights, grad_biases, grad_out, grad_out_bias
    return *grads, None, None, None


@operator("mlp_scan", fake=_shapes, backward=_backward, save=_save)
def scan(
    x: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memories (T, B, K, D), and, if training, what the backward pass needs: a and gelu(a) of each layer, (L + 1, T, B,
    S), and the scale of each memory token, (T, B, K, 1); else T is 0 in these."""
    batch, time, size = x.shape
    memories = x.new_empty(time, batch, *memory.shape[1:])
    kept, depth, tiny = time if training else min(time, 1), len(weights), torch.finfo(x.dtype).eps
    a, h = (x.new_empty(depth + 1, kept, batch, size) for _ in range(2))
    scale = x.new_empty(time if training else 0, batch, memory.shape[1], 1)
    for t, x_t in enumerate(x.unbind(1)):
        at = t if training else 0
        torch.addmm(x_t, memory.flatten(1), in_weight.t(), out=a[0, at])
        gelu(a[0, at], out=h[0, at])
        for n, weight in enumerate(weights):
            added = torch.mm(h[n, at], weight.t()).mul_(_scale(h[n, at], eps))
            torch.add(a[n, at], added, out=a[n + 1, at])
            if biases:
                a[n + 1, at] += biases[n]
            gelu(a[n + 1, at], out=h[n + 1, at])
        u = torch.mm(h[depth, at], out_weight.t())
        u = (u if out_bias is None else u.add_(out_bias)).view_as(memory)
        s = _scale(u, tiny)
        torch.mul(u, s, out=memories[t])
        if training:
            scale[t] = s
        if mask is not None:
            torch.where(mask[:, t, None, None], memories[t], memory, out=memories[t])
        memory = memories[t]
    if not training:
        a, h = a[:, :0].clone(), h[:, :0].clone()
    return memories, a, h, scale
