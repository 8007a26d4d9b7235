"""Dropout with masks that depend on the step and the index of each row, not on the split of a batch into micro-batches.

Element x of row r is dropped if a hash of (seed, step, index of the dropout call, index of r in the global batch,
coordinates of x within the row) is less than p · 2**32. The hash is a counter-based generator like Philox (Salmon et
al., 2011, "Parallel random numbers: as easy as 1, 2, 3"). It consists of a few integer operations, which return the
same bits on every device. The coordinates do not depend on the padded width.

`RowDropout` is a torch function mode. While it is active, it replaces `torch.nn.functional.dropout` and attention with
dropout, so it applies to models of transformers, PEFT adapters and custom models.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from myllm_ray.common import distributed
from myllm_ray.common.seeds import derive_seed

log = logging.getLogger(__name__)
# Constants of the hash, as signed 32-bit integers: torch has no complete arithmetic for uint32.
_GOLDEN = 0x9E3779B9 - 2**32
_M1, _M2 = 0x7FEB352D, 0x846CA68B - 2**32
_CHUNK = 2**24
"""Number of elements hashed at a time. Bounds the memory for the integers, 8 bytes per element."""
_active: list[RowDropout] = []
"""The active modes, innermost last. This list is shared by all threads, while torch's mode stack is thread-local."""
_reported: set[str] = set()
_BY_MICRO = "are drawn for each micro-batch, so the run depends on batch.micro_size and the number of workers"
_UNUSED = ("summary_", "classifier_")
"""Prefixes of dropout options in transformers configs that belong to heads which are not built here."""


def _mix(h: Tensor) -> Tensor:
    """Returns a bijective hash of int32 values: each input bit flips about half of the output bits.

    Source: lowbias32 (Wellons, 2018).
    """
    # The bit masks turn the arithmetic right shift of int32 into a logical one.
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def _indices(count: int, device: torch.device) -> Tensor:
    """Returns a hash (count,) int32 of each index. The hash of an index does not depend on `count`."""
    return _mix(torch.arange(1, count + 1, device=device, dtype=torch.int32) * _GOLDEN)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def dropped(key: int, rows: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """Returns a bool tensor of shape `shape` that is true at the dropped elements.

    Args:
        key: 64-bit key of the dropout call.
        rows: (n,) indices of the rows in the global batch, n = shape[0].
        shape: Shape of the tensor. The first dimension is rows.
        p: Dropout probability in [0, 1), rounded to a multiple of 2**-32.
    """
    h = _mix(_mix(rows.to(torch.int32) * _GOLDEN + _signed(key & 0xFFFFFFFF)) ^ _signed(key >> 32 & 0xFFFFFFFF))
    for size in shape[1:-1]:  # all dimensions but the last: few elements
        h = _mix(h[..., None] + _indices(size, rows.device))
    last = _indices(shape[-1] if len(shape) > 1 else 1, rows.device)
    h, out = (
        h[..., None],
        torch.empty((*shape[:-1], len(last)) if len(shape) > 1 else (*shape, 1), dtype=torch.bool, device=rows.device),
    )
    # The words are signed, so the threshold is shifted by 2**31.
    threshold = round(p * 2**32) - 2**31
    step = max(1, _CHUNK // max(1, out[0].numel())) if len(out) else 1
    for first in range(0, len(out), step):
        # Both words are hashed already and the comparison depends mostly on the upper bits, so a shorter hash than
        # `_mix` is sufficient. Operations are in place, because the number of passes over memory determines the cost.
        part = h[first : first + step] ^ last
        part.mul_(_M1)
        part.bitwise_xor_(part >> 15)
        part.mul_(_M2)
        torch.lt(part, threshold, out=out[first : first + step])
    return out.view(shape)


class RowDropout(TorchFunctionMode):
    """A torch function mode in which dropout masks are computed per row.

    Function modes are thread-local. The forward pass runs in the thread that enters this mode. A recomputation in the
    backward pass runs in the autograd thread of the device, and enters a separate mode through `checkpoint_contexts`.

    Args:
        key: Key of the step.
        rows: (n,) indices in the global batch of the rows of the forward pass; None if unknown.
        width: Number of tokens per row, to recognize tensors of shape (n · width, ...).
        calls: Number of preceding dropout calls in the forward pass.
    """

    def __init__(self, key: int, rows: Tensor | None, width: int | None = None, calls: int = 0):
        super().__init__()
        self._key, self._rows, self._width, self._first = key, rows, width, calls
        self.calls = calls
        self._in_checkpoint = False

    def __enter__(self) -> RowDropout:
        # A recomputation may enter the mode more than once, and must draw the same masks each time.
        self.calls = self._first
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.remove(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replace = _REPLACED.get(func)
        return func(*args, **(kwargs or {})) if replace is None else replace(self, func, args, kwargs or {})

    def drop(self, x: Tensor, p: float, inplace: bool = False) -> Tensor | None:
        """Returns `x` with dropout applied, or None if masks per row are not possible.

        In the second case, the reason is logged.
        """
        shape, rows = self._by_row(x), self._rows
        if shape is None or rows is None:
            return None
        self.calls += 1
        if p >= 1:  # the scale 1 / (1 - p) is infinite
            return x.mul_(0) if inplace else x * 0
        # The counter gives each dropout layer of a forward pass a different mask.
        mask = dropped(derive_seed("dropout call", self._key, self.calls), rows, shape, p).view(x.shape)
        if inplace:
            return x.masked_fill_(mask, 0).mul_(1 / (1 - p))
        return torch.where(mask, 0, x) * (1 / (1 - p))

    def _by_row(self, x: Tensor) -> tuple[int, ...] | None:
        """Returns the shape of `x` with rows as its first dimension, or None if the rows can't be identified."""
        if not self._in_checkpoint and _in_checkpoint():
            _fall_back("inside built-in activation checkpointing (use accelerator.activation_checkpointing instead)")
            return None
        if self._rows is None:
            _fall_back("without the indices of the rows in the global batch (`places` in the micro-batch)")
            return None
        n = len(self._rows)
        if x.dim() and len(x) == n:
            return tuple(x.shape)
        if x.dim() > 1 and self._width is not None and len(x) == n * self._width:
            return (n, self._width, *x.shape[1:])
        _fall_back(
            "on a tensor whose rows can't be identified", f", of shape {tuple(x.shape)} in a micro-batch of {n} rows"
        )
        return None

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        outer, self._in_checkpoint = self._in_checkpoint, True
        try:
            yield
        finally:
            self._in_checkpoint = outer

    def again(self) -> RowDropout:
        """Returns a mode that draws the same masks as this mode from its current call on."""
        mode = RowDropout(self._key, self._rows, self._width, self.calls)
        mode._in_checkpoint = True
        return mode


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns contexts for the forward pass and the recomputation, so that both draw the same masks.

    This is a `context_fn` for `torch.utils.checkpoint.checkpoint`. Function modes are thread-local, and on CUDA the
    recomputation runs in another thread, so it has to enter a separate mode.
    """
    if not _active:
        return nullcontext(), nullcontext()
    return _active[-1]._checkpointed(), _active[-1].again()


def _in_checkpoint() -> bool:
    """Returns whether the forward pass will be recomputed by an activation checkpoint.

    A recomputation restores the state of torch's random number generators, but not the number of calls counted here.
    """
    if not torch.is_grad_enabled():  # the forward pass of a reentrant checkpoint runs without gradients
        return True
    # A non-reentrant checkpoint replaces the saved tensors by hooks; torch has no public way to query them.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


def _fall_back(why: str, details: str = "") -> None:
    """Logs a warning that torch's dropout is used instead, once per reason."""
    if why not in _reported and distributed.is_main():
        log.warning("dropout %s%s: its masks %s", why, details, _BY_MICRO)
    _reported.add(why)


def _dropout(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    def bound(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None
    ) -> Any:
        if p == 0 or not (training if train is None else train):
            return None
        return mode.drop(input, p, inplace or func is torch.dropout_)

    result = bound(*args, **kwargs)
    return func(*args, **kwargs) if result is None else result


def _attention(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    def bound(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if dropout_p == 0:
            return None
        # Fused kernels do not accept a dropout mask, so the attention weights (B, heads, S, S) are materialized.
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        # Scaling the query touches fewer elements than scaling the scores.
        scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        # _safe_softmax returns zeros for queries without keys, as torch's attention does.
        weights = mode.drop(
            torch._safe_softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(value.dtype), dropout_p
        )
        return None if weights is None else weights @ value

    result = bound(*args, **kwargs)
    return func(*args, **kwargs) if result is None else result


def _unsupported(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    _fall_back(f"by {func.__name__}")
    return func(*args, **kwargs)


def _multi_head_attention(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    """Handles `nn.MultiheadAttention`, which calls dropout inside a torch function, where no mode is active."""
    given = inspect.signature(func).bind(*args, **kwargs)
    if given.arguments["dropout_p"] > 0 and given.arguments.get("training", True):
        _fall_back("inside nn.MultiheadAttention (functional.scaled_dot_product_attention has masks by row)")
    return func(*args, **kwargs)


def _recurrent(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    """Handles `nn.LSTM`, `nn.GRU` and `nn.RNN`, which pass (..., dropout, train, ...) to one kernel for all layers."""
    if any(isinstance(p, float) and p > 0 and train is True for p, train in itertools.pairwise(args)):
        _fall_back(f"between the layers of {func.__name__}")
    return func(*args, **kwargs)


_REPLACED: dict[Any, Callable[[RowDropout, Any, Any, Any], Any]] = {
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout,
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head_attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys(
        (
            functional.alpha_dropout,
            functional.feature_alpha_dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.dropout3d,
            torch.native_dropout,
            torch.alpha_dropout,
            torch.feature_dropout,
            torch.feature_alpha_dropout,
        ),
        _unsupported,
    ),
}


def find_dropout(model: nn.Module) -> str | None:
    """Returns the first dropout attribute of a model, such as `transformer.drop.p=0.1`, or None."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            named = key == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in key
            if named and isinstance(value, float) and value > 0:
                return f"{name}.{key}={value:g}".lstrip(".")
    return None


def _configured(configs: list[Any]) -> bool:
    """Returns whether a transformers config enables dropout, which modules may read without storing it as a float."""
    return any(
        "drop" in key and not key.startswith(_UNUSED) and isinstance(value, float) and value > 0
        for config in configs
        for key, value in config.to_dict().items()
    )


def _warn_of_other_randomness(model: nn.Module) -> None:
    """Warns of LayerDrop and router jitter, which draw from torch's random number generators."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if (
                ("layerdrop" in key or "jitter" in key)
                and isinstance(value, float)
                and value > 0
                and distributed.is_main()
            ):
                log.warning("%s: its random numbers %s", f"{name}.{key}={value:g}".lstrip("."), _BY_MICRO)


class StepDropout:
    """Creates the dropout modes of a run's micro-batches.

    Args:
        model: Model of the run. If it has no dropout, no mode is used. A model that is not from transformers may call
            dropout without an attribute that shows it, so it always runs in the mode.
        seed: Seed of the run.
    """

    def __init__(self, model: nn.Module, seed: int):
        configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")]
        self._seed, self.active = seed, not configs or find_dropout(model) is not None or _configured(configs)
        _warn_of_other_randomness(model)

    def microbatch(self, step: int, rows: Tensor | None, input_ids: Tensor | None) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass of a micro-batch runs.

        Args:
            step: Number of the optimizer step, the same for all of its micro-batches.
            rows: See `RowDropout`.
            input_ids: (rows, tokens) token ids of the micro-batch.
        """
        if not self.active:
            return nullcontext()
        width = (
            input_ids.shape[1] if input_ids is not None and rows is not None and len(input_ids) == len(rows) else None
        )
        return RowDropout(derive_seed("dropout", self._seed, step), rows, width)
