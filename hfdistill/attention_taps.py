"""Pre-softmax attention scores of chosen blocks, while every other block stays on SDPA.

Transformers returns attention maps only under the eager implementation, after softmax and after dropout, for every
layer at once; under SDPA it returns an empty tuple. Two taps get around that:

* `InterfaceTap` registers an attention function with `AttentionInterface`. It runs SDPA as usual and, for mapped
  modules only, computes `q k^T * scaling` from the very tensors that SDPA saw (after RoPE, grouped heads repeated).
* `SoftmaxTap` is for models that know only their own eager attention (DeBERTa-v2, MPNet): while a mapped block runs, a
  `TorchFunctionMode` looks at the calls of softmax and keeps the input.

Both leave the model's output exactly as it was.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


IMPLEMENTATION = "hfdistill_sdpa"

# Keyed by module object: many attention modules have no `layer_idx`. Weak, so that a tap never keeps a model alive and
# never travels with `copy.deepcopy(model)` or a state dict.
_TAPS: weakref.WeakKeyDictionary[nn.Module, InterfaceTap] = weakref.WeakKeyDictionary()


def _tapped_attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, is_causal=None, **kwargs):
    kwargs.pop("output_attentions", None)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, is_causal=is_causal, **kwargs
    )
    tap = _TAPS.get(module)
    if tap is not None:
        tap.see(module, query, key, attention_mask, scaling, position_bias, is_causal)
    return output, None


AttentionInterface.register(IMPLEMENTATION, _tapped_attention)
# Without its mask function an unknown implementation would silently get no mask at all.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class InterfaceTap:
    """Takes scores where the model calls `AttentionInterface`; finds the modules by one forward pass (`discover`)."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: list[nn.Module] = []  # block -> attention module, in order of execution
        self.wanted: frozenset[int] = frozenset()
        self.recording = False
        self._discovering = False
        self._calls = 0
        self.scores: dict[int, Tensor] = {}
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
    def shared(self) -> bool:
        """One module runs as several blocks (ALBERT)."""
        return len(set(map(id, self.modules))) < len(self.modules)

    def pattern(self, block: int) -> tuple[bool, int | None]:
        """`(causal, window)` of a block: query `i` sees key `j` where `|i - j| < window`, and `j <= i` if causal."""
        module = self.modules[block]
        return bool(getattr(module, "is_causal", False)), getattr(module, "sliding_window", None)

    def see(self, module, query, key, attention_mask, scaling, position_bias, is_causal) -> None:
        if self._discovering:
            self.modules.append(module)
            return
        if self.shared:
            if not self.recording:
                return
            block, self._calls = self._calls, self._calls + 1
        else:
            block = next(i for i, other in enumerate(self.modules) if other is module)
        if block not in self.wanted:
            return
        # Also when not recording: gradient checkpointing runs this again in backward and must see the same operations.
        key = repeat_kv(key, getattr(module, "num_key_value_groups", 1))
        scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and attention_mask is None and query.size(2) > 1
        if position_bias is not None:
            attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
            scores = scores + position_bias
        elif causal:
            attention_mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
        if self.recording:
            self.scores[block], self.masks[block] = scores, attention_mask

    def open(self, wanted: frozenset[int]) -> None:
        self.wanted, self.recording, self._calls = wanted, True, 0
        self.scores, self.masks = {}, {}

    def close(self) -> tuple[dict[int, Tensor], dict[int, Tensor | None]]:
        """Stops recording and hands over what was seen; no tensor stays behind."""
        self.recording = False
        scores, masks, self.scores, self.masks = self.scores, self.masks, {}, {}
        return scores, masks

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

    def open(self, wanted: frozenset[int]) -> None:
        self.wanted, self.recording, self.scores = wanted, True, {}

    def close(self) -> tuple[dict[int, Tensor], dict[int, Tensor | None]]:
        self.recording = False
        scores, self.scores = self.scores, {}
        return scores, dict.fromkeys(scores)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
