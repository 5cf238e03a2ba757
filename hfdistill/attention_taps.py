"""Pre-softmax attention scores, queries, keys and values of chosen blocks, while every other block stays on SDPA.

Transformers returns attention maps only under the eager implementation, after softmax and after dropout, for every
layer at once; under SDPA it returns an empty tuple. Two taps get around that:

* `InterfaceTap` registers an attention function with `AttentionInterface`. It runs SDPA as usual and, for mapped
  modules only, keeps the very tensors that SDPA saw (after RoPE) or `q k^T * scaling` of them (grouped heads repeated).
* `SoftmaxTap` is for models that know only their own eager attention (DeBERTa-v2, MPNet): while a mapped block runs, a
  `TorchFunctionMode` looks at the calls of softmax and keeps the input. It sees scores only.

Both leave the model's output exactly as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .signals import ATTENTION_SIGNALS


IMPLEMENTATION = "hfdistill_sdpa"

# Keyed by module object: many attention modules have no `layer_idx`. Weak, so that a tap never keeps a model alive and
# never travels with `copy.deepcopy(model)` or a state dict.
_TAPS: weakref.WeakKeyDictionary[nn.Module, InterfaceTap] = weakref.WeakKeyDictionary()

Found = dict[str, dict[int, Tensor]]
"""Signal -> block -> tensor."""


def _tapped_attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, is_causal=None, **kwargs):
    kwargs.pop("output_attentions", None)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, is_causal=is_causal, **kwargs
    )
    tap = _TAPS.get(module)
    if tap is not None:
        tap.see(module, query, key, value, attention_mask, scaling, position_bias, is_causal)
    return output, None


AttentionInterface.register(IMPLEMENTATION, _tapped_attention)
# Without its mask function an unknown implementation would silently get no mask at all.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class InterfaceTap:
    """Takes its signals where the model calls `AttentionInterface`; finds the modules by one forward pass (`discover`)."""

    signals = ATTENTION_SIGNALS

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: list[nn.Module] = []  # block -> attention module, in order of execution
        self.wanted: dict[str, frozenset[int]] = {}
        self.recording = False
        self.on_seen: Callable[[int], None] | None = None  # told each block whose signals are complete
        self._discovering = False
        self._calls = 0
        self.found: Found = {}
        self.masks: dict[int, Tensor | None] = {}

    def discover(self, run) -> bool:
        """Calls `run()` once and lists the attention modules it passes through; False when there are none."""
        if not getattr(self.model, "_can_set_attn_implementation", lambda: True)():
            return False
        self.previous = self.model.config._attn_implementation
        candidates = [module for module in self.model.modules() if module is not self.model]
        try:
            self.model.set_attn_implementation(IMPLEMENTATION)
        except (ValueError, ImportError):
            return False
        for module in candidates:
            _TAPS[module] = self
        self._discovering = True
        try:
            run()
        finally:
            self._discovering = False
            for module in candidates:
                _TAPS.pop(module, None)
        if not self.modules:
            self.model.set_attn_implementation(self.previous)
            return False
        for module in self.modules:
            _TAPS[module] = self
        return True

    @property
    def count(self) -> int:
        """How many attentions one forward pass runs."""
        return len(self.modules)

    @property
    def shared(self) -> bool:
        """One module runs as several blocks (ALBERT)."""
        return len(set(map(id, self.modules))) < len(self.modules)

    def pattern(self, block: int) -> tuple[bool, int | None]:
        """`(causal, window)` of a block: query `i` sees key `j` where `|i - j| < window`, and `j <= i` if causal."""
        module = self.modules[block]
        return bool(getattr(module, "is_causal", False)), getattr(module, "sliding_window", None)

    def see(self, module, query, key, value, attention_mask, scaling, position_bias, is_causal) -> None:
        if self._discovering:
            self.modules.append(module)
            return
        if self.shared:
            if not self.recording:
                return
            block, self._calls = self._calls, self._calls + 1
        else:
            block = next(i for i, other in enumerate(self.modules) if other is module)
        # Also when not recording: gradient checkpointing runs this again in backward and must see the same operations.
        for signal, tensor in (("queries", query), ("keys", key), ("values", value)):
            if block in self.wanted.get(signal, ()):
                tensor = tensor.transpose(1, 2).flatten(2)
                if self.recording:
                    self.found[signal][block] = tensor
        if block in self.wanted.get("attention_scores", ()):
            self._keep_scores(block, module, query, key, attention_mask, scaling, position_bias, is_causal)
        if self.on_seen is not None and self.recording and any(block in blocks for blocks in self.wanted.values()):
            self.on_seen(block)

    def _keep_scores(self, block, module, query, key, attention_mask, scaling, position_bias, is_causal) -> None:
        key = repeat_kv(key, getattr(module, "num_key_value_groups", 1))
        # The queries are scaled, not the scores, which are many more numbers.
        scores = (query * (query.size(-1) ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and attention_mask is None and query.size(2) > 1
        if position_bias is not None:
            attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
            scores = scores + position_bias
        elif causal:
            attention_mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
        if self.recording:
            self.found["attention_scores"][block], self.masks[block] = scores, attention_mask

    def open(self, wanted: dict[str, frozenset[int]]) -> None:
        """Starts recording these blocks of these signals."""
        self.wanted, self.recording, self._calls = wanted, True, 0
        self.found, self.masks = {signal: {} for signal in wanted}, {}

    def close(self) -> tuple[Found, dict[int, Tensor | None]]:
        """Stops recording and hands over what was seen, with the masks of the scores; no tensor stays behind."""
        self.recording, self.on_seen = False, None
        found, masks, self.found, self.masks = self.found, self.masks, {}, {}
        return found, masks

    def rest(self) -> None:
        self.wanted = {}

    def remove(self) -> None:
        for module in self.modules:
            _TAPS.pop(module, None)
        self.model.set_attn_implementation(self.previous)


class _KeepSoftmaxInput(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.softmax, torch.softmax, Tensor.softmax) and args and args[0].dim() == 4:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


class SoftmaxTap:
    """Takes the input of the one 4-d softmax inside each mapped block; the scores of masked keys carry the mask value."""

    shared = False
    signals = ("attention_scores",)

    def __init__(self, blocks: list[nn.Module]):
        self.blocks = blocks
        self.wanted: frozenset[int] = frozenset()
        self.recording = False
        self.scores: dict[int, Tensor] = {}
        self._modes: dict[int, _KeepSoftmaxInput] = {}
        self._handles = []
        for block, module in enumerate(blocks):
            self._handles.append(module.register_forward_pre_hook(lambda *_, block=block: self._enter(block)))
            self._handles.append(module.register_forward_hook(lambda *_, block=block: self._exit(block), always_call=True))

    @property
    def count(self) -> int:
        return len(self.blocks)

    def pattern(self, block: int) -> tuple[bool, int | None]:
        return False, None

    def _enter(self, block: int) -> None:
        if self.recording and block in self.wanted:
            self._modes[block] = _KeepSoftmaxInput()
            self._modes[block].__enter__()

    def _exit(self, block: int) -> None:
        mode = self._modes.pop(block, None)
        if mode is not None:
            mode.__exit__(None, None, None)
            if len(mode.inputs) == 1:
                self.scores[block] = mode.inputs[0]

    def open(self, wanted: dict[str, frozenset[int]]) -> None:
        self.wanted, self.recording, self.scores = wanted["attention_scores"], True, {}

    def close(self) -> tuple[Found, dict[int, Tensor | None]]:
        self.recording = False
        scores, self.scores = self.scores, {}
        return {"attention_scores": scores}, dict.fromkeys(scores)

    def rest(self) -> None:
        self.wanted = frozenset()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def attach_tap(model: PreTrainedModel, run, blocks) -> InterfaceTap | SoftmaxTap | None:
    """The tap that fits `model`; `None` where its attention cannot be seen.

    Args:
        model: whose attention implementation is switched.
        run: a function that makes one forward pass.
        blocks: a function that gives the blocks of `model`; called only where the attention interface is not used.
    """
    tap = InterfaceTap(model)
    if tap.discover(run):
        return tap
    softmax = SoftmaxTap(blocks())
    softmax.open({"attention_scores": frozenset(range(softmax.count))})
    try:
        run()
    finally:
        found, _ = softmax.close()
    if len(found["attention_scores"]) != softmax.count:
        softmax.remove()
        return None
    return softmax


def allowed_pairs(scores: Tensor, mask: Tensor | None, tokens: Tensor | None) -> Tensor:
    """bool `(batch, 1, queries, keys)`: real query, real key, and not hidden by causality or a window."""
    shape = (scores.size(0), 1, scores.size(2), scores.size(3))
    allowed = torch.ones(shape, dtype=torch.bool, device=scores.device)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = mask[..., : shape[-1]]
        allowed = allowed & (mask[:, :1] if mask.dim() == 4 else mask)
    if tokens is not None:
        allowed = allowed & tokens[:, None, :, None] & tokens[:, None, None, :]
    return allowed
