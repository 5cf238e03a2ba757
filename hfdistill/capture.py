"""Model + batch + plan -> Signals: exactly the tensors that the terms asked for, from exactly the mapped blocks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .attention_taps import InterfaceTap, SoftmaxTap
from .models.anatomy import find_blocks, unwrap_peft
from .signals import Signals


@dataclass(frozen=True)
class CapturePlan:
    """What to fetch. Blocks count from 0; nothing else is retained."""

    logits: bool = True
    embeddings: bool = False
    pooled: bool = False
    hidden_states: frozenset[int] = frozenset()
    attention_scores: frozenset[int] = frozenset()

    def union(self, other: CapturePlan) -> CapturePlan:
        return CapturePlan(
            logits=self.logits or other.logits,
            embeddings=self.embeddings or other.embeddings,
            pooled=self.pooled or other.pooled,
            hidden_states=self.hidden_states | other.hidden_states,
            attention_scores=self.attention_scores | other.attention_scores,
        )


class Capture:
    """Runs one model and brings back `Signals`.

    Hidden states come from `output_hidden_states=[indices]`, which Transformers >= 5.23 answers with these slots only;
    models that are no `PreTrainedModel` are read by forward hooks on their blocks. So block `k` is what Transformers
    calls `hidden_states[k + 1]`; for models that end in a final norm (Llama, GPT-2) the last block is taken after it.
    Attention scores come from `hfdistill.attention_taps`.

    Args:
        model (`nn.Module`): a `PreTrainedModel`, a PEFT model, or any module that returns logits.
        role (`str`): `student` or `teacher`, for error messages.

    Raises:
        ValueError: from `require`, when a signal cannot be had from this model.
    """

    def __init__(self, model: nn.Module, role: str = "model"):
        self.model = model
        self.role = role
        self.inner = unwrap_peft(getattr(model, "_orig_mod", model))  # torch.compile hides the signature
        self.is_pretrained = isinstance(self.inner, PreTrainedModel)
        parameters = list(inspect.signature(self.inner.forward).parameters.values())
        self.columns = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not self.columns and any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(
                f"The forward of the {self.name} takes only **kwargs, so it cannot be known which columns it reads. Name its inputs "
                "(def forward(self, input_ids, attention_mask)), or pass the model without its wrapper."
            )
        if getattr(getattr(self.inner, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"The {self.name} is an encoder-decoder, whose two stacks DistillationTrainer cannot map. Use an encoder or a decoder."
            )
        self._blocks = None
        self._tap: InterfaceTap | SoftmaxTap | None = None

    @property
    def name(self) -> str:
        return f"{self.role} ({type(self.inner).__name__})"

    @property
    def blocks(self):
        """`hfdistill.models.anatomy.Blocks` of the model, found on first use."""
        if self._blocks is None:
            self._blocks = find_blocks(self.model)
        return self._blocks

    @property
    def depth(self) -> int:
        return self.blocks.depth

    def select_inputs(self, batch: Mapping) -> dict:
        """The columns of `batch` that this model's `forward` names. Labels never travel with them: the loss is ours."""
        return {key: value for key, value in batch.items() if key in self.columns and key not in ("labels", "label", "label_ids")}

    def __call__(self, batch: Mapping, plan: CapturePlan, forward: nn.Module | None = None) -> Signals:
        """Runs the model on `batch`.

        Args:
            batch: the whole batch; columns the model does not know are left out.
            plan: what to fetch.
            forward: what to call instead of the model itself, such as its DDP wrapper.
        """
        inputs = self.select_inputs(batch)
        options = {}
        if self.is_pretrained and (plan.hidden_states or plan.embeddings):
            options["output_hidden_states"] = sorted({k + 1 for k in plan.hidden_states} | ({0} if plan.embeddings else set()))
        found: dict = {}
        handles = self._hooks(plan, found)
        if self._tap is not None:
            self._tap.open(plan.attention_scores)
        try:
            output = (self.model if forward is None else forward)(**inputs, **options)
        finally:
            for handle in handles:
                handle.remove()
            scores, masks = self._tap.close() if self._tap is not None else ({}, {})
        return self._signals(batch, plan, output, found, scores, masks)

    def _hooks(self, plan: CapturePlan, found: dict) -> list:
        handles = []
        if plan.pooled:
            base = self.inner.base_model if self.is_pretrained else None
            if base is None:
                raise ValueError(f"The {self.name} is no PreTrainedModel, so its pooled output cannot be found. Use another signal.")
            handles.append(base.register_forward_hook(lambda _m, _a, out: found.__setitem__("base", out)))
        if not self.is_pretrained and (plan.hidden_states or plan.embeddings):
            modules = self.blocks.modules
            if plan.embeddings:
                hook = modules[0].register_forward_pre_hook(
                    lambda _m, args, kwargs: found.__setitem__("embeddings", args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
                handles.append(hook)
            for k in plan.hidden_states:
                handles.append(
                    modules[k].register_forward_hook(
                        lambda _m, _a, out, k=k: found.__setitem__(k, out[0] if isinstance(out, tuple) else out)
                    )
                )
        return handles

    def _signals(self, batch, plan, output, found, scores, masks) -> Signals:
        signals = Signals(logits=logits_of(output) if plan.logits else None)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            signals.attention_mask = mask.bool()
        if self.is_pretrained and (plan.hidden_states or plan.embeddings):
            states = output["hidden_states"]
            if states is None or len(states) != self.depth + 1:
                got = None if states is None else len(states)
                raise ValueError(
                    f"The {self.name} returned {got} hidden states for {self.depth} blocks, expected {self.depth + 1} "
                    "(embeddings first). Its blocks cannot be told apart; use logits terms only, or pass the model without its wrapper."
                )
            signals.embeddings = states[0] if plan.embeddings else None
            signals.hidden_states = {k: states[k + 1] for k in plan.hidden_states}
        elif plan.hidden_states or plan.embeddings:
            signals.embeddings = found.get("embeddings")
            signals.hidden_states = {k: found[k] for k in plan.hidden_states}
        if plan.pooled:
            signals.pooled = self._pool(found["base"], signals.attention_mask)
        missing = plan.attention_scores - scores.keys()
        if missing:
            raise ValueError(
                f"The {self.name} gave no attention scores for blocks {sorted(missing)}: an attention term would be a constant 0. "
                "Remove the attention term (attention_weight: 0) or map other blocks."
            )
        for block in plan.attention_scores:
            signals.attention_scores[block] = scores[block]
            signals.attention_allowed[block] = allowed_pairs(scores[block], masks[block], signals.attention_mask)
        return signals

    def _pool(self, output, mask: Tensor | None) -> Tensor:
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled
        states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        if not self.is_causal:
            return states[:, 0]
        if mask is None:
            return states[:, -1]
        last = (mask * torch.arange(mask.size(1), device=mask.device)).argmax(-1)
        return states[torch.arange(states.size(0), device=states.device), last]

    @property
    def is_causal(self) -> bool:
        """Whether position `i` sees only positions up to `i` (decoder-only families)."""
        config = getattr(self.inner, "config", None)
        kind = getattr(config, "model_type", None)
        decoder_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return decoder_only or bool(getattr(config, "is_decoder", False))

    def attention_pattern(self, block: int) -> tuple[bool, int | None]:
        """`(causal, window)` of a block whose attention is captured; see `InterfaceTap.pattern`."""
        return self._tap.pattern(block)

    def require(self, plan: CapturePlan, example: Mapping) -> Signals:
        """Makes sure before training that `plan` can be had, and returns the signals of one example batch (for shapes).

        Sets up the attention taps, which switch the model's attention implementation to one that behaves like SDPA; the
        name of an implementation is never written to `config.json`.

        Raises:
            ValueError: when blocks do not exist, or attention has no `(batch, heads, length, length)` map.
        """
        wanted = plan.hidden_states | plan.attention_scores
        if wanted and not wanted <= set(range(self.depth)):
            raise ValueError(
                f"The layer map names blocks {sorted(wanted - set(range(self.depth)))} of the {self.name}, which has blocks "
                f"0 to {self.depth - 1} (embeddings are not a block). Correct the layer map."
            )
        example = move_to(self.select_inputs(example), self.model)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                if plan.attention_scores and self._tap is None:
                    self._tap = self._attach_tap(example)
                signals = self(example, plan)
        finally:
            for module in training:
                module.training = True
        rows = next(value.size(0) for value in self.select_inputs(example).values() if isinstance(value, Tensor))
        for block, scores in signals.attention_scores.items():
            if scores.dim() != 4 or scores.size(0) != rows or scores.size(2) != scores.size(3):
                raise ValueError(
                    f"The attention of the {self.name} at block {block} has shape {tuple(scores.shape)}, not (batch {rows}, heads, "
                    "length, length): windowed or cross attention cannot be compared. Use hidden_weight instead of attention_weight."
                )
        return signals

    def _attach_tap(self, example: Mapping) -> InterfaceTap | SoftmaxTap:
        no_attention = (
            f"The {self.name} has no attention that can be read: it calls neither Transformers' attention interface nor one softmax "
            "per block. Set attention_weight to 0 or remove the attention term."
        )
        if not self.is_pretrained:
            raise ValueError(no_attention)
        tap = InterfaceTap(self.inner)
        inputs = self.select_inputs(example)
        if tap.discover(lambda: self.model(**inputs)):
            if len(tap.modules) != self.depth:
                tap.remove()
                raise ValueError(
                    f"The {self.name} runs {len(tap.modules)} attentions for {self.depth} blocks, so they cannot be matched one to one. "
                    "Set attention_weight to 0."
                )
            return tap
        softmax = SoftmaxTap(self.blocks.modules)
        softmax.open(frozenset(range(self.depth)))
        try:
            self.model(**inputs)
        finally:
            scores, _ = softmax.close()
        if len(scores) != self.depth:
            softmax.remove()
            raise ValueError(no_attention)
        return softmax

    @property
    def shares_attention(self) -> bool:
        return self._tap is not None and self._tap.shared

    def release(self) -> None:
        """Takes the attention taps off the model and restores its attention implementation."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None


def move_to(inputs: Mapping, model: nn.Module) -> dict:
    """`inputs` on the device of `model`, floats (images) in the dtype of its weights."""
    parameter = next(itertools.chain(model.parameters(), model.buffers()), None)
    if parameter is None:
        return dict(inputs)
    return {
        key: value.to(device=parameter.device, dtype=parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


def logits_of(output) -> Tensor:
    """Logits from a `ModelOutput`, a dict, a tuple or a bare tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    keys = list(output) if isinstance(output, Mapping) else type(output).__name__
    raise ValueError(
        f"The model returned no logits, only {keys}. Use a model with a head (AutoModelFor...), or return a dict with 'logits'."
    )


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


def example_batch(model: nn.Module, rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    """A tiny batch that `model` accepts, from its config alone: token ids or images.

    Raises:
        ValueError: when the model takes neither; the trainer then needs a dataset to take an example from.
    """
    inner = unwrap_peft(model)
    config = getattr(inner, "config", None)
    device = next(inner.parameters()).device
    main = getattr(inner, "main_input_name", None)
    if config is not None and main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(rows, getattr(config, "num_channels", 3), height, width, device=device)}
    if config is not None and main == "input_ids":
        # Ids that are neither padding nor past the table: RoBERTa counts positions from the padding id, and classifiers of
        # decoder families look for the last token that is not padding.
        padding = getattr(config, "pad_token_id", None)
        token = next(i for i in (3, 2, 1, 0) if i != padding and i < config.vocab_size)
        ids = torch.full((rows, length), token, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    raise ValueError(
        f"{type(inner).__name__} takes neither input_ids nor pixel_values, so no example batch can be made for it. "
        "Pass a train_dataset, from which an example is taken."
    )


def plan_for(pairs: Iterable[tuple[str, Iterable[int]]]) -> CapturePlan:
    """The union of `(signal, blocks)` needs."""
    plan = CapturePlan(logits=False)
    for signal, blocks in pairs:
        value = frozenset(blocks) if signal in ("hidden_states", "attention_scores") else True
        plan = plan.union(CapturePlan(**{"logits": False, signal: value}))
    return plan
