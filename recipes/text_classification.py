#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""Distil a text classifier, and measure honestly what it bought.

    accelerate launch recipes/text_classification.py --config recipes/configs/text_classification/stdlib_bert_kd.yaml

trains a teacher (or takes one), trains the student alone and under the teacher with the same steps for every seed, and
writes to `output_dir`: the distilled student of the first seed (loads with plain Transformers), `results.json`,
`results.png` and a model card. Without data flags the embedded task is used, which needs no network.
"""

from dataclasses import dataclass

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class TextClassificationArguments(hfdistill.TextDataArguments):
    """Data, student and teacher of a text classification run; everything else is in `DistillationTrainingArguments`."""

    max_seq_length: int = _(128, "Tokens per row; longer texts are cut.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")


ARGUMENTS = (TextClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args, instead=None):
    """Runs the recipe and returns the contents of `results.json`.

    `instead(run, *parts)`, where it is given, takes the place of training the students, and its value is returned; `parts` are what
    `Run.finish_students` takes up to the metric.
    """
    from datasets import concatenate_datasets

    begin(recipe, args)

    # ---- Data, tokenizer, teacher: given by name, or a BERT from scratch ----
    with args.main_process_first(desc="data"):
        data = hfdistill.load_text_data(recipe)
    pair = hfdistill.ModelPair(recipe, args, "sequence", data.label_config)
    if pair.teacher is not None:
        data = hfdistill.match_labels(data, pair.teacher.config)
    pair.complete(data.vocabulary_texts, recipe.max_seq_length, data.label_config)

    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, data.fingerprint())
    headline = "pearson" if data.is_regression else "f1" if data.is_multi_label else "accuracy"
    metric, how = hfdistill.load_metric(headline, "multilabel" if data.is_multi_label else None), {}
    if recipe.task_name:
        headline, metric = hfdistill.GLUE_METRICS[recipe.task_name][0], hfdistill.load_metric("glue", recipe.task_name)
    if data.is_multi_label:
        how = {"average": "micro"}

    def encode(split):
        return hfdistill.encode_texts(
            split,
            pair.tokenizer,
            data.text_columns,
            recipe.max_seq_length,
            recipe.pad_to_max_length,
            recipe.preprocessing_num_workers,
            pair.token_types,
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {split: encode(rows) for split, rows in data.evaluation.items()}
    held_out = next(iter(evaluation.values()))
    mixed = concatenate_datasets([labelled, transfer]) if len(transfer) else labelled

    def trainer_for(model, arguments, rows=None, teacher=None):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
            compute_metrics=hfdistill.metric_function(metric, **how),
        )
        check_launch(trainer.accelerator)
        return trainer

    teacher_arm = run.finish_teacher(pair, trainer_for, teacher_rows, f"{len(teacher_rows)} labelled texts")
    if not data.is_regression:
        hfdistill.refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same labels; control on all labels of the teacher ----
    others = hfdistill.label_comparisons(labelled, transfer, teacher_rows) if recipe.baselines else {}
    datasets = {"train": mixed, "labelled": labelled, "transfer": transfer, "teacher_train": teacher_rows}
    title = f"{len(labelled)} labelled and {len(transfer)} unlabelled texts"
    parts = (recipe, pair.student, trainer_for, datasets, {"teacher": pair.teacher}, headline)
    if instead is not None:
        return instead(run, *parts)
    arms = run.finish_students(*parts, title, others)

    # ---- What came out ----
    baselines = {}
    if recipe.baselines and not data.is_regression:
        run.say("Baselines without a neural network")
        baselines = hfdistill.linear_baselines(data, lambda own, truth: metric.compute(predictions=own, references=truth, **how)[headline])
    run.say("Sizes and latencies")
    example = pair.tokenizer.pad([held_out[0]], return_tensors="pt")
    published = arms["distilled"][0]
    labels_alike = (lambda own, other: float(((own > 0) == (other > 0)).mean())) if data.is_multi_label else None
    results = hfdistill.compare_arms(data.description, headline, recipe.seeds, teacher_arm, arms, example, baselines, sha, labels_alike)
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration: the task is topical, and logistic regression on word counts beats every model of this size on the same labels.
Docstrings of the same module lie on both sides of the split, and near-duplicates are not grouped."""


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
