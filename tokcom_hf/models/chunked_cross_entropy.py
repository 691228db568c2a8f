"""Cross-entropy of a linear head without ever holding all logits.

The rows are taken a few thousand logits-megabytes at a time; each part's gradient with respect to the hidden states and
the head is computed in the forward, while its logits are at hand, so nothing of vocabulary width outlives its part.
"""

import torch
from torch import nn

# Logits held at a time: 2^24 float32 values are 64 MiB.
LOGITS_AT_ONCE = 2**24


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, ignore_index):
        rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
        need_hidden, need_weight, need_bias = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            bias is not None and ctx.needs_input_grad[2],
        )
        counted = labels != ignore_index
        count = counted.sum().clamp(min=1)
        grad_hidden = torch.empty_like(hidden_states) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(hidden_states), rows):
            part = slice(start, start + rows)
            hidden, label, keep = hidden_states[part], labels[part], counted[part]
            logits = nn.functional.linear(hidden, weight, bias).float()
            target = label.masked_fill(~keep, 0).unsqueeze(1)
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += ((log_normalizer - logits.gather(1, target)).squeeze(1) * keep).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = softmax − one-hot, written over the logits.
            grad = logits.sub_(log_normalizer).exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad.mul_((keep / count).unsqueeze(1))
            if need_bias:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(weight.dtype)
            if need_hidden:
                grad_hidden[part] = (grad @ weight).to(hidden_states.dtype)
            if need_weight:
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.t(), hidden.to(grad.dtype))
                else:
                    grad_weight += grad.t() @ hidden.to(grad.dtype)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grads = [None if grad is None else grad.mul_(grad_output.to(grad.dtype)) for grad in ctx.grads]
        ctx.grads = (None, None, None)
        return *grads, None, None


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.LongTensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy in nats of softmax(hidden · weightᵀ + bias) over the labels that are not `ignore_index`.

    Args:
        hidden_states: (rows, hidden).
        weight: (vocab, hidden).
        labels: (rows,).
        bias: (vocab,) or None.

    Returns:
        Scalar float32; 0 where no label counts. It can be differentiated once.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, bias, labels, ignore_index)
