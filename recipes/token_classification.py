#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[ner,plots]"]
# ///
"""Distil a token classifier (named entities, parts of speech, punctuation), and measure honestly what it bought.

    accelerate launch recipes/token_classification.py --config recipes/configs/token_classification/stdlib_modernbert_kd.yaml

trains a teacher (or takes one), trains the student alone and under the teacher with the same steps for every seed, and
writes to `output_dir`: the distilled student of the first seed (loads with plain Transformers), `results.json`,
`results.png` and a model card. The teacher is listened to at the first sub-token of each word, as labels are. Without data
flags the embedded task is used, which needs no network: putting the punctuation back into documentation.
"""

from dataclasses import dataclass

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class TokenClassificationArguments(hfdistill.RecipeArguments):
    """Data, student and teacher of a token classification run; everything else is in `DistillationTrainingArguments`."""

    task_name: str = _("ner", "Which labels of the data: the column {task_name}_tags, as in ner_tags or pos_tags.")
    dataset_name: str | None = _(None, "A data set on the Hub.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data: json, jsonl or parquet with a list of words and a list of labels in each row.")
    validation_file: str | None = _(None, "Held-out data, as train_file.")
    test_file: str | None = _(None, "Held-out data where there is no validation_file.")
    text_column_name: str | None = _(None, "Column of the words. Default: tokens, else the first.")
    label_column_name: str | None = _(None, "Column of the labels. Default: {task_name}_tags, else the second.")
    labelled_rows: int | None = _(
        None, "Training rows whose labels the student sees; the others are transfer text, on which it hears the teacher."
    )
    max_seq_length: int = _(128, "Sub-tokens per row; words behind them are cut off.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")
    packing: bool = _(False, "Lay the rows of a training batch side by side, each read alone, instead of padding them.")
    label_all_tokens: bool = _(False, "Every sub-token has the label of its word and hears the teacher, instead of the first one only.")
    token_metric: str = _(
        "auto",
        "span_f1 (whole entities, needs seqeval), token_f1 (single tokens, O left out), or auto: span_f1 for labels such as B-PER "
        "where seqeval is installed.",
        choices=["auto", "span_f1", "token_f1"],
    )


ARGUMENTS = (TokenClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args, instead=None):
    """Runs the recipe and returns the contents of `results.json`.

    `instead(run, *parts)`, where it is given, takes the place of training the students, and its value is returned; `parts` are what
    `Run.finish_students` takes up to the metric.
    """
    from datasets import concatenate_datasets

    begin(recipe, args)

    # ---- Data, tokenizer, teacher: given by name, or a BERT from scratch ----
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    pair = hfdistill.ModelPair(recipe, args, "token", data.label_config)
    if pair.teacher is not None:
        data = hfdistill.match_labels(data, pair.teacher.config)
    pair.complete(data.vocabulary_texts, recipe.max_seq_length, data.label_config)
    if not hfdistill.reads_words_apart(pair.tokenizer):  # RoBERTa, GPT-2
        pair.tokenizer = type(pair.tokenizer).from_pretrained(pair.tokenizer.name_or_path, add_prefix_space=True, **pair.options)

    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, data.fingerprint())
    headline = choose_metric(recipe, data.label_names, run.say)
    metric = hfdistill.load_metric(headline)

    def encode(split):
        return hfdistill.encode_tokens(
            split,
            pair.tokenizer,
            data.words,
            recipe.max_seq_length,
            data.label_names,
            recipe.label_all_tokens,
            recipe.pad_to_max_length,
            recipe.preprocessing_num_workers,
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {split: encode(rows) for split, rows in data.evaluation.items()}
    held_out = next(iter(evaluation.values()))
    mixed = concatenate_datasets([labelled, transfer]) if len(transfer) else labelled
    collator = hfdistill.TokenCollator(pair.tokenizer)
    collator = hfdistill.PackingCollator(collator) if recipe.packing else collator

    def trainer_for(model, arguments, rows=None, teacher=None):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
            compute_metrics=hfdistill.tag_metric_function(metric, data.label_names),
        )
        check_launch(trainer.accelerator)
        return trainer

    teacher_arm = run.finish_teacher(pair, trainer_for, teacher_rows, f"{len(teacher_rows)} labelled texts")
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
    def score(guesses, truth):
        return hfdistill.score_tags(metric, guesses, truth, data.label_names)[headline]

    def agreement(student, teacher):
        words = teacher_arm.labels != -100
        return hfdistill.agreement(student[words], teacher[words])

    baselines = {}
    if recipe.baselines:
        run.say("Baselines without a neural network")
        baselines = hfdistill.window_baselines(data, score)
    run.say("Sizes and latencies")
    example = collator([held_out[0]])
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(
        data.description, headline, recipe.seeds, teacher_arm, arms, example, baselines, sha, agreement_of=agreement
    )
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration: documentation leaves out many full stops and commas that a careful writer would set, and the labels are what is
there. The end of a text is never asked for. Near-duplicates among documents are not grouped."""


def choose_metric(recipe, label_names, say):
    """`span_f1` where labels mark entities and seqeval is there, else `token_f1`, said aloud."""
    if recipe.token_metric != "auto":
        return recipe.token_metric
    if not hfdistill.marks_spans(label_names):
        return "token_f1"
    if not hfdistill.has_seqeval():
        say("seqeval is not installed, so tokens are counted instead of whole entities (`pip install hfdistill[ner]` for those)")
        return "token_f1"
    return "span_f1"


def load_data(recipe):
    columns = {"text_column_name": recipe.text_column_name, "label_column_name": recipe.label_column_name}
    limits = {"max_train_samples": recipe.max_train_samples, "max_eval_samples": recipe.max_eval_samples}
    files = hfdistill.named_files(recipe, {**columns, "dataset_config_name": recipe.dataset_config_name})
    if files is None:
        return hfdistill.load_embedded_tokens(recipe.labelled_rows, **limits)
    return hfdistill.load_named_tokens(
        recipe.dataset_name,
        recipe.dataset_config_name,
        files,
        **columns,
        **limits,
        task_name=recipe.task_name,
        labelled_rows=recipe.labelled_rows,
        cache_dir=recipe.cache_dir,
    )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
