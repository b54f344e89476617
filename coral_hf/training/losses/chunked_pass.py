"""One pass over the vocabulary for all terms that compare the drafter's distribution with the target's.

It never stores the logits of a whole batch. It processes chunks of rows and computes the gradient with respect to the
drafter's output in the same pass, so that only one chunk of fp32 logits exists at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


# computes logits of [M, H] features, optionally only for some rows of the head: [M, V] or [M, A]
LogitsFunction = Callable[..., torch.Tensor]


@dataclass
class Chunk:
    """Distributions of the target and of the drafter over A tokens of C rows, in one step.

    Args:
        p (`torch.Tensor` of shape `[C, A]`): the target's.
        q (`torch.Tensor` of shape `[C, A]`): the drafter's.
        logits (`torch.Tensor` of shape `[C, A]`): the drafter's.
        normaliser (`torch.Tensor` of shape `[C]`): logsumexp of the logits, so that log q = logits - normaliser.
        cross_entropy (`torch.Tensor` of shape `[C]`): -sum p log q.
    """

    p: torch.Tensor
    q: torch.Tensor = field(init=False)
    logits: torch.Tensor = field(init=False)
    normaliser: torch.Tensor = field(init=False)
    cross_entropy: torch.Tensor = field(init=False)
    _top: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _entropy: torch.Tensor | None = None

    def target_top(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's most likely tokens: their p and their indices among the A, both `[C, count]`. Computed once."""
        if count not in self._top:
            p, places = self.p.topk(min(count, self.p.shape[-1]), dim=-1)
            self._top[count] = p, places
        return self._top[count]

    def target_entropy(self) -> torch.Tensor:
        """-sum p log p, `[C]`. Computed once for all steps."""
        if self._entropy is None:
            self._entropy = torch.special.entr(self.p).sum(dim=-1)
        return self._entropy


# (chunk, arguments, gradient) -> a value for each row, [C]. `gradient` is None, or a [C, A] that the function fills with the
# value's gradient with respect to the drafter's logits. It may be `chunk.q` itself: read that before the last write.
Comparison = Callable[[Chunk, Any, torch.Tensor | None], torch.Tensor]


@dataclass
class PassResult:
    """Result of [`chunked_pass`].

    Args:
        means (`dict` of `torch.Tensor` of shape `[K]`): each comparison's mean over the rows of a step, differentiable with
            respect to the drafter's output if its gradient was requested.
        match (`torch.BoolTensor` of shape `[K, M]`): whether the drafter's argmax equals the target's, in valid rows.
    """

    means: dict[Comparison, torch.Tensor]
    match: torch.Tensor


def default_chunk_size(device_type: str, vocab_size: int) -> int:
    """Rows per chunk: few on a CPU, so that logits stay in its caches; elsewhere enough for large products."""
    return 256 if device_type == "cpu" else max(1, min(2048, 2**28 // vocab_size))


class _GradientFromForward(torch.autograd.Function):
    """K values whose gradient with respect to `hidden` `[K, M, H]` is already computed."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype)[:, None, None], None, None


class _ChunkMemory:
    """Tensors that every chunk reuses, because allocating memory on a CPU costs more than a pass over it.

    Args:
        rows (`int`): rows of the largest chunk.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self.tensors: dict[str, torch.Tensor] = {}

    def like(self, name: str, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised `[C, A]` with the shape of `values`, and its dtype unless another is given."""
        if name not in self.tensors:
            size = (self.rows, values.shape[1])
            self.tensors[name] = torch.empty(size, dtype=dtype or values.dtype, device=values.device)
        return self.tensors[name][: len(values)]

    def cast(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values in a dtype, without a copy if they already have it."""
        return values if values.dtype == dtype else self.like(name, values, dtype).copy_(values)


def chunked_pass(
    hidden: torch.Tensor,
    target_features: torch.Tensor,
    logits_fn: LogitsFunction,
    comparisons: Mapping[Comparison, bool],
    args: Any = None,
    *,
    valid: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    logit_offsets: torch.Tensor | None = None,
    chunk_size: int = 256,
) -> PassResult:
    """Means over M rows of comparisons between the target's distribution p and the drafter's q in K steps.

    All steps predict the same rows, so that one pass of the target's head is enough.

    Args:
        hidden (`torch.Tensor` of shape `[K, M, H]`): the drafter's outputs.
        target_features (`torch.Tensor` of shape `[M, H]`): the target's features at the same positions.
        logits_fn: `TargetAdapter.logits`; frozen, its weights get no gradient.
        comparisons (`Mapping`): the comparisons to compute, and whether each needs its gradient.
        args: passed to the comparisons.
        valid (`torch.BoolTensor` of shape `[K, M]`, *optional*): which rows of each step count; defaults to all.
        token_ids (`torch.LongTensor` of shape `[A]`, *optional*): compare p and q on these tokens only, both
            renormalised (cheaper; the default, the whole vocabulary, is exact).
        logit_offsets (`torch.Tensor` of shape `[A]`, *optional*): added to both logits. With log(1 / sampling
            probability), sampled tokens represent all tokens that they were drawn from.
        chunk_size (`int`): rows whose logits exist at the same time.

    Returns:
        [`PassResult`]
    """
    steps, rows = hidden.shape[:2]
    if rows == 0:
        zero = hidden.sum(dim=(1, 2)) * 0.0
        return PassResult(dict.fromkeys(comparisons, zero), hidden.new_zeros(steps, 0, dtype=torch.bool))
    if valid is None:
        valid = torch.ones(steps, rows, dtype=torch.bool, device=hidden.device)
    # float64 inputs stay float64, so that gradients can be checked exactly
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kwargs = {} if token_ids is None else {"token_ids": token_ids}
    trains = hidden.requires_grad and torch.is_grad_enabled()
    source = hidden.detach()
    gradients = {each: torch.empty_like(source) for each, needed in comparisons.items() if needed and trains}
    # the last gradient overwrites q
    order = sorted(comparisons, key=lambda each: each in gradients)
    scale = valid.to(dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)  # [K, M]: the weight of each row
    values = {each: torch.zeros(steps, rows, dtype=dtype, device=hidden.device) for each in comparisons}
    match = torch.empty(steps, rows, dtype=torch.bool, device=hidden.device)
    memory = _ChunkMemory(min(chunk_size, rows))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, chunk_size):
            part = slice(start, min(start + chunk_size, rows))
            with torch.no_grad():
                logits = memory.cast("logits", logits_fn(target_features[part], **kwargs), dtype)  # [C, A]
                # before the offsets, which raise a sampled token by all tokens that it represents
                target_best = logits.argmax(dim=-1)
                if logit_offsets is not None:
                    logits = logits + logit_offsets
                chunk = Chunk(torch.softmax(logits, dim=-1, out=memory.like("p", logits)))
                del logits
            for step in range(steps):
                with torch.set_grad_enabled(bool(gradients)):
                    inputs = source[step, part].requires_grad_(bool(gradients))
                    raw = logits_fn(inputs, **kwargs)  # [C, A]
                with torch.no_grad():
                    logits = memory.cast("logits", raw.detach(), dtype)
                    match[step, part] = logits.argmax(dim=-1) == target_best
                    _read_drafter(chunk, logits if logit_offsets is None else logits + logit_offsets, memory)
                    del logits
                for each in order:
                    gradient = None
                    if each in gradients:
                        gradient = chunk.q if each is order[-1] else memory.like("gradient", chunk.q)
                    with torch.no_grad():
                        values[each][step, part] = each(chunk, args, gradient)
                        if gradient is None:
                            continue
                        delta = memory.cast("delta", gradient, raw.dtype)
                    (of_rows,) = torch.autograd.grad(raw, inputs, delta, retain_graph=each is not order[-1])
                    gradients[each][step, part] = of_rows * scale[step, part, None]
                del raw, chunk.logits
    means = {each: (value.masked_fill_(~valid, 0.0) * scale).sum(dim=-1) for each, value in values.items()}
    for each, gradient in gradients.items():
        gradient.masked_fill_(~valid[..., None], 0.0)  # outputs of other rows are arbitrary and may be NaN
        means[each] = _GradientFromForward.apply(hidden, means[each], gradient)
    return PassResult(means, match & valid)


def _read_drafter(chunk: Chunk, logits: torch.Tensor, memory: _ChunkMemory) -> None:
    """Sets a chunk's values for the drafter in one step."""
    q = memory.like("q", logits)
    expected = torch.mul(chunk.p, logits, out=q).sum(dim=-1)
    torch.softmax(logits, dim=-1, out=q)
    # logsumexp from the largest q, which is exp(largest logit - logsumexp)
    normaliser = logits.amax(dim=-1) - q.amax(dim=-1).log()
    # sum_x p (logsumexp - logit) = -sum_x p log q, as p sums to 1
    chunk.q, chunk.logits, chunk.normaliser, chunk.cross_entropy = q, logits, normaliser, normaliser - expected


__all__ = ["Chunk", "Comparison", "LogitsFunction", "PassResult", "chunked_pass", "default_chunk_size"]
