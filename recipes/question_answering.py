#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""Distil an extractive question answering model, and measure honestly what it bought.

    accelerate launch recipes/question_answering.py --config recipes/configs/question_answering/stdlib_modernbert_kd.yaml

trains a teacher (or takes one), trains the student alone and under the teacher with the same steps for every seed, and
writes to `output_dir`: the distilled student of the first seed (loads with plain Transformers), `results.json`,
`results.png` and a model card. The student hears the teacher's start and end over all tokens of a window. Without data flags
the embedded task is used, which needs no network: what does this documentation say about a function or class.
"""

from dataclasses import dataclass

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class QuestionAnsweringArguments(hfdistill.RecipeArguments):
    """Data, student and teacher of a question answering run; everything else is in `DistillationTrainingArguments`."""

    dataset_name: str | None = _(None, "A data set on the Hub with the columns of SQuAD: question, context, answers.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data with these columns: csv, json, jsonl or parquet; or the files of SQuAD's web site.")
    validation_file: str | None = _(None, "Held-out data, as train_file.")
    test_file: str | None = _(None, "Held-out data where there is no validation_file.")
    version_2_with_negative: bool = _(False, "Some questions have no answer, as in SQuAD 2.")
    null_score_diff_threshold: float = _(0.0, "How much better than the best answer 'no answer' must be to be given.")
    n_best_size: int = _(20, "Starts and ends of a window that are combined to answers.")
    max_answer_length: int = _(30, "Tokens of the longest answer.")
    labelled_rows: int | None = _(
        None, "Training questions whose answer the student sees; the others are transfer questions, on which it hears the teacher."
    )
    max_seq_length: int = _(384, "Tokens per window; longer contexts make several.")
    doc_stride: int = _(128, "Tokens that two windows of one context share.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")


ARGUMENTS = (QuestionAnsweringArguments, "DistillationTrainingArguments")


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
    pair = hfdistill.ModelPair(recipe, args, "question_answering")
    pair.complete(data.vocabulary_texts, recipe.max_seq_length)

    # The tokenizer of a DistilBERT student makes none, and its BERT teacher would miss them.
    token_types = "token_type_ids" in hfdistill.Capture(pair.teacher, "teacher").columns or None

    def encode(split, **options):
        return hfdistill.encode_spans(
            split,
            pair.tokenizer,
            recipe.max_seq_length,
            recipe.doc_stride,
            recipe.pad_to_max_length,
            return_token_type_ids=token_types,
            num_proc=recipe.preprocessing_num_workers,
            **options,
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {split: encode(rows, for_evaluation=True) for split, rows in data.evaluation.items()}
    mixed = concatenate_datasets([labelled, transfer]) if len(transfer) else labelled
    options = (recipe.n_best_size, recipe.max_answer_length, data.has_unanswerable, recipe.null_score_diff_threshold)
    scorers = {split: hfdistill.AnswerScorer(data.evaluation[split], rows, *options) for split, rows in evaluation.items()}
    reported = next(iter(evaluation))
    held_out, scorer, headline = evaluation[reported], scorers[reported], "f1"

    def measure(trainer):
        output = trainer.predict(held_out, metric_key_prefix="eval")
        answers = [answer["prediction_text"] for answer in scorer.answers(output.predictions)]
        truth = [(answers["text"] or [""])[0] for answers in data.evaluation[reported]["answers"]]
        return output.metrics, answers, truth

    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, data.fingerprint(), evaluate=measure)

    def trainer_for(model, arguments, rows=None, teacher=None):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
            compute_metrics=scorer,
        )
        check_launch(trainer.accelerator)
        return trainer

    teacher_arm = run.finish_teacher(pair, trainer_for, teacher_rows, f"{len(data.teacher_train)} questions with answers")
    readers = hfdistill.reading_baselines(data.evaluation[reported], data.has_unanswerable)
    baselines = {name: scorer.score(answers)[headline] for name, answers in readers.items()}
    refuse_weak_teacher(teacher_arm.metrics[f"eval_{headline}"], baselines["first_sentence"], recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same answers; control on all answers of the teacher ----
    others = hfdistill.label_comparisons(labelled, transfer, teacher_rows, "windows with answers") if recipe.baselines else {}
    datasets = {"train": mixed, "labelled": labelled, "transfer": transfer, "teacher_train": teacher_rows}
    title = f"{len(data.labelled)} questions with and {len(data.transfer)} without answers"
    parts = (recipe, pair.student, trainer_for, datasets, {"teacher": pair.teacher}, headline)
    if instead is not None:
        return instead(run, *parts)
    arms = run.finish_students(*parts, title, others)

    # ---- What came out ----
    run.say("Sizes and latencies")
    inputs = {name: held_out[0][name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in held_out.column_names}
    example = pair.tokenizer.pad([inputs], return_tensors="pt")
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(
        data.description,
        headline,
        recipe.seeds,
        teacher_arm,
        arms,
        example,
        baselines if recipe.baselines else {},
        sha,
        agreement_of=hfdistill.answer_agreement,
    )
    results["evaluation"] = {}
    for split, rows in evaluation.items():
        published.trainer.compute_metrics = scorers[split]
        results["evaluation"][split] = published.trainer.evaluate(rows)
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration on small models from scratch. Rules made the questions (`Return ...` answers what a function returns), and
whoever knows the rules answers all of them. Modules are not shared between training and test part, but near-copies among them are not
grouped. The Python of the run decides the questions."""


def refuse_weak_teacher(value, trivial, allowed):
    """A teacher that reads no better than whoever always gives the first sentence has nothing to teach."""
    if value <= trivial and not allowed:
        raise ValueError(
            f"The teacher's F1 is {value:.1f} on the held-out questions, and always giving the first sentence of the context has "
            f"{trivial:.1f}: the student would learn nothing from it. Fine-tune the teacher on this task (teacher_training), or pass "
            "--allow_weak_teacher true."
        )


def load_data(recipe):
    limits = {"max_train_samples": recipe.max_train_samples, "max_eval_samples": recipe.max_eval_samples}
    about = {"version_2_with_negative": recipe.version_2_with_negative, "dataset_config_name": recipe.dataset_config_name}
    files = hfdistill.named_files(recipe, about)
    if files is None:
        return hfdistill.load_embedded_spans(recipe.labelled_rows, **limits)
    return hfdistill.load_named_spans(
        recipe.dataset_name,
        recipe.dataset_config_name,
        files,
        recipe.version_2_with_negative,
        labelled_rows=recipe.labelled_rows,
        cache_dir=recipe.cache_dir,
        **limits,
    )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
