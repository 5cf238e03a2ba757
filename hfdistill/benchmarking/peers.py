"""The other libraries, called as their users call them. Nothing of them is in this repository; those that are missing are reported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import types
import warnings
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, default_data_collator

from .candidates import LEARNING_RATE, MAX_GRAD_NORM, Candidate, LoopSteps, Setting, Steps, TrainerSteps
from .workloads import Workload


PEERS = {
    "textbrewer": ("textbrewer", "textbrewer"),
    "torchdistill": ("torchdistill.core.distillation", "torchdistill"),
    "trl": ("trl.experimental.gkd", "trl"),
    "liger": ("liger_kernel.chunked_loss", "liger-kernel"),
}
"""Peer -> module that is imported, and distribution."""


def peer_versions() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers that can be imported, and of the others why they cannot."""
    present, absent = {}, {}
    for name, (module, distribution) in PEERS.items():
        try:
            with _quiet(), _model_zoo() if name == "torchdistill" else contextlib.nullcontext():
                importlib.import_module(module)
            present[name] = importlib.metadata.version(distribution)
        except Exception as error:  # whatever a foreign package does at import
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return present, absent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _model_zoo() -> Iterator[None]:
    """Stands in for torchvision while torchdistill is imported: it reads names of a model zoo there that nothing here uses."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ("", ".datasets", ".transforms", ".models", *(f".models.{own}" for own in ("detection", "segmentation", "densenet", "resnet")))
    modules = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    for own in ("_DenseBlock", "_Transition"):
        setattr(modules["torchvision.models.densenet"], own, nn.Module)
    modules["torchvision.models.resnet"].BasicBlock = nn.Module
    modules["torchvision.models.resnet"].conv1x1 = None
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


# ---- TextBrewer ----


class TextBrewerSteps(Steps):
    """`GeneralDistiller.train_on_batch` and the lines around it in `train_with_num_steps`, without its progress bar and checkpoints."""

    def __init__(self, workload: Workload, setting: Setting, objective: str):
        with _quiet():
            import textbrewer
        self.setting, self.args = setting, dict(workload.outputs)
        self.student, teacher = workload.new_student().to(setting.device), workload.new_teacher().to(setting.device)
        if workload.attentions:
            self.student.set_attn_implementation("eager")
            teacher.set_attn_implementation("eager")
        folder = setting.folder / "textbrewer"
        training = textbrewer.TrainingConfig(output_dir=str(folder), device=setting.device)
        self.distiller = textbrewer.GeneralDistiller(
            training, textbrewer.DistillationConfig(**_textbrewer_objective(workload)), teacher, self.student, *_adaptors(workload)
        )
        projections = [projection for projection in self.distiller.projs if projection is not None]
        for own, first in zip(projections, workload.new_projections()):
            own.load_state_dict(first.state_dict())
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.optimizer, _, _ = self.distiller.initialize_training(optimizer, None, None, None)
        self.distiller.__enter__()  # `with distiller:` sets the modes of both models
        self.batch = workload.batch()

    def backward(self) -> Tensor:
        with self.setting.autocast():
            loss, parts = self.distiller.train_on_batch(self.batch, self.args)
        self.distiller.write_loss(loss, 0, parts)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _adaptors(workload: Workload):
    def student(batch, outputs):
        found = {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        return found if workload.attentions else {"logits": outputs.logits, "losses": outputs.loss, **found}

    def teacher(batch, outputs):
        found = {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        return found if workload.attentions else {"logits": outputs.logits, **found}

    return teacher, student


def _textbrewer_objective(workload: Workload) -> dict:
    settings = workload.objectives["distil"].settings
    if not workload.attentions:
        temperature = settings["temperature"]
        matches = []
        if "cosine_weight" in settings:
            last = (workload.teacher.config.num_hidden_layers, workload.student.config.num_hidden_layers)
            matches = [{"layer_T": last[0], "layer_S": last[1], "feature": "hidden", "loss": "cos", "weight": settings["cosine_weight"]}]
        return {
            "temperature": temperature,
            "kd_loss_type": "ce",
            "kd_loss_weight": settings["kd_weight"] * temperature**2,  # it does not multiply by the square
            "hard_label_weight": settings["task_weight"],
            "intermediate_matches": matches,
        }
    widths = [model.config.hidden_size for model in (workload.student, workload.teacher)]
    pairs = [tuple(map(int, pair.split(":"))) for pair in settings["layer_map"].split(",")]
    hidden = [(0, 0), *((s + 1, t + 1) for s, t in pairs)]
    matches = [
        {"layer_T": t, "layer_S": s, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0, "proj": ["linear", *widths]}
        for s, t in hidden
    ]
    matches += [{"layer_T": t, "layer_S": s, "feature": "attention", "loss": "attention_mse", "weight": 1.0} for s, t in pairs]
    return {"intermediate_matches": matches}


# ---- torchdistill ----


_REGRESSOR = "hfdistill_benchmark_regressor"


def _torchdistill(module: str) -> types.ModuleType:
    """By name: it is in no extra, because it would bring torchvision, of which nothing is used here."""
    return importlib.import_module(f"torchdistill.{module}")


class TorchdistillSteps(Steps):
    """A `DistillationBox` from a configuration as its examples write them; the hint has a regressor in an auxiliary wrapper."""

    def __init__(self, workload: Workload, setting: Setting, objective: str):
        with _quiet(), _model_zoo():
            _torchdistill("losses.mid_level")  # registers its losses
            box = _torchdistill("core.distillation")
        _torchdistill("common.constant").def_logger.setLevel("WARNING")
        self.setting = setting
        self.student = workload.new_student()
        batch = workload.batch()
        self.batch, self.targets = batch["pixel_values"].to(setting.device), batch["labels"].to(setting.device)
        rows = list(zip(batch["pixel_values"], batch["labels"]))
        config = _torchdistill_config(workload, len(rows))
        self.box = box.get_distillation_box(workload.new_teacher(), self.student, {"train": rows}, config, setting.device, None, False, 1)
        self.box.pre_epoch_process(epoch=0)

    def backward(self) -> Tensor:
        loss = self._forward()
        loss.backward()
        return loss.detach()

    def _forward(self) -> Tensor:
        with self.setting.autocast():
            return self.box.forward_process(self.batch, self.targets, None)

    def clear(self) -> None:
        self.box.optimizer.zero_grad()

    def take(self) -> None:
        self.box.pre_forward_process()
        self.box.post_forward_process(self._forward())


def _torchdistill_config(workload: Workload, batch_size: int) -> dict:
    own = "student_model." if workload.maps else ""  # inside of the wrapper
    kd = {"temperature": 2.0, "alpha": 0.5, "reduction": "batchmean"}
    for role, prefix in (("student", own), ("teacher", "")):
        kd |= {f"{role}_module_path": f"{prefix}classifier", f"{role}_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    hooks, wrapper = ["classifier"], {}
    if workload.maps:
        stages = [f"resnet.encoder.stages.{stage}" for stage in range(4)]
        hooks += stages
        pairs = {
            path: {"teacher": {"io": "output", "path": path}, "student": {"io": "output", "path": own + path}, "weight": 1.0}
            for path in stages
        }
        terms["at"] = {"criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs, "mode": "code"}}, "weight": 1000.0}
        sides = {
            "input": {"is_from_teacher": False, "module_path": "regressor", "io": "output"},
            "target": {"is_from_teacher": True, "module_path": stages[1], "io": "output"},
        }
        terms["hint"] = {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
            "weight": 1.0,
        }
        _register_regressor()
        regressor = {"path": own + stages[1], "regressor": workload.new_projections()[0]}
        wrapper = {"auxiliary_model_wrapper": {"key": _REGRESSOR, "kwargs": regressor}}
    own_hooks = [own + path for path in hooks] + (["regressor"] if workload.maps else [])
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
            "kwargs": {"batch_size": batch_size},
        },
        "teacher": {"forward_proc": "forward_batch_only", "forward_hook": {"output": hooks}, "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "forward_hook": {"output": own_hooks}, **wrapper},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {
            "key": "AdamW",
            "kwargs": {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True},
            "max_grad_norm": MAX_GRAD_NORM,
        },
    }


def _register_regressor() -> None:
    registry = _torchdistill("models.registry")
    if _REGRESSOR in registry.AUXILIARY_MODEL_WRAPPER_DICT:
        return

    @registry.register_auxiliary_model_wrapper(key=_REGRESSOR)
    class Regressor(_torchdistill("models.wrapper").AuxiliaryModelWrapper):
        def __init__(self, student_model, path, regressor, device=None, device_ids=None, distributed=False, **kwargs):
            super().__init__()
            self.student_model, self.path, self.regressor = student_model, path, regressor

        def forward(self, *args):
            return self.student_model(*args)

        def secondary_forward(self, io_dict):
            self.regressor(io_dict[self.path]["output"])


# ---- TRL and Liger ----


def gkd(workload: Workload, setting: Setting, objective: str) -> Steps:
    """TRL's `GKDTrainer` on given answers alone (`lmbda=0`), forward KL; its defaults of bf16 and gradient checkpointing are off."""
    with _quiet():
        from trl.experimental.gkd import GKDConfig, GKDTrainer
        args = GKDConfig(
            **{**setting.training(), "per_device_train_batch_size": workload.batch_size, "gradient_checkpointing": False},
            lmbda=0.0, beta=0.0, temperature=1.0, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
    trainer = GKDTrainer(
        model=workload.new_student(),
        teacher_model=workload.new_teacher(),
        args=args,
        data_collator=default_data_collator,
        train_dataset=workload.rows.remove_columns("example_id"),
        processing_class=_tokenizer(workload.vocabulary),
    )
    return TrainerSteps(trainer)


def _tokenizer(vocabulary: int):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class ChunkedSteps(LoopSteps):
    """A loop with a chunked loss on the last hidden states and the two heads: `(student, teacher, their weights, labels) -> loss`."""

    def __init__(self, workload: Workload, setting: Setting, objective: str, chunked):
        super().__init__(workload, setting)
        self.chunked = chunked
        self.labels = self.batch["labels"][:, 1:].flatten()

    def loss(self) -> Tensor:
        student = self.student.model(**self.inputs).last_hidden_state
        with torch.no_grad():
            teacher = self.teacher.model(**self.inputs).last_hidden_state
        weights = [model.get_output_embeddings().weight for model in (self.student, self.teacher)]
        return self.chunked(student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), *weights, self.labels)


def liger(compiled: bool):
    """Liger's chunked loss with its default chunk."""

    def build(workload: Workload, setting: Setting, objective: str) -> Steps:
        with _quiet():
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
        return ChunkedSteps(workload, setting, objective, lambda s, t, ws, wt, labels: loss(s, ws, t, wt, labels))

    return build


def trl_chunked(workload: Workload, setting: Setting, objective: str) -> Steps:
    """The loss of TRL's `DistillationTrainer`, which itself trains on answers of the student alone, in a loop."""
    with _quiet():
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(s, t, ws, wt, labels):
        return _chunked_divergence_loss(s[None], t[None], ws, wt, (labels != -100)[None], beta=0.0)[0]

    return ChunkedSteps(workload, setting, objective, loss)


OTHERS: dict[str, Candidate] = {
    "textbrewer": Candidate(
        "TextBrewer", "distil", TextBrewerSteps, ("W1", "W2"), "textbrewer",
        "its soft targets are a cross entropy: another value by the entropy of the teacher, the same gradient",
    ),
    "torchdistill": Candidate("torchdistill", "distil", TorchdistillSteps, ("W3", "W4"), "torchdistill"),
    "gkd": Candidate("TRL GKD", "distil", gkd, ("W5",), "trl", "in fp32 without gradient checkpointing, as all others"),
    "trl_chunked": Candidate(
        "TRL chunked loss in a loop", "distil", trl_chunked, ("W5",), "trl", "of its on-policy trainer, which cannot take given answers"
    ),
    "liger": Candidate("Liger chunked loss in a loop", "distil", liger(False), ("W5",), "liger", "compiled=False"),
    "liger_compiled": Candidate("Liger chunked loss, compiled", "distil", liger(True), ("W5",), "liger", "compiled=True, its default"),
}  # fmt: skip
