"""Cross-entropy of a linear head that never holds all logits.

Rows are processed in parts of a few dozen megabytes of logits. The forward computes the gradients of each part while it has
its logits, so no tensor of vocabulary width outlives its part. The head may consist of several tables (frozen old rows,
trainable new rows), which are never joined; a table that needs no gradient costs none.
"""

import torch

# Logits of one part: 48 MiB of float32, 128 rows of 97,536. With fewer rows the products with the tables are slower (by a
# fifth at 86 rows); more rows cost memory and are no faster.
LOGITS_AT_ONCE = 3 * 2**22


class _ChunkedCrossEntropy(torch.autograd.Function):
    """forward(hidden_states, labels, denominator, dtype, gradient_sink, weight_0, bias_0, weight_1, bias_1, ...)"""

    @staticmethod
    def forward(ctx, hidden_states, labels, denominator, dtype, gradient_sink, *tables):
        weights, biases = tables[0::2], tables[1::2]
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]]
        grads = _Gradients(hidden_states, [weight.to(dtype) for weight in weights], denominator, dtype, *needed)
        columns, width = [], 0
        for weight in weights:
            columns.append(slice(width, width + len(weight)))
            width += len(weight)
        count = max(1, len(hidden_states))
        # Parts of equal size: a small last one would cost nearly as much as a full one.
        rows = -(-count // -(-count // max(1, LOGITS_AT_ONCE // width)))
        logits = torch.empty(rows, width, dtype=torch.float32, device=hidden_states.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(hidden_states), rows):
            hidden = hidden_states[start : start + rows].to(dtype)
            target = labels[start : start + rows].unsqueeze(1)
            part = logits[: len(hidden)]
            for head, bias, place in zip(grads.heads, biases, columns):
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
            if grads.any_needed:
                # d loss / d logits = (softmax − one-hot) / denominator; softmax − one-hot replaces the logits in place.
                part.scatter_add_(1, target, torch.full_like(chosen, -1.0))
                grads.add(slice(start, start + rows), hidden, part, columns)
        ctx.grads, ctx.gradient_sink = grads.of_inputs(weights, biases), gradient_sink
        ctx.shapes = [
            (table.shape, table.dtype, table.device) if needed and table is not None else None
            for table, needed in zip(tables, ctx.needs_input_grad[5:])
        ]
        return total / denominator

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.grads is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated once; its gradients are freed then.")
        grad_hidden, *grads = ctx.grads
        ctx.grads = None
        scaled = [None if grad is None else grad.mul_(grad_output.to(grad.dtype)) for grad in grads]
        for index, shape in enumerate(ctx.shapes):
            if shape is not None and scaled[index] is None:
                # Without any label the gradient is zero instead of None, so that every rank has one to reduce.
                scaled[index] = torch.zeros(shape[0], dtype=shape[1], device=shape[2])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_output.to(grad_hidden.dtype))
        if ctx.gradient_sink is not None:
            ctx.gradient_sink["grad"], scaled[-2] = scaled[-2], None
        return grad_hidden, None, None, None, None, *scaled


# The number of parts depends on the labels, so torch.compile breaks its graph here, once.
_apply = torch.compiler.disable(_ChunkedCrossEntropy.apply)


class _Gradients:
    """Gradients of hidden states, weights and biases, added up part by part; None where they are not needed.

    The denominator divides hidden states and their gradients, never a tensor of vocabulary width.
    """

    def __init__(self, hidden_states, heads, denominator, dtype, needs_hidden, needs_weight, needs_bias):
        self.heads, self.denominator, self.dtype = heads, denominator, dtype
        self.needs_weight, self.needs_bias = needs_weight, needs_bias
        self.any_needed = needs_hidden or any(needs_weight) or any(needs_bias)
        self.hidden = torch.empty_like(hidden_states) if needs_hidden else None
        self.weights: list[torch.Tensor | None] = [None] * len(heads)
        self.biases: list[torch.Tensor | None] = [None] * len(heads)

    def add(self, rows: slice, hidden: torch.Tensor, logits: torch.Tensor, columns: list[slice]) -> None:
        """Adds the gradients of some rows; `logits` holds softmax − one-hot."""
        scaled = (hidden / self.denominator).to(self.dtype) if any(self.needs_weight) else None
        summed = None
        for index, (head, place) in enumerate(zip(self.heads, columns)):
            grad = logits[:, place].to(self.dtype)
            if self.hidden is not None:
                summed = grad @ head if summed is None else summed.addmm_(grad, head)
            if self.needs_weight[index]:
                weight = self.weights[index]
                if weight is None:
                    self.weights[index] = (grad.t() @ scaled).float()
                elif self.dtype == torch.float32:
                    weight.addmm_(grad.t(), scaled)
                else:
                    weight += grad.t() @ scaled
            if self.needs_bias[index]:
                here, bias = logits[:, place].sum(0) / self.denominator, self.biases[index]
                self.biases[index] = here if bias is None else bias + here
        if self.hidden is not None:
            self.hidden[rows] = summed / self.denominator

    def of_inputs(self, weights, biases) -> list[torch.Tensor | None]:
        """The gradient of the hidden states, then of each weight and bias, each in the dtype of its tensor."""
        found = [self.hidden]
        for weight, bias, grad_weight, grad_bias in zip(weights, biases, self.weights, self.biases):
            found.append(None if grad_weight is None else grad_weight.to(weight.dtype))
            found.append(None if grad_bias is None else grad_bias.to(bias.dtype))
        return found


def split_cross_entropy(
    hidden_states: torch.Tensor,
    tables: list[tuple[torch.Tensor, torch.Tensor | None]],
    labels: torch.Tensor,
    ignore_index: int = -100,
    num_items: torch.Tensor | int | None = None,
    gradient_sink: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of the softmax over the rows of several tables, in their order.

    Args:
        hidden_states: `(rows, hidden)`.
        tables: pairs `(weight (vocab_i, hidden), bias (vocab_i,) or None)`.
        labels: `(rows,)`; labels equal to `ignore_index` do not count.
        num_items: divisor of the sum; None takes the number of labels that count.
        gradient_sink: receives the gradient of the last table's weight under "grad", and autograd receives none: a lookup in
            the same (tied) table, which is differentiated later, returns the sum of both gradients.

    Returns:
        Scalar float32, 0 where no label counts; it can be differentiated once. Matrix products have the dtype of
        `hidden_states` or of autocast, the softmax is float32.
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
        return _apply(hidden_states, labels, count, dtype, gradient_sink, *flat)


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
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
        Scalar float32, 0 where no label counts; it can be differentiated once.
    """
    return split_cross_entropy(hidden_states, [(weight, bias)], labels, ignore_index)
