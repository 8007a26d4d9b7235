"""Dropout whose masks depend on the step and on the place of each row, not on how a batch is cut into micro-batches.

Element x of row r is dropped where a hash of (seed, step, number of the dropout call, place of r in the global batch, coordinates of
x within the row) is below p · 2**32. A counter-based generator, as Philox is (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3"), of a few integer operations that give the same bits on every device. The coordinates do not depend on the padded width.

`RowDropout` is a mode that replaces `torch.nn.functional.dropout` and attention with dropout while it is active, so it covers the models
of transformers, PEFT's adapters and a user's own.
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
_GOLDEN = 0x9E3779B9 - 2**32
_M1, _M2 = 0x7FEB352D, 0x846CA68B - 2**32
_CHUNK = 2**24
"""Elements hashed at a time: bounds the memory for the integers, 8 bytes an element."""
_active: list[RowDropout] = []
"""The modes that are active, innermost last. Not thread-local, unlike the modes themselves."""
_reported: set[str] = set()
_BY_MICRO = "are drawn for each micro-batch, so the run depends on batch.micro_size and the number of workers"
_UNUSED = ("summary_", "classifier_")
"""Dropout in the configs of transformers that belongs to heads which are not built here."""


def _mix(h: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the input changes half of the output's (lowbias32, Wellons, 2018)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def _indices(count: int, device: torch.device) -> Tensor:
    """(count,) int32: a mixed word for each index, the same for an index whatever the count."""
    return _mix(torch.arange(1, count + 1, device=device, dtype=torch.int32) * _GOLDEN)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def dropped(key: int, rows: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """Which elements of a tensor are dropped: bool, of `shape`.

    Args:
        key: of the call, 64 bits.
        rows: (n,) places of the rows in the global batch, n = shape[0].
        shape: of the tensor; its first dimension is rows.
        p: in [0, 1): the probability, rounded to a multiple of 2**-32.
    """
    h = _mix(_mix(rows.to(torch.int32) * _GOLDEN + _signed(key & 0xFFFFFFFF)) ^ _signed(key >> 32 & 0xFFFFFFFF))
    for size in shape[1:-1]:  # every dimension but the last: little work
        h = _mix(h[..., None] + _indices(size, rows.device))
    last = _indices(shape[-1] if len(shape) > 1 else 1, rows.device)
    h, out = h[..., None], torch.empty((*shape[:-1], len(last)) if len(shape) > 1 else (*shape, 1), dtype=torch.bool, device=rows.device)
    threshold = round(p * 2**32) - 2**31
    step = max(1, _CHUNK // max(1, out[0].numel())) if len(out) else 1
    for first in range(0, len(out), step):
        # Both words are mixed already, so one round less than `_mix` is enough; the comparison looks at the upper bits. In place: the
        # number of passes over memory is the cost.
        part = h[first : first + step] ^ last
        part.mul_(_M1)
        part.bitwise_xor_(part >> 15)
        part.mul_(_M2)
        torch.lt(part, threshold, out=out[first : first + step])
    return out.view(shape)


class RowDropout(TorchFunctionMode):
    """While active, dropout draws by row.

    Modes belong to a thread. The forward pass runs in the thread that enters this; a recomputation in the backward pass runs in
    autograd's thread of the device, and enters its own through `checkpoint_contexts`.

    Args:
        key: of the step.
        rows: (n,) places of the rows of the forward pass in the global batch; None: not known.
        width: tokens in a row, to recognise tensors of (n · width, ...) tokens.
        calls: dropout calls before this.
    """

    def __init__(self, key: int, rows: Tensor | None, width: int | None = None, calls: int = 0):
        super().__init__()
        self._key, self._rows, self._width, self._first = key, rows, width, calls
        self.calls = calls
        self._in_checkpoint = False

    def __enter__(self) -> RowDropout:
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
        """`x` with dropout; None: this mode can't, and has reported why."""
        shape, rows = self._by_row(x), self._rows
        if shape is None or rows is None:
            return None
        self.calls += 1
        if p >= 1:
            return x.mul_(0) if inplace else x * 0
        mask = dropped(derive_seed("dropout call", self._key, self.calls), rows, shape, p).view(x.shape)
        if inplace:
            return x.masked_fill_(mask, 0).mul_(1 / (1 - p))
        return torch.where(mask, 0, x) * (1 / (1 - p))

    def _by_row(self, x: Tensor) -> tuple[int, ...] | None:
        """The shape of `x` with rows as its first dimension."""
        if not self._in_checkpoint and _in_checkpoint():
            _fall_back("inside activation checkpointing of the model's own (use accelerator.activation_checkpointing instead)")
            return None
        if self._rows is None:
            _fall_back("without the places of the rows (`places` in the micro-batch)")
            return None
        n = len(self._rows)
        if x.dim() and len(x) == n:
            return tuple(x.shape)
        if x.dim() > 1 and self._width is not None and len(x) == n * self._width:
            return (n, self._width, *x.shape[1:])
        _fall_back("on a tensor whose rows can't be told apart", f", of shape {tuple(x.shape)} in a micro-batch of {n} rows")
        return None

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        outer, self._in_checkpoint = self._in_checkpoint, True
        try:
            yield
        finally:
            self._in_checkpoint = outer

    def again(self) -> RowDropout:
        """A mode that draws what this one draws from here on."""
        mode = RowDropout(self._key, self._rows, self._width, self.calls)
        mode._in_checkpoint = True
        return mode


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `context_fn` of `torch.utils.checkpoint.checkpoint`: the recomputation draws the masks of the forward pass.

    Function modes are thread-local, and on CUDA the recomputation runs in another thread: it has to enter a mode itself.
    """
    if not _active:
        return nullcontext(), nullcontext()
    return _active[-1]._checkpointed(), _active[-1].again()


def _in_checkpoint() -> bool:
    """Whether a forward pass is one that will be recomputed: torch restores its own random numbers then, not the calls counted here."""
    if not torch.is_grad_enabled():  # so runs the forward pass of a reentrant checkpoint
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


def _fall_back(why: str, details: str = "") -> None:
    """Reports, once a reason, that torch's own dropout is used."""
    if why not in _reported and distributed.is_main():
        log.warning("dropout %s%s: its masks %s", why, details, _BY_MICRO)
    _reported.add(why)


def _dropout(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    def bound(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None) -> Any:
        if p == 0 or not (training if train is None else train):
            return None
        return mode.drop(input, p, inplace or func is torch.dropout_)

    result = bound(*args, **kwargs)
    return func(*args, **kwargs) if result is None else result


def _attention(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    def bound(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> Tensor | None:
        if dropout_p == 0:
            return None
        # No fused kernel takes a mask of its own choice for the weights, so they are written out: (B, heads, S, S).
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        # Rows without any key give zeros, as in torch's attention.
        weights = mode.drop(torch._safe_softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(value.dtype), dropout_p)
        return None if weights is None else weights @ value

    result = bound(*args, **kwargs)
    return func(*args, **kwargs) if result is None else result


def _unsupported(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    _fall_back(f"by {func.__name__}")
    return func(*args, **kwargs)


def _multi_head_attention(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    """`nn.MultiheadAttention`. Its dropout is called inside torch's function, where no mode is active."""
    given = inspect.signature(func).bind(*args, **kwargs)
    if given.arguments["dropout_p"] > 0 and given.arguments.get("training", True):
        _fall_back("inside nn.MultiheadAttention (functional.scaled_dot_product_attention has masks by row)")
    return func(*args, **kwargs)


def _recurrent(mode: RowDropout, func: Any, args: Any, kwargs: Any) -> Any:
    """`nn.LSTM`, `nn.GRU` and `nn.RNN` pass (..., dropout, train, ...) to one kernel for all layers."""
    if any(isinstance(p, float) and p > 0 and train is True for p, train in itertools.pairwise(args)):
        _fall_back(f"between the layers of {func.__name__}")
    return func(*args, **kwargs)


_REPLACED: dict[Any, Callable[[RowDropout, Any, Any, Any], Any]] = {
    functional.dropout: _dropout, torch.dropout: _dropout, torch.dropout_: _dropout,
    functional.scaled_dot_product_attention: _attention, functional.multi_head_attention_forward: _multi_head_attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((functional.alpha_dropout, functional.feature_alpha_dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
                     torch.native_dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout), _unsupported)}


def find_dropout(model: nn.Module) -> str | None:
    """Where a model has dropout, such as `transformer.drop.p=0.1`; None: nowhere that a module says so."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            named = key == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in key
            if named and isinstance(value, float) and value > 0:
                return f"{name}.{key}={value:g}".lstrip(".")
    return None


def _configured(configs: list[Any]) -> bool:
    """Whether a config of transformers names dropout that no module holds as a number."""
    return any("drop" in key and not key.startswith(_UNUSED) and isinstance(value, float) and value > 0
               for config in configs for key, value in config.to_dict().items())


def _warn_of_other_randomness(model: nn.Module) -> None:
    """LayerDrop and the jitter of routers draw from torch's generators."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if ("layerdrop" in key or "jitter" in key) and isinstance(value, float) and value > 0 and distributed.is_main():
                log.warning("%s: its random numbers %s", f"{name}.{key}={value:g}".lstrip("."), _BY_MICRO)


class StepDropout:
    """Makes the modes of a run's micro-batches.

    Args:
        model: without dropout nothing is installed. A model that is not of transformers may call dropout without naming it anywhere:
            it always gets the mode.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, seed: int):
        configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")]
        self._seed, self.active = seed, not configs or find_dropout(model) is not None or _configured(configs)
        _warn_of_other_randomness(model)

    def microbatch(self, step: int, rows: Tensor | None, input_ids: Tensor | None) -> AbstractContextManager[Any]:
        """Around the forward pass of a micro-batch.

        Args:
            step: the same for all micro-batches of an optimizer step.
            rows: see `RowDropout`.
            input_ids: (rows, tokens) of the micro-batch.
        """
        if not self.active:
            return nullcontext()
        width = input_ids.shape[1] if input_ids is not None and rows is not None and len(input_ids) == len(rows) else None
        return RowDropout(derive_seed("dropout", self._seed, step), rows, width)
