"""Cross-entropy of a linear head without ever holding all logits.

The rows are taken a few dozen megabytes of logits at a time; each part's gradient with respect to the hidden states
and the head is computed in the forward, while its logits are at hand, so nothing of vocabulary width outlives its part.
The head may be split over several tables (frozen old rows, trainable new rows): they are never joined, and a table
that needs no gradient costs none.
"""

import torch

# Logits held at a time: 3 · 2^22 float32 values are 48 MiB, 128 rows of 97,536. Fewer rows make the products with the
# tables slower (by a fifth at 86 rows), more of them cost memory that nothing gives back.
LOGITS_AT_ONCE = 3 * 2**22


class _ChunkedCrossEntropy(torch.autograd.Function):
    """forward(hidden_states, labels, denominator, dtype, handover, weight_0, bias_0, weight_1, bias_1, ...)"""

    @staticmethod
    def forward(ctx, hidden_states, labels, denominator, dtype, handover, *tables):
        weights, biases = tables[0::2], tables[1::2]
        needs_weight, needs_bias = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
        ctx.handover = handover
        needs_hidden = ctx.needs_input_grad[0]
        heads = [weight.to(dtype) for weight in weights]
        columns, width = [], 0
        for weight in weights:
            columns.append(slice(width, width + len(weight)))
            width += len(weight)
        count = max(1, len(hidden_states))
        # Parts of equal size: a small last one would cost nearly as much as a full one.
        rows = -(-count // -(-count // max(1, LOGITS_AT_ONCE // width)))
        logits = torch.empty(rows, width, dtype=torch.float32, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weights = [None] * len(weights)
        grad_biases = [None] * len(weights)
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(hidden_states), rows):
            hidden = hidden_states[start : start + rows].to(dtype)
            target = labels[start : start + rows].unsqueeze(1)
            part = logits[: len(hidden)]
            for head, bias, place in zip(heads, biases, columns):
                if dtype == torch.float32:
                    torch.mm(hidden, head.t(), out=part[:, place])
                else:
                    part[:, place] = hidden @ head.t()
                if bias is not None:
                    part[:, place] += bias
            largest, where = part.max(dim=1, keepdim=True)
            chosen = part.gather(1, target)
            torch.softmax(part, dim=1, out=part)
            # log Σ exp = max − log p_max, and p_max ≥ 1 / vocabulary never underflows.
            total += (largest - part.gather(1, where).log() - chosen).sum()
            if not (needs_hidden or any(needs_weight) or any(needs_bias)):
                continue
            # d loss / d logits = (softmax − one-hot) / denominator, over the logits. The divisor is applied to hidden
            # states and their gradients, never to a tensor of vocabulary width.
            part.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            scaled = (hidden / denominator).to(dtype) if any(needs_weight) else None
            summed = None
            for index, (head, place) in enumerate(zip(heads, columns)):
                grad = part[:, place].to(dtype)
                if needs_hidden:
                    summed = grad @ head if summed is None else summed.addmm_(grad, head)
                if needs_weight[index]:
                    if grad_weights[index] is None:
                        grad_weights[index] = (grad.t() @ scaled).float()
                    elif dtype == torch.float32:
                        grad_weights[index].addmm_(grad.t(), scaled)
                    else:
                        grad_weights[index] += grad.t() @ scaled
                if needs_bias[index]:
                    here = part[:, place].sum(0) / denominator
                    grad_biases[index] = here if grad_biases[index] is None else grad_biases[index] + here
            if needs_hidden:
                grad_hidden[start : start + rows] = summed / denominator
        ctx.grads = [grad_hidden]
        for weight, bias, grad_weight, grad_bias in zip(weights, biases, grad_weights, grad_biases):
            ctx.grads.append(None if grad_weight is None else grad_weight.to(weight.dtype))
            ctx.grads.append(None if grad_bias is None else grad_bias.to(bias.dtype))
        ctx.shapes = [
            (table.shape, table.dtype, table.device) if needed and table is not None else None
            for table, needed in zip(tables, ctx.needs_input_grad[5:])
        ]
        return total / denominator

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.grads is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated once; its gradients were given away.")
        grad_hidden, *grads = ctx.grads
        ctx.grads = None
        scaled = [None if grad is None else grad.mul_(grad_output.to(grad.dtype)) for grad in grads]
        for index, shape in enumerate(ctx.shapes):
            if shape is not None and scaled[index] is None:
                # No row had a label: the gradient is zero, not absent, so that every rank has one to reduce.
                scaled[index] = torch.zeros(shape[0], dtype=shape[1], device=shape[2])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_output.to(grad_hidden.dtype))
        if ctx.handover is not None:
            ctx.handover["grad"], scaled[-2] = scaled[-2], None
        return grad_hidden, None, None, None, None, *scaled


def split_cross_entropy(
    hidden_states: torch.Tensor,
    tables: list[tuple[torch.Tensor, torch.Tensor | None]],
    labels: torch.LongTensor,
    ignore_index: int = -100,
    num_items: torch.Tensor | int | None = None,
    handover: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of a softmax over the rows of several tables, as if they were one below the other.

    Args:
        hidden_states: `(rows, hidden)`.
        tables: `(weight (vocab_i, hidden), bias (vocab_i,) or None)` each; label ids count through them in order.
        labels: `(rows,)`; rows of `ignore_index` cost nothing.
        num_items: divisor of the sum; the number of labels that count where None.
        handover: where given, the gradient of the last table's weight is left in `handover["grad"]` and not returned: a
            lookup in the same (tied) table, which is differentiated later, adds its own and returns both at once.

    Returns:
        Scalar float32; 0 where no label counts. It can be differentiated once. Matrix products run in the dtype of
        `hidden_states`, or in that of autocast; the softmax is float32.
    """
    if hidden_states.shape[0] != labels.shape[0]:
        raise ValueError(f"{hidden_states.shape[0]} hidden states do not fit {labels.shape[0]} labels.")
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    counted = labels != ignore_index
    if not counted.all():
        hidden_states, labels = hidden_states[counted], labels[counted]
    count = max(len(labels), 1) if num_items is None else num_items
    flat = [tensor for table in tables for tensor in table]
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden_states, labels, count, dtype, handover, *flat)


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
    return split_cross_entropy(hidden_states, [(weight, bias)], labels, ignore_index)
