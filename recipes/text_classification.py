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

from dataclasses import dataclass, replace

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import check_keys, check_launch, config_sha256, parse, use_cpu_threads


@dataclass
class TextClassificationArguments(hfdistill.RecipeArguments):
    """Data, student and teacher of a text classification run; everything else is in `DistillationTrainingArguments`."""

    task_name: str | None = _(None, "A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli.")
    dataset_name: str | None = _(None, "A data set on the Hub.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = _(None, "Held-out data, as train_file.")
    test_file: str | None = _(None, "Held-out data where there is no validation_file.")
    text_column_names: list[str] = _(list, "One or two text columns.")
    label_column_name: str | None = _(None, "Column of the labels.")
    labelled_rows: int | None = _(
        None, "Training rows whose label the student sees; the others are transfer text, on which it hears the teacher."
    )
    max_seq_length: int = _(128, "Tokens per row; longer texts are cut.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")


ARGUMENTS = (TextClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args):
    """Runs the recipe and returns the contents of `results.json`."""
    from datasets import concatenate_datasets

    if args.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is not needed: start the same command again, and arms that were killed go on where they were"
        )
    check_keys(recipe.teacher_training, args.to_dict().keys() - {"output_dir", "push_to_hub"}, "teacher_training")
    use_cpu_threads(args, recipe.cpu_threads)

    # ---- Data, tokenizer, teacher: given by name, or a BERT from scratch ----
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    pair = hfdistill.ModelPair(recipe, args, "sequence", label_config(data))
    if pair.teacher is not None:
        data = hfdistill.match_labels(data, pair.teacher.config)
    pair.complete(data.vocabulary_texts, recipe.max_seq_length, label_config(data))

    sha = config_sha256((recipe, args))
    folders = [recipe.teacher_model_name_or_path, recipe.model_name_or_path, recipe.tokenizer_name]
    run = hfdistill.Run(args, hfdistill.run_fingerprint(sha, data.fingerprint(), folders), overwrite=recipe.overwrite_output_dir)
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

    def settings(arm, **changes):
        return replace(args, output_dir=run.folder(arm), push_to_hub=False, **changes)

    alone = {"task_weight": 1.0, "objective": None, "schedules": None, **dict.fromkeys(hfdistill.TEACHER_WEIGHTS, 0.0)}
    if pair.needs_teacher_training:
        run.say(f"Teacher: {len(teacher_rows)} labelled texts")
        own = settings("teacher", **{**alone, **(recipe.teacher_training or {})})
        teacher_arm = run.finish("teacher", trainer_for(pair.teacher, own, teacher_rows))
    else:
        run.say("Teacher: measured as it is")
        teacher_arm = run.measure("teacher", trainer_for(pair.teacher, settings("teacher", **alone)))
    pair.teacher = teacher_arm.model
    if not data.is_regression:
        hfdistill.refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same labels; control on all labels of the teacher ----
    arms = {"alone": [], "control": [], "distilled": []}
    for seed in recipe.seeds:
        run.say(f"Seed {seed}: student distilled, {len(labelled)} labelled and {len(transfer)} unlabelled texts")
        student, name = pair.student(seed, run.say if seed == recipe.seeds[0] else None), f"distilled_{seed}"
        if recipe.stages:
            arm = run.finish_stages(
                name,
                recipe.stages,
                student,
                seed=seed,
                datasets={"train": mixed, "labelled": labelled, "transfer": transfer, "teacher_train": teacher_rows},
                teachers={"teacher": pair.teacher},
                trainer_for=trainer_for,
                build=lambda sizes, seed=seed: pair.student(seed, **sizes),
                metric=headline,
            )
        else:
            arm = run.finish(name, trainer_for(student, settings(name, seed=seed), mixed, pair.teacher))
        arms["distilled"].append(arm)
        same = {"max_steps": arm.steps} if recipe.stages else {}
        if recipe.baselines:
            run.say(f"Seed {seed}: student alone, {len(labelled)} labelled texts")
            trainer = trainer_for(pair.student(seed), settings(f"alone_{seed}", seed=seed, **{**alone, **same}), labelled)
            arms["alone"].append(run.finish(f"alone_{seed}", trainer))
        if recipe.baselines and len(transfer):
            run.say(f"Seed {seed}: control, student on the teacher's {len(teacher_rows)} labelled texts")
            trainer = trainer_for(pair.student(seed), settings(f"control_{seed}", seed=seed, **{**alone, **same}), teacher_rows)
            arms["control"].append(run.finish(f"control_{seed}", trainer))

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


def label_config(data):
    names = dict(enumerate(data.label_names))
    labels = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    return {**labels, "problem_type": data.problem_type} if data.is_multi_label else labels


def load_data(recipe):
    files = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
    files = {split: path for split, path in files.items() if path}
    columns = {"text_column_names": recipe.text_column_names, "label_column_name": recipe.label_column_name}
    if not (recipe.task_name or recipe.dataset_name or files):
        for flag, value in columns.items():
            if value:
                raise ValueError(f"--{flag} {value} names columns of your own data, but none is given. Pass --train_file or --dataset_name")
        return hfdistill.load_embedded(
            recipe.labelled_rows, max_train_samples=recipe.max_train_samples, max_eval_samples=recipe.max_eval_samples
        )
    return hfdistill.load_named(
        recipe.task_name,
        recipe.dataset_name,
        recipe.dataset_config_name,
        files,
        **columns,
        labelled_rows=recipe.labelled_rows,
        max_train_samples=recipe.max_train_samples,
        max_eval_samples=recipe.max_eval_samples,
        cache_dir=recipe.cache_dir,
    )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
