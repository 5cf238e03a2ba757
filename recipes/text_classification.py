#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = ["hfdistill[plots]"]
# ///
"""Distil a text classifier, and measure honestly what it bought.

    accelerate launch recipes/text_classification.py --config recipes/configs/text_classification/stdlib_bert_kd.yaml

trains a teacher (or takes one), trains the student alone and under the teacher with the same steps for every seed, and
writes to `output_dir`: the distilled student of the first seed (loads with plain Transformers), `results.json`,
`results.png` and a model card. Without data flags the embedded task is used, which needs no network.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import hfdistill
from hfdistill.cli import check_launch, config_sha256, parse


def _(default, text, **more):
    return field(default_factory=default, metadata={"help": text}) if callable(default) else field(default=default, metadata={"help": text, **more})


@dataclass
class TextClassificationArguments:
    """Data, student and teacher of a text classification run; everything else is in `DistillationTrainingArguments`."""

    model_name_or_path: str | None = _(None, "Student checkpoint (folder or Hub id). Default: built from the teacher.")
    student_layers: int | None = _(None, "Blocks of a student built from the teacher. Default: half of the teacher's.")
    student_config: dict | None = _(None, "Further sizes of a student built from the teacher: hidden_size, num_attention_heads, intermediate_size, ...")
    student_init: str = _("teacher", "Weights of a student built from the teacher: copied by layer_map, or random.", choices=["teacher", "random"])
    teacher_model_name_or_path: str | None = _(None, "Teacher checkpoint (folder or Hub id). Default: a BERT trained from scratch.")
    teacher_config: dict | None = _(None, "Sizes of a teacher trained from scratch, as in BertConfig.")
    teacher_training: dict | None = _(None, "Training arguments of the teacher, such as max_steps; set to fine-tune a given checkpoint too.")
    allow_weak_teacher: bool = _(False, "Go on although the teacher is no better than the majority class.")
    tokenizer_name: str | None = _(None, "Tokenizer, where it lies neither beside the teacher nor beside the student.")
    model_revision: str = _("main", "Revision of the student checkpoint.")
    trust_remote_code: bool = _(False, "Run code that comes with a checkpoint.")
    cache_dir: str | None = _(None, "Where downloads are kept.")
    task_name: str | None = _(None, "A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli.")
    dataset_name: str | None = _(None, "A data set on the Hub.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = _(None, "Held-out data, as train_file.")
    test_file: str | None = _(None, "Held-out data where there is no validation_file.")
    text_column_names: list[str] = _(list, "One or two text columns.")
    label_column_name: str | None = _(None, "Column of the labels.")
    labelled_rows: int | None = _(None, "Training rows whose label the student sees; the others are transfer text, on which it hears the teacher.")
    max_seq_length: int = _(128, "Tokens per row; longer texts are cut.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")
    vocab_size: int = _(3000, "Pieces of the tokenizer trained for a teacher from scratch.")
    max_train_samples: int | None = _(None, "Use only that many training rows.")
    max_eval_samples: int | None = _(None, "Use only that many rows of each held-out split.")
    preprocessing_num_workers: int | None = _(None, "Processes for tokenizing.")
    seeds: list[int] = _(lambda: [0, 1, 2], "Seeds of the student; the first one is published.")
    baselines: bool = _(True, "Also train the student alone, the control on the teacher's labels, and TF-IDF with logistic regression.")
    overwrite_output_dir: bool = _(False, "Start anew in an output_dir that holds another run.")


ARGUMENTS = (TextClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args):
    """Runs the recipe and returns the contents of `results.json`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    sha = config_sha256((recipe, args))
    run = hfdistill.Run(args, sha, overwrite=recipe.overwrite_output_dir)
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    metric, compute_metrics = build_metric(recipe, data)

    # ---- Teacher: given, or trained from scratch on its own labels ----
    name = recipe.teacher_model_name_or_path
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_name or name, cache_dir=recipe.cache_dir)
        teacher = hfdistill.load_teacher(name, "sequence", {"cache_dir": recipe.cache_dir, **(args.teacher_model_init_kwargs or {})})
    else:
        tokenizer = (
            AutoTokenizer.from_pretrained(recipe.tokenizer_name)
            if recipe.tokenizer_name
            else hfdistill.train_wordpiece(data.vocabulary_texts, vocab_size=recipe.vocab_size)
        )
        sizes = {"max_position_embeddings": recipe.max_seq_length, **(recipe.teacher_config or {})}
        set_seed(args.seed)
        teacher = BertForSequenceClassification(
            BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **label_config(data), **sizes)
        )

    def encode(split):
        return hfdistill.encode_texts(
            split, tokenizer, data.text_columns, recipe.max_seq_length, recipe.pad_to_max_length, recipe.preprocessing_num_workers
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {name: encode(split) for name, split in data.evaluation.items()}
    held_out = next(iter(evaluation.values()))

    def train(arm, model, rows, seed, teacher=None, **settings):
        """One training run, with everything but the named settings as in `args`; finished runs are not repeated."""
        options = dict(output_dir=run.folder(arm), seed=seed, push_to_hub=False, **settings)
        trainer = hfdistill.DistillationTrainer(
            model=model, args=replace(args, **options), teacher=teacher, train_dataset=rows, eval_dataset=held_out,
            processing_class=tokenizer, compute_metrics=compute_metrics,
        )
        check_launch(trainer.accelerator)
        return run.finish(arm, trainer)

    alone = dict(task_weight=1.0, objective=None, schedules=None, **dict.fromkeys(hfdistill.TEACHER_WEIGHTS, 0.0))
    if name is None or recipe.teacher_training:
        run.say("Training the teacher")
        teacher = train("teacher", teacher, teacher_rows, args.seed, **{**alone, **(recipe.teacher_training or {})}).model
    teacher_run = run.evaluate("teacher_evaluation", teacher, replace(args, **alone, output_dir=run.folder("teacher_evaluation")), held_out, tokenizer, compute_metrics)
    refuse_weak_teacher(recipe, teacher_run.metrics, data, metric)

    # ---- Students: alone, distilled, and the control that sees the teacher's labels ----
    def student(seed):
        if recipe.model_name_or_path is not None:
            set_seed(seed)
            return AutoModelForSequenceClassification.from_pretrained(
                recipe.model_name_or_path, revision=recipe.model_revision, cache_dir=recipe.cache_dir,
                trust_remote_code=recipe.trust_remote_code, **label_config(data),
            )
        layers = recipe.student_layers or max(teacher.config.num_hidden_layers // 2, 1)
        layer_map = args.layer_map if args.layer_map not in ("random", "similar", "original") else "uniform"
        return hfdistill.build_student(
            teacher, num_hidden_layers=layers, layer_map=layer_map, copy_weights=recipe.student_init == "teacher", seed=seed,
            **(recipe.student_config or {}),
        )

    from datasets import concatenate_datasets

    mixed = concatenate_datasets([labelled, transfer]) if len(transfer) else labelled
    arms = {"distilled": [], "alone": [], "control": []}
    for seed in recipe.seeds:
        if recipe.baselines:
            run.say(f"Student alone on {len(labelled)} labels, seed {seed}")
            arms["alone"].append(train(f"alone_{seed}", student(seed), labelled, seed, **alone))
            if len(transfer):
                run.say(f"Control: student on the teacher's {len(teacher_rows)} labels, seed {seed}")
                arms["control"].append(train(f"control_{seed}", student(seed), teacher_rows, seed, **alone))
        run.say(f"Student distilled on {len(labelled)} labels and {len(transfer)} unlabelled texts, seed {seed}")
        arms["distilled"].append(train(f"distilled_{seed}", student(seed), mixed, seed, teacher=teacher))

    # ---- What came out ----
    published = arms["distilled"][0]
    published.trainer.args.output_dir = args.output_dir
    published.trainer.save_model(args.output_dir)
    if not args.should_save:
        return None
    results = hfdistill.summarise_runs(
        task=data.description, metric=metric, seeds=recipe.seeds, teacher=teacher_run, arms=arms, example=held_out[0], tokenizer=tokenizer,
        baselines=tfidf_baselines(data) if recipe.baselines and metric == "accuracy" else {}, config_sha256=sha, command=" ".join(["accelerate launch", *sys.argv]),
    )
    hfdistill.publish(results, published.trainer, args)
    return results


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
