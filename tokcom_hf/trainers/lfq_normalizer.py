"""Log-normaliser of a softmax over old and new ids; its gradients are computed in the forward pass, to save memory."""

import torch

from ..models import shared_cross_entropy as chunked_cross_entropy


class _LogNormalizer(torch.autograd.Function):
    """forward(hidden_states, old, dtype, weight, bias) → sum of log-normalisers, each of them, probability of new ids"""

    @staticmethod
    def forward(ctx, hidden_states, old, dtype, weight, bias):
        needs_hidden, _, _, needs_weight, needs_bias = ctx.needs_input_grad
        head = weight.to(dtype)
        count = len(hidden_states)
        # Parts of equal size: a small last part would cost nearly as much as a full one.
        parts = -(-count // max(1, chunked_cross_entropy.LOGITS_AT_ONCE // len(weight)))
        rows = -(-count // max(1, parts))
        logits = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden_states.device)
        whole, mass = torch.empty_like(old), torch.empty_like(old)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, count, max(1, rows)):
            place = slice(start, start + rows)
            hidden = hidden_states[place].to(dtype)
            part = logits[: len(hidden)]
            if dtype == torch.float32:
                torch.mm(hidden, head.t(), out=part)
            else:
                part.copy_(hidden @ head.t())
            if bias is not None:
                part += bias
            largest = part.amax(1)
            part.sub_(largest[:, None]).exp_()
            new = largest + part.sum(1).log()
            whole[place] = torch.logaddexp(old[place], new)
            mass[place] = (new - whole[place]).exp()
            # The probability of a new id is part · scale. Hidden states and their gradients are scaled instead of `part`,
            # because they are narrower than the vocabulary.
            scale = (largest - whole[place]).exp()[:, None]
            grad = part.to(dtype)
            if needs_hidden:
                grad_hidden[place] = scale * (grad @ head)
            if needs_weight and dtype == torch.float32:
                grad_weight.addmm_(grad.t(), scale * hidden)
            elif needs_weight:
                grad_weight += grad.t() @ (scale * hidden).to(dtype)
            if needs_bias:
                grad_bias += part.t() @ scale[:, 0]
        ctx.grads = (grad_hidden, 1 - mass, None, grad_weight, grad_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, old, None, weight, bias)]
        ctx.mark_non_differentiable(whole, mass)
        return whole.sum(), whole, mass

    @staticmethod
    def backward(ctx, grad_total, *_):
        if ctx.grads is None:
            raise RuntimeError("summed_log_normalizer can be differentiated only once; its gradients are freed then.")
        grads, ctx.grads = ctx.grads, None
        return tuple(
            None if grad is None or not needed else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad)
        )


def summed_log_normalizer(
    hidden_states: torch.Tensor, old: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log(exp(old) + Σ exp(logits of new ids)) of every row, with a part of the logits in memory at a time.

    Gradients are computed in the forward pass, while the logits exist. Therefore only the sum over rows has a gradient: the
    gradients of single rows would need one weight per row, which the forward pass does not know.

    Args:
        hidden_states: `(n, hidden)`, the head's input.
        old: `(n,)` float32 log Σ exp of the logits of old ids.
        weight, bias: `(new ids, hidden)` and `(new ids,)` or None.

    Returns:
        The sum over rows (differentiable once); the value of each row `(n,)` and the probability of new ids `(n,)`, without
        gradient. Matrix products run in the dtype of `hidden_states`, or in that of autocast.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    if not torch.is_grad_enabled():
        # Under no_grad, `needs_input_grad` is still true for parameters.
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):
        return _LogNormalizer.apply(hidden_states, old, dtype, weight, bias)
