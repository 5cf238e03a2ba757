"""Model + batch + plan -> Signals: exactly the tensors that the terms asked for, from exactly the mapped blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .attention_taps import InterfaceTap, SoftmaxTap, allowed_pairs, attach_tap
from .capture_plan import TEACHER_PREFIX, CapturePlan
from .counting import LABEL_COLUMNS, SEQUENCE_IDS, marked_targets, real_tokens
from .early_stop import AllSeen, Arrivals, same_signals
from .model_outputs import NoLogitsError, logits_of, move_to
from .models.anatomy import find_blocks, unwrap_peft
from .models.stages import Stages
from .packed import PackedInputs
from .pooling import pool_tokens
from .signals import ATTENTION_SIGNALS, BLOCK_SIGNALS, Signals
from .stage_taps import StageTap
from .vocabulary_head import VocabularyHead


_FEW = 32
"""Tokens on which a head is tried out."""


class Capture:
    """Runs one model and brings back `Signals`.

    Hidden states come from `output_hidden_states=[indices]`, which Transformers >= 5.23 answers with these slots only;
    models that are no `PreTrainedModel` are read by forward hooks on their blocks. So block `k` is what Transformers
    calls `hidden_states[k + 1]`; for models that end in a final norm (Llama, GPT-2) the last block is taken after it.
    Attention scores, queries, keys and values come from `hfdistill.attention_taps`; features from forward hooks on the stages that
    `hfdistill.models.stages` finds.

    Args:
        model (`nn.Module`): a `PreTrainedModel`, a PEFT model, or any module that returns logits.
        role (`str`): `student` or `teacher`, for error messages.
        pooling (`str`, *optional*): what `pooled` is: `auto` (the model's own pooler, else the first real token, or the last one of
            a causal model), `mean`, `cls` or `last`, as in `hfdistill.pooling`. Default: that of the arguments of the run.

    Raises:
        ValueError: from `require`, when a signal cannot be had from this model.
    """

    def __init__(self, model: nn.Module, role: str = "model", pooling: str | None = None):
        self.model = model
        self.role = role
        self.own_pooling = pooling
        self.run_pooling = "auto"
        self.token_ids: Tensor | None = None  # own id of each token of the batch, where the student's vocabulary is a part of the own
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
        self._stage_tap = StageTap(self.model, self.name)
        self._tap: InterfaceTap | SoftmaxTap | None = None
        self.head: VocabularyHead | None = None  # set by `understand_head`
        self._last_block: str | None = None  # which hook gives the last hidden state, once `check_early_stop` has found one

    @property
    def name(self) -> str:
        return f"{self.role} ({type(self.inner).__name__})"

    @property
    def pooling(self) -> str:
        return self.own_pooling or self.run_pooling

    @property
    def blocks(self):
        """`hfdistill.models.anatomy.Blocks` of the model, found on first use."""
        if self._blocks is None:
            self._blocks = find_blocks(self.model)
        return self._blocks

    @property
    def depth(self) -> int:
        return self.blocks.depth

    def find_stages(self, example: Mapping) -> Stages:
        """`hfdistill.models.stages.Stages` of an image model, found on first use by running it on `example`.

        Raises:
            ValueError: for models that take no images, and where no stages are found.
        """
        inputs = move_to(self.select_inputs(example), self.model)
        return self._quietly(lambda: self._stage_tap.find(inputs))

    def _quietly(self, function):
        """`function()` with the model in eval mode; the training flags of its modules are restored."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                return function()
        finally:
            for module in training:
                module.training = True

    def select_inputs(self, batch: Mapping) -> dict:
        """The columns of `batch` that this model's `forward` names. Labels never travel with them: the loss is ours.

        A teacher takes the column `teacher_x` for `x` where there is one.
        """
        inputs = {key: value for key, value in batch.items() if key in self.columns and key not in LABEL_COLUMNS}
        if self.role == "teacher":
            inputs |= {key: batch[TEACHER_PREFIX + key] for key in self.columns if TEACHER_PREFIX + key in batch}
        return inputs | {SEQUENCE_IDS: batch[SEQUENCE_IDS]} if SEQUENCE_IDS in batch else inputs

    @cached_property
    def packed(self) -> PackedInputs:
        """What the model takes beside packed rows."""
        return PackedInputs(self.inner, self.is_causal)

    def __call__(
        self,
        batch: Mapping,
        plan: CapturePlan,
        forward: nn.Module | None = None,
        rows: Tensor | None = None,
        project: bool = True,
        stop_early: bool = False,
    ) -> Signals:
        """Runs the model on `batch`.

        Args:
            batch: the whole batch; columns the model does not know are left out.
            plan: what to fetch.
            forward: what to call instead of the model itself, such as its DDP wrapper.
            rows: integer `(rows,)`, positions of the flattened `(batch * length)` to which the head of a language model is
                restricted; only after `understand_head` has found a place for it.
            project: whether logits are made of these rows, or a `Projection` is left to make them of.
            stop_early: whether the pass may end where the last signal of `plan` has been seen; it does not where `check_early_stop`
                has not been asked, or found it to be wrong.
        """
        inputs = self.select_inputs(batch)
        if SEQUENCE_IDS in inputs:
            inputs |= self.packed(inputs.pop(SEQUENCE_IDS))
        if self.token_ids is not None and "input_ids" in inputs:
            self.token_ids = self.token_ids.to(inputs["input_ids"].device)
            inputs["input_ids"] = self.token_ids[inputs["input_ids"]]
        options = {}
        stop_early = stop_early and self._last_block is not None and not plan.logits
        if self.is_pretrained and (plan.hidden_states or plan.embeddings) and not stop_early:
            options["output_hidden_states"] = sorted({k + 1 for k in plan.hidden_states} | ({0} if plan.embeddings else set()))
        found = Arrivals(self._awaited(plan) if stop_early else None)
        handles: list = []
        output = projection = None
        try:
            handles += self._hooks(plan, found, stop_early)
            handles += self._stage_tap.open(plan.features, found)
            if self._tap is not None:
                self._tap.open({signal: getattr(plan, signal) for signal in ATTENTION_SIGNALS})
            if rows is None:
                output = (self.model if forward is None else forward)(**inputs, **options)
            else:
                output, projection = self._run_at(rows, project, self.model if forward is None else forward, inputs, options)
        except AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
            attention, masks = self._tap.close() if self._tap is not None else ({}, {})
        signals = self._signals(batch, plan, output, found, attention, masks)
        if rows is not None and plan.logits:
            signals.rows, signals.projection, signals.shape = rows, projection, tuple(inputs["input_ids"].shape)
            signals.logits = None if projection is not None else signals.logits.squeeze(0)
        if plan.features:
            signals.features = self._stage_tap.maps(plan.features, found, inputs)
        return signals

    def _run_at(self, rows: Tensor, project: bool, forward: nn.Module, inputs: Mapping, options: Mapping):
        output = None

        def run() -> Tensor:
            nonlocal output
            output = forward(**inputs, **options)
            return logits_of(output, self.name)

        _, projection = self.head.run(run, tuple(inputs["input_ids"].shape), rows, project)
        return output, projection

    def understand_head(self, example: Mapping) -> VocabularyHead:
        """Finds out how the head of a language model can be restricted to rows, by running the model on a little of `example`."""
        self.head = head = VocabularyHead(self.inner)
        ids = example.get("input_ids")
        if not self.is_pretrained or not isinstance(ids, Tensor) or ids.dim() != 2:
            return head
        # Few tokens, because all their logits are made, and all of them real: those of a row of nothing but padding mean nothing.
        few = {
            name: value[:, :_FEW] if value.dim() > 1 and value.size(1) == ids.size(1) else value
            for name, value in self.select_inputs(example).items()
            if isinstance(value, Tensor) and name != SEQUENCE_IDS
        }
        if "attention_mask" in few:
            few["attention_mask"] = torch.ones_like(few["input_ids"])
        few = move_to(few, self.model)
        self._quietly(lambda: head.understand(lambda: self(few, CapturePlan()).logits, tuple(few["input_ids"].shape)))
        return head

    def check_early_stop(self, plan: CapturePlan, example: Mapping) -> bool:
        """Whether a pass that ends with the last signal of `plan` gives what a whole one gives; from then on it may be used.

        `plan` is taken without its logits, for which the whole model has to run.
        """
        plan = replace(plan, logits=False)
        self._last_block = None
        # Compiled models run hooks at other times; dispatched ones move weights in hooks that a stopped pass would skip.
        if self.inner is not self.model and hasattr(self.model, "_orig_mod") or getattr(self.inner, "hf_device_map", None):
            return False
        blocks = plan.blocks_of(BLOCK_SIGNALS)
        if (blocks or plan.embeddings) and self.blocks.shared:
            return False  # one module runs as every block
        example = move_to(self.select_inputs(example), self.model)
        whole = self._quietly(lambda: self(example, plan))
        for self._last_block in ("block", "base"):
            try:
                if same_signals(whole, self._quietly(lambda: self(example, plan, stop_early=True))):
                    return True
            except (KeyError, TypeError):  # its base model returns no dict
                continue
        self._last_block = None
        return False

    def _awaited(self, plan: CapturePlan) -> set:
        """Names under which hooks put what `plan` asks for."""
        awaited = {("features", stage) for stage in plan.features}
        awaited |= {("block", k) for k in plan.hidden_states if not self._ends_base(k)}
        awaited |= {("attention" if isinstance(self._tap, InterfaceTap) else "block", k) for k in plan.blocks_of(ATTENTION_SIGNALS)}
        if plan.embeddings:
            awaited.add("embeddings")
        if plan.pooled or any(self._ends_base(k) for k in plan.hidden_states):
            awaited.add("base")
        return awaited

    def _ends_base(self, block: int) -> bool:
        """Whether the hidden state of `block` is what the base model returns: that of the last one, where a final norm follows."""
        return self._last_block == "base" and block == self.depth - 1

    def _hooks(self, plan: CapturePlan, found: Arrivals, stop_early: bool) -> list:
        handles = []
        by_hooks = stop_early or not self.is_pretrained
        if plan.pooled or by_hooks and any(self._ends_base(k) for k in plan.hidden_states):
            base = self.inner.base_model if self.is_pretrained else self.inner
            handles.append(base.register_forward_hook(lambda _m, _a, out: found.__setitem__("base", out)))
        if not by_hooks:
            return handles
        if plan.embeddings:
            hook = self.blocks.modules[0].register_forward_pre_hook(
                lambda _m, args, kwargs: found.__setitem__("embeddings", args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            handles.append(hook)
        blocks = {k for k in plan.hidden_states if not self._ends_base(k)}
        if stop_early and self._tap is not None:
            if isinstance(self._tap, InterfaceTap):
                self._tap.on_seen = lambda block: found.__setitem__(("attention", block), True)
            else:
                blocks |= plan.blocks_of(ATTENTION_SIGNALS)
        for k in blocks:
            handles.append(
                self.blocks.modules[k].register_forward_hook(
                    lambda _m, _a, out, k=k: found.__setitem__(("block", k), out[0] if isinstance(out, tuple) else out)
                )
            )
        return handles

    def _signals(self, batch, plan, output, found, attention, masks) -> Signals:
        signals = Signals(logits=logits_of(output, self.name) if plan.logits else None)
        if plan.logits and isinstance(output, Mapping) and output.get("distillation_logits") is not None:
            signals.cls_logits, signals.distillation_logits = output["cls_logits"], output["distillation_logits"]
        signals.attention_mask = real_tokens(batch)
        signals.target_mask = marked_targets(batch)
        if self.is_pretrained and (plan.hidden_states or plan.embeddings) and output is not None:
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
            signals.hidden_states = {
                k: found["base"]["last_hidden_state"] if self._ends_base(k) else found["block", k] for k in plan.hidden_states
            }
        if plan.pooled:
            if "base" not in found:
                raise ValueError(
                    f"The {self.name} never calls its base model, whose output signal 'pooled' is taken from. Use signal 'hidden_states'."
                )
            signals.pooled = self._pool(found["base"], signals.attention_mask)
        for signal in ATTENTION_SIGNALS:
            wanted, got = getattr(plan, signal), attention.get(signal, {})
            missing = wanted - got.keys()
            if missing:
                raise ValueError(
                    f"The {self.name} gave no {signal} for blocks {sorted(missing)}: a term on them would be a constant 0. "
                    "Remove the term (attention_weight: 0) or map other blocks."
                )
            setattr(signals, signal, {block: got[block] for block in wanted})
        known: dict[tuple, Tensor] = {}  # most blocks share one mask
        for block, scores in signals.attention_scores.items():
            kind = (id(masks[block]), scores.shape[2:])
            if kind not in known:
                known[kind] = allowed_pairs(scores, masks[block], signals.attention_mask)
            signals.attention_allowed[block] = known[kind]
        return signals

    def _pool(self, output, mask: Tensor | None) -> Tensor:
        pooling = self.pooling
        part = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
        if pooling == "auto":
            pooled = part("pooler_output")
            if pooled is not None:
                return pooled.flatten(1)  # of CNNs (batch, channels, 1, 1)
            pooling = "last" if self.is_causal else "cls"
        states = part("last_hidden_state")
        if states is None and self.is_pretrained and isinstance(output, tuple):
            states = output[0]
        if isinstance(states, Tensor) and states.dim() == 4 and self.pooling in ("auto", "mean"):
            return states.mean((2, 3))
        if states is None or states.dim() != 3:
            if isinstance(output, Tensor):
                raise ValueError(
                    f"The {self.name} shows no pooled vector, only its logits (as models of timm do). Use signal 'pooled_features' with "
                    "layer_map '-1:-1': the mean over space of the last stage."
                )
            seen = "no last_hidden_state" if states is None else f"a last_hidden_state of shape {tuple(states.shape)}"
            raise ValueError(
                f"The {self.name} returned {seen}, so there are no token vectors (batch, length, width) to pool with pooling={pooling!r}. "
                "Return a dict with 'last_hidden_state', set pooling='auto' for a model with a pooler, or use another signal."
            )
        return pool_tokens(states, mask, pooling)

    @property
    def is_causal(self) -> bool:
        """Whether position `i` sees only positions up to `i` (decoder-only families)."""
        config = getattr(self.inner, "config", None)
        kind = getattr(config, "model_type", None)
        decoder_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return decoder_only or bool(getattr(config, "is_decoder", False))

    def has_logits(self, example: Mapping) -> bool:
        """Whether the model answers a batch with logits; base models, which have no head, do not."""
        try:
            self.require(CapturePlan(), example)
        except NoLogitsError:
            return False
        return True

    def attention_pattern(self, block: int) -> tuple[bool, int | None]:
        """`(causal, window)` of a block whose attention is captured; see `InterfaceTap.pattern`."""
        return self._tap.pattern(block)

    def require(self, plan: CapturePlan, example: Mapping) -> Signals:
        """Makes sure before training that `plan` can be had, and returns the signals of one example batch (for shapes).

        Sets up the attention taps, which switch the model's attention implementation to one that behaves like SDPA; the
        name of an implementation is never written to `config.json`.

        Raises:
            ValueError: when blocks do not exist, when attention has no `(batch, heads, length, length)` map, or when queries, keys
                and values cannot be seen.
        """
        if any(isinstance(stage, int) for stage in plan.features):
            self.find_stages(example)
        self._stage_tap.check(plan.features)
        wanted = plan.blocks_of(BLOCK_SIGNALS)
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
                if plan.blocks_of(ATTENTION_SIGNALS) and self._tap is None:
                    self._tap = self._attach_tap(example)
                hidden = [name for name in ATTENTION_SIGNALS if getattr(plan, name) and name not in self._tap.signals]
                if hidden:
                    raise ValueError(
                        f"The {self.name} runs an attention of its own, which shows its scores but not its {', '.join(hidden)}: a "
                        "relation of them would have nothing to compare. Use signal 'hidden_states' for the relation, or an attention loss."
                    )
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
        ids = example.get("input_ids")
        for signal in ("queries", "keys", "values"):
            for block, tensor in getattr(signals, signal).items():
                length = ids.size(1) if isinstance(ids, Tensor) and ids.dim() == 2 else tensor.size(1)
                if tensor.dim() != 3 or tuple(tensor.shape[:2]) != (rows, length):
                    raise ValueError(
                        f"The {signal} of the {self.name} at block {block} have shape {tuple(tensor.shape)}, not (batch {rows}, length "
                        f"{length}, width): windowed attention and learned prefixes cannot be compared token by token. Use signal "
                        "'hidden_states'."
                    )
        return signals

    def _attach_tap(self, example: Mapping) -> InterfaceTap | SoftmaxTap:
        inputs = self.select_inputs(example)
        tap = attach_tap(self.inner, lambda: self.model(**inputs), lambda: self.blocks.modules) if self.is_pretrained else None
        cure = "Set attention_weight to 0, and remove terms on attention scores, queries, keys and values."
        if tap is None:
            raise ValueError(
                f"The {self.name} has no attention that can be read: it calls neither Transformers' attention interface nor one softmax "
                f"per block. {cure}"
            )
        if tap.count != self.depth:
            tap.remove()
            raise ValueError(
                f"The {self.name} runs {tap.count} attentions for {self.depth} blocks, so they cannot be matched one to one. {cure}"
            )
        return tap

    @property
    def shares_attention(self) -> bool:
        return self._tap is not None and self._tap.shared

    def rest(self) -> None:
        """No scores until the next call; they were still computed for gradient checkpointing, which runs blocks again in backward."""
        if self._tap is not None:
            self._tap.rest()

    def release(self) -> None:
        """Takes the attention taps off the model and restores its attention implementation."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
