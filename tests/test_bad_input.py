"""Bad input fails before training, with the value seen, the consequence and the cure."""

import logging
import re

import families
import pytest
import torch
from torch import nn
from training import Rows, arguments, pad, ragged, run

from hfdistill import DistillationTrainer, DistillationTrainingArguments, Term
from hfdistill.cli import parse
from hfdistill.runs import Run


def message(text: str) -> str:
    return "^" + re.escape(text)


def build(tmp_path, student=None, teacher=None, data=None, **options):
    extra = {
        k: options.pop(k)
        for k in ("processing_class", "teacher_processing_class", "objective", "compute_loss_func", "eval_dataset", "data_collator")
        if k in options
    }
    return DistillationTrainer(
        model=student if student is not None else families.build("bert", 2),
        teacher=teacher if teacher is not None else families.build("bert", 4),
        args=arguments(tmp_path, **options),
        train_dataset=data if data is not None else ragged("bert"),
        **{"data_collator": pad, **extra},
    )


# ---- The two models ----


def test_label_sets_that_differ(tmp_path):
    student, teacher = families.build("bert", 2), families.build("bert", 4)
    for model, names in ((student, ["no", "maybe", "yes"]), (teacher, ["no", "perhaps", "yes"])):
        model.config.id2label = dict(enumerate(names))
    with pytest.raises(
        ValueError,
        match=message(
            "The label sets differ: only the student has ['maybe'], only the teacher ['perhaps']. Columns of the teacher's logits would "
            "be matched to "
            "other labels. Rename the labels in config.id2label, or set teacher_label_order='by_index' if they mean the same."
        ),
    ):
        build(tmp_path, student, teacher)
    build(tmp_path, student, teacher, teacher_label_order="by_index")


def test_label_counts_that_differ(tmp_path):
    with pytest.raises(
        ValueError,
        match=message(
            "The student has 3 labels ['LABEL_0', 'LABEL_1', 'LABEL_2'] and the teacher 2 ['LABEL_0', 'LABEL_1']: their logits cannot be "
            "compared."
        ),
    ):
        build(tmp_path, teacher=families.build("bert", 4, num_labels=2))


def test_labels_that_only_one_side_names(tmp_path):
    teacher = families.build("bert", 4)
    teacher.config.id2label = dict(enumerate(["contradiction", "neutral", "entailment"]))
    with pytest.raises(
        ValueError,
        match=message(
            "The teacher names its labels ['contradiction', 'neutral', 'entailment'] and the student only LABEL_0, LABEL_1, ...: whether "
            "they are in the "
            "same order cannot be checked, and a wrong order trains a wrong student. Set student.config.id2label, or "
            "teacher_label_order='by_index'"
        ),
    ):
        build(tmp_path, teacher=teacher)


def test_different_vocabularies(tmp_path):
    with pytest.raises(
        ValueError,
        match=message(
            "The vocabularies differ: student 64, teacher 70. If only the padding differs, pass both tokenizers (processing_class and "
            "teacher_processing_class) so that it can be checked; otherwise use a student with the teacher's tokenizer."
        ),
    ):
        build(tmp_path, teacher=families.build("bert", 4, vocab_size=70))


def test_different_tokenizers_of_one_size(tmp_path):
    from hfdistill.data.tokenizer import train_wordpiece

    ours, theirs = train_wordpiece(["to be or not to be"], vocab_size=40), train_wordpiece(["that is the question"], vocab_size=40)
    with pytest.raises(
        ValueError,
        match=r"^Student and teacher tokenizers differ in \d+ tokens \(.*student / teacher id\). The teacher would read other words",
    ):
        build(tmp_path, processing_class=ours, teacher_processing_class=theirs)


@pytest.mark.parametrize(
    "layer_map,words", [("0:0,1:9", ["9", "0 to 3"]), ("0:1,7:3", ["7", "0 to 1"]), ("unifrom", ["unifrom", "'uniform'"]), ("0-1", ["0-1"])]
)
def test_layers_out_of_range_or_unreadable(layer_map, words, tmp_path):
    with pytest.raises(ValueError) as error:
        build(tmp_path, hidden_weight=1.0, layer_map=layer_map)
    assert all(word in str(error.value) for word in words), error.value


def test_attention_of_a_model_that_has_none(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    def resnet():
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
        ).eval()

    with pytest.raises(
        ValueError,
        match=message(
            "The student (ResNetForImageClassification) has no attention that can be read: it calls neither Transformers' attention "
            "interface nor one "
            "softmax per block. Set attention_weight to 0, and remove terms on attention scores, queries, keys and values."
        ),
    ):
        build(
            tmp_path,
            resnet(),
            resnet(),
            data=Rows({"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.zeros(8, dtype=torch.long)}),
            attention_weight=1.0,
        )


def test_unequal_heads(tmp_path):
    with pytest.raises(
        ValueError,
        match=message(
            "The student has 2 attention heads at block 0 and the teacher 4 at block 1, so maps cannot be compared head by head. Set "
            "attention_heads='mean' (heads are averaged first), or give the student as many heads."
        ),
    ):
        build(tmp_path, families.build("bert", 2, num_attention_heads=2), attention_weight=1.0)
    build(tmp_path, families.build("bert", 2, num_attention_heads=2), attention_weight=1.0, attention_heads="mean")


def test_images_cut_into_different_numbers_of_positions(tmp_path):
    with pytest.raises(
        ValueError, match=r"^The term 'hidden' compares student tensors of shape \(2, 6, 32\) with teacher tensors of shape \(2, 5, 32\)"
    ):
        build(tmp_path, families.build("deit", 2), families.build("vit", 4), data=ragged("vit"), hidden_weight=1.0)


def test_widths_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=message("adapter='none' compares the student's width 32 with the teacher's width 48 as they are")):
        build(tmp_path, teacher=families.build("bert", 4, hidden_size=48), hidden_weight=1.0, adapter="none")


def test_a_teacher_in_training_mode_is_put_into_eval_mode_with_a_warning(tmp_path, caplog):
    teacher = families.build("bert", 4).train()
    with caplog.at_level(logging.WARNING, logger="hfdistill"):
        build(tmp_path, teacher=teacher)
    assert not teacher.training
    assert [record.getMessage() for record in caplog.records] == [
        "The teacher (BertForSequenceClassification) was in training mode: its dropout would have made its targets random. It has been "
        "put in eval mode."
    ]


def test_a_correct_setup_is_silent(tmp_path, caplog, recwarn):
    with caplog.at_level(logging.WARNING):
        build(tmp_path, hidden_weight=1.0, attention_weight=1.0)
        build(tmp_path, families.build("mpnet", 2), families.build("mpnet", 4), data=ragged("mpnet"), attention_weight=1.0)
    assert not caplog.records and not [w for w in recwarn if "hfdistill" in str(w.filename)]


def test_no_teacher_although_terms_need_one(tmp_path):
    with pytest.raises(
        ValueError,
        match=message("The terms ['kd'] compare the student with a teacher, but there is none. Pass teacher=..., or set kd_weight=0"),
    ):
        DistillationTrainer(model=families.build("bert", 2), args=arguments(tmp_path), train_dataset=ragged("bert"), data_collator=pad)


def test_teacher_that_is_the_student(tmp_path):
    model = families.build("bert", 2)
    with pytest.raises(
        ValueError, match="^teacher and model are the same object: freezing the teacher would freeze the student. Pass a copy.$"
    ):
        build(tmp_path, model, model)


def test_teacher_name_that_cannot_be_found(tmp_path):
    with pytest.raises(
        ValueError, match=r"^The teacher 'nobody/nothing' is neither a folder with a model nor a Hub id that can be reached.*hf download"
    ):
        build(tmp_path, teacher="nobody/nothing")


def test_teacher_function_without_what_a_term_needs(tmp_path):
    with pytest.raises(
        ValueError,
        match="^The term 'hidden' compares layers, but the teacher is a function, whose layers are not known. Pass the teacher as a module",
    ):
        build(tmp_path, teacher=lambda batch: torch.zeros(8, 3), hidden_weight=1.0)


# ---- Numbers ----


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_negative_or_not_finite_weights(value, tmp_path):
    text = f"hidden_weight must be a finite number >= 0, got {value!r}: a negative weight would push the student away from the teacher."
    with pytest.raises(ValueError, match=message(text)):
        DistillationTrainingArguments(str(tmp_path), hidden_weight=value)
    with pytest.raises(ValueError):
        Term("soft_targets", weight=value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_temperature_at_or_below_zero(value, tmp_path):
    text = f"temperature must be a finite number > 0, got {value!r}: logits are divided by it. Use 1 (plain KL) to 8; 2 is usual."
    with pytest.raises(ValueError, match=message(text)):
        DistillationTrainingArguments(str(tmp_path), temperature=value)


def test_a_temperature_schedule_that_reaches_zero(tmp_path):
    with pytest.raises(ValueError, match="^temperature must be a finite number > 0, got 0.0"):
        build(tmp_path, schedules={"temperature": {"type": "linear", "start": 4.0, "end": 0.0}})


def test_all_weights_zero(tmp_path):
    with pytest.raises(
        ValueError, match="^All weights are zero, so the loss is 0 and nothing would be learnt. Set at least one of task_weight, kd_weight"
    ):
        DistillationTrainingArguments(str(tmp_path), task_weight=0, kd_weight=0)
    with pytest.raises(ValueError, match="^All weights are zero"):
        build(tmp_path, objective=[Term("task", weight=0.0)])


def test_a_hub_token_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="^hub_token would be written in clear into training_args.bin, and that file is pushed. Leave it out"
    ):
        DistillationTrainingArguments(str(tmp_path), hub_token="hf_secret")


# ---- Data ----


def test_empty_dataset(tmp_path):
    empty = Rows({"input_ids": torch.zeros(0, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="^train_dataset is empty: there is nothing to train on. Check its filters and file.$"):
        build(tmp_path, data=empty)
    with pytest.raises(ValueError, match="^eval_dataset is empty: there is nothing to evaluate on."):
        build(tmp_path, eval_dataset={"a": ragged("bert"), "b": empty})


def test_missing_columns(tmp_path):
    from datasets import Dataset

    with pytest.raises(
        ValueError,
        match=message(
            "The training data has no column 'input_ids', only ['label', 'text']: the student would get no input. Tokenize or preprocess "
            "it first "
            "(dataset.map), or name the column 'input_ids'."
        ),
    ):
        build(tmp_path, data=Dataset.from_dict({"text": ["a"], "label": [0]}))
    with pytest.raises(
        ValueError,
        match=message(
            "Batches of the training data have no 'labels', only ['input_ids'], but the objective has a task term. Add a column 'labels' "
            "(-100 where one is missing), or set task_weight to 0 to learn from the teacher alone."
        ),
    ):
        build(tmp_path, data=Dataset.from_dict({"input_ids": [[5, 6]]}), data_collator=None)

    def collate(rows):
        return {"input_ids": torch.tensor([[5, 6]] * len(rows)), "labels": torch.zeros(len(rows), dtype=torch.long)}

    build(tmp_path, data=Dataset.from_dict({"input_ids": [[5, 6]]}), data_collator=collate)  # a collator may make the labels


def test_batches_without_labels_say_so(tmp_path):
    data = ragged("bert")
    del data.batch["labels"]
    with pytest.raises(ValueError, match="^Batches of the training data have no 'labels'"):
        build(tmp_path, data=data)
    run(families.build("bert", 2), families.build("bert", 4), data, arguments(tmp_path, task_weight=0.0))


def test_feature_maps_are_refused_before_training(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    def resnet():
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
        return ResNetForImageClassification(config).eval()

    data = Rows({"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.zeros(8, dtype=torch.long)})
    with pytest.raises(ValueError, match="For the maps of convolutional networks use signal 'features'."):
        build(tmp_path, resnet(), resnet(), data=data, hidden_weight=1.0)
    build(tmp_path, resnet(), resnet(), data=data, teacher_dtype="bfloat16")


def test_models_that_share_parameters(tmp_path):
    student, teacher = families.build("bert", 2), families.build("bert", 4)
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(
        ValueError,
        match="^Student and teacher share 5 parameters .*: freezing the teacher would freeze them in the student. Pass copy.deepcopy",
    ):
        build(tmp_path, student, teacher)
    assert all(p.requires_grad for p in student.parameters())


def test_problem_types_that_differ(tmp_path):
    student, teacher = families.build("bert", 2), families.build("bert", 4)
    teacher.config.problem_type = "multi_label_classification"
    data = ragged("bert")
    del data.batch["labels"]
    trainer = build(tmp_path, student, teacher, data=data, task_weight=0.0)
    assert type(trainer.objective.terms["kd"].loss).__name__ == "BinarySoftTargetsLoss"
    assert student.config.problem_type == "multi_label_classification"
    silent = families.build("bert", 2)  # hidden states alone: the teacher's task is none of the student's business
    build(tmp_path, silent, teacher, kd_weight=0.0, hidden_weight=1.0)
    assert silent.config.problem_type == "single_label_classification"
    other = families.build("bert", 2)
    other.config.problem_type = "regression"
    with pytest.raises(
        ValueError,
        match="^The student is trained for regression and the teacher for multi_label_classification: their logits do not mean the same",
    ):
        build(tmp_path, other, teacher)


def test_encoder_decoders_and_hidden_signatures(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match=r"^The student \(T5ForConditionalGeneration\) is an encoder-decoder"):
        build(tmp_path, t5)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = families.build("bert", 2)

        def forward(self, **kwargs):
            return self.inside(**kwargs)

    with pytest.raises(
        ValueError, match=r"^The forward of the teacher \(Hidden\) takes only \*\*kwargs, so it cannot be known which columns it reads"
    ):
        build(tmp_path, teacher=Hidden().eval())


def test_rows_that_were_counted_wrongly_stop_the_run(tmp_path, monkeypatch):
    from hfdistill.attention_taps import InterfaceTap

    monkeypatch.setattr(InterfaceTap, "pattern", lambda self, block: (True, None))  # says causal of a bidirectional model
    trainer = build(tmp_path, attention_weight=1.0)
    with pytest.raises(
        ValueError, match=r"^The term 'attention' compared \d+ rows \(pairs\) of the first batch, but \d+ were expected from its masks"
    ):
        trainer.train()


# ---- Settings ----


def test_a_typo_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\ntemprature: 4\n")
    with pytest.raises(ValueError, match=re.escape(f"unknown key 'temprature' in {path}. Did you mean 'temperature'?")):
        parse("DistillationTrainingArguments", ["--config", str(path)])


def test_typos_in_objective_and_schedules(tmp_path):
    with pytest.raises(ValueError, match="^Unknown loss 'soft_target'. Did you mean 'soft_targets'?"):
        Term("soft_target")
    with pytest.raises(ValueError, match="^The term 'soft_targets' has no setting 'temprature'. Did you mean 'temperature'?"):
        Term.from_dict({"loss": "soft_targets", "temprature": 2.0})
    with pytest.raises(ValueError, match="^schedules has no place for 'kd_wieght'. Did you mean 'kd_weight'?"):
        DistillationTrainingArguments(str(tmp_path), schedules={"kd_wieght": {"start": 1.0}})
    with pytest.raises(ValueError, match="^The term 'soft_targets' has no setting 'temprature'. Did you mean 'temperature'?"):
        Term("soft_targets", options={"temprature": 2.0})
    with pytest.raises(ValueError, match="^The term 'task' has no setting 'label_smoothing'"):
        Term("task", options={"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="^A term cannot be called 'values'"):
        Term("task", name="values")
    with pytest.raises(ValueError, match="^kd_weight=5.0 would not be used, because objective gives every term its own weight."):
        DistillationTrainingArguments(str(tmp_path), kd_weight=5.0, objective=[{"loss": "task"}])
    with pytest.raises(ValueError, match=r"^schedules names \['kd_weight'\], but with an objective the plain weights are not used"):
        build(tmp_path, objective=[Term("task")], schedules={"kd_weight": {"start": 1.0}})


def test_plain_training_arguments(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(
        ValueError, match="^args is a TrainingArguments, which has no distillation settings. Use hfdistill.DistillationTrainingArguments"
    ):
        DistillationTrainer(model=families.build("bert", 2), args=TrainingArguments(str(tmp_path)))


def test_a_loss_function_instead_of_a_term(tmp_path):
    with pytest.raises(ValueError, match="^compute_loss_func returns one number, from which no count of rows can be taken."):
        build(tmp_path, compute_loss_func=lambda *_: 0)


# ---- Other runs ----


def checkpoint(tmp_path, **options):
    run(
        families.build("bert", 2, seed=1),
        families.build("bert", 4, seed=2, hidden_size=48),
        ragged("bert"),
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **options),
    )
    return str(tmp_path / "checkpoint-1")


def test_a_checkpoint_whose_adapters_do_not_fit(tmp_path):
    folder = checkpoint(tmp_path, hidden_weight=1.0)
    with pytest.raises(ValueError) as error:
        run(
            families.build("bert", 2),
            families.build("bert", 4, hidden_size=40),
            ragged("bert"),
            arguments(tmp_path, max_steps=2, hidden_weight=1.0),
            resume=folder,
        )
    text = str(error.value)
    assert "distillation_state.safetensors do not fit this objective (terms.hidden.adapters.0.bias: checkpoint (48,), now (40,)" in text
    assert text.endswith("Use the settings of that run, or start anew without resume_from_checkpoint.")


def test_a_checkpoint_with_another_layer_map(tmp_path):
    folder = checkpoint(tmp_path, hidden_weight=1.0)
    with pytest.raises(
        ValueError, match=re.escape("was trained with layer map [(0, 1), (1, 3)] for the term 'hidden', now [(0, 2), (1, 3)]")
    ):
        run(
            families.build("bert", 2),
            families.build("bert", 4, hidden_size=48),
            ragged("bert"),
            arguments(tmp_path, max_steps=2, hidden_weight=1.0, layer_map="last"),
            resume=folder,
        )


def test_a_checkpoint_without_its_adapters(tmp_path):
    folder = checkpoint(tmp_path, hidden_weight=1.0)
    (tmp_path / "checkpoint-1/distillation_state.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match="is missing, but the objective has 4 adapter tensors: they would start from random values in the middle of the run",
    ):
        run(
            families.build("bert", 2),
            families.build("bert", 4, hidden_size=48),
            ragged("bert"),
            arguments(tmp_path, max_steps=2, hidden_weight=1.0),
            resume=folder,
        )


def test_a_damaged_side_file(tmp_path):
    folder = checkpoint(tmp_path, hidden_weight=1.0)
    path = tmp_path / "checkpoint-1/distillation_state.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"distillation_state.safetensors is damaged .* Resume from an earlier checkpoint."):
        run(
            families.build("bert", 2),
            families.build("bert", 4, hidden_size=48),
            ragged("bert"),
            arguments(tmp_path, max_steps=2, hidden_weight=1.0),
            resume=folder,
        )


def test_an_output_folder_that_holds_another_run(tmp_path):
    folder = tmp_path / "out"
    first = Run(arguments(folder), "a" * 64)
    Run(arguments(folder), "b" * 64)  # nothing has been trained: a failed start does not lock the folder
    student = families.build("bert", 2)
    trainer = DistillationTrainer(
        model=student,
        args=arguments(first.folder("alone"), kd_weight=0.0),
        train_dataset=ragged("bert"),
        eval_dataset=ragged("bert"),
        data_collator=pad,
    )
    first.finish("alone", trainer)
    Run(arguments(folder), "a" * 64)
    text = (
        f"output_dir {str(folder)!r} holds a run with other settings, data, checkpoints or processes (run aaaaaaaaaaaa, this one is "
        "bbbbbbbbbbbb): going on would mix the two. Choose another --output_dir, or pass --overwrite_output_dir true to start anew."
    )
    with pytest.raises(ValueError, match=message(text)):
        Run(arguments(folder), "b" * 64)
    Run(arguments(folder), "b" * 64, overwrite=True)
    assert not (folder / "_arms").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model that this recipe did not write, and it would be overwritten"):
        Run(arguments(tmp_path / "model"), "a" * 64)


class NoHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids):
        return {"states": self.layer(input_ids.float()[:, :2])}


def test_a_model_without_logits(tmp_path):
    with pytest.raises(ValueError, match=r"^The student \(NoHead\) returned no logits, only \['states'\], .*Use a model with a head"):
        build(tmp_path, NoHead())
