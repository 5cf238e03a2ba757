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

import sys
from dataclasses import dataclass, field, replace

import hfdistill
from hfdistill.cli import check_launch, config_sha256, parse, use_cpu_threads


def _(default, text, **more):
    return (
        field(default_factory=default, metadata={"help": text})
        if callable(default)
        else field(default=default, metadata={"help": text, **more})
    )


@dataclass
class TextClassificationArguments:
    """Data, student and teacher of a text classification run; everything else is in `DistillationTrainingArguments`."""

    model_name_or_path: str | None = _(None, "Student checkpoint (folder or Hub id). Default: built from the teacher.")
    student_layers: int | None = _(None, "Blocks of a student built from the teacher. Default: half of the teacher's.")
    student_config: dict | None = _(
        None, "Further sizes of a student built from the teacher: hidden_size, num_attention_heads, intermediate_size, ..."
    )
    student_init: str = _(
        "teacher", "Weights of a student built from the teacher: copied by layer_map, or random.", choices=["teacher", "random"]
    )
    teacher_model_name_or_path: str | None = _(None, "Teacher checkpoint (folder or Hub id). Default: a BERT trained from scratch.")
    teacher_config: dict | None = _(None, "Sizes of a teacher trained from scratch, as in BertConfig.")
    teacher_training: dict | None = _(
        None, "Training arguments of the teacher, such as max_steps; set to fine-tune a given checkpoint too."
    )
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
    labelled_rows: int | None = _(
        None, "Training rows whose label the student sees; the others are transfer text, on which it hears the teacher."
    )
    max_seq_length: int = _(128, "Tokens per row; longer texts are cut.")
    pad_to_max_length: bool = _(False, "Pad to max_seq_length instead of to the longest row of a batch.")
    vocab_size: int = _(3000, "Pieces of the tokenizer trained for a teacher from scratch.")
    max_train_samples: int | None = _(None, "Use only that many training rows.")
    max_eval_samples: int | None = _(None, "Use only that many rows of each held-out split.")
    preprocessing_num_workers: int | None = _(None, "Processes for tokenizing.")
    seeds: list[int] = _(lambda: [0, 1, 2], "Seeds of the student; the first one is published.")
    baselines: bool = _(True, "Also train the student alone, the control on the teacher's labels, and TF-IDF with logistic regression.")
    cpu_threads: int | None = _(
        None, "Threads of each process on CPU. Default: all cores, shared among processes; `accelerate launch` alone would leave one."
    )
    overwrite_output_dir: bool = _(False, "Start anew in an output_dir that holds another run.")


ARGUMENTS = (TextClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args):
    """Runs the recipe and returns the contents of `results.json`."""
    from datasets import concatenate_datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    use_cpu_threads(args, recipe.cpu_threads)
    sha = config_sha256((recipe, args))
    run = hfdistill.Run(args, sha, overwrite=recipe.overwrite_output_dir)
    run.say("Data")
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    metric = (
        hfdistill.load_metric("glue", recipe.task_name)
        if recipe.task_name
        else hfdistill.load_metric("pearson" if data.is_regression else "accuracy")
    )
    headline = GLUE_METRICS[recipe.task_name][0] if recipe.task_name else ("pearson" if data.is_regression else "accuracy")

    # ---- Teacher: given by name, or a BERT from scratch ----
    name = recipe.teacher_model_name_or_path
    if name is None:
        with args.main_process_first(desc="tokenizer"):
            tokenizer = hfdistill.train_wordpiece(data.vocabulary_texts, vocab_size=recipe.vocab_size, max_length=recipe.max_seq_length)
        sizes = {"max_position_embeddings": recipe.max_seq_length, **(recipe.teacher_config or {})}
        labels = label_config(data)
        set_seed(args.seed)
        teacher = BertForSequenceClassification(
            BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **labels, **sizes)
        )
    else:
        own = recipe.tokenizer_name or recipe.model_name_or_path or name
        tokenizer = AutoTokenizer.from_pretrained(own, cache_dir=recipe.cache_dir)
        options = {"cache_dir": recipe.cache_dir, **(label_config(data) if recipe.teacher_training else {})}
        teacher = hfdistill.load_teacher(name, "sequence", {**options, **(args.teacher_model_init_kwargs or {})})
        data = hfdistill.match_labels(data, teacher.config)
        labels = label_config(data)
        teacher.config.id2label, teacher.config.label2id = labels["id2label"], labels["label2id"]

    def encode(split):
        return hfdistill.encode_texts(
            split, tokenizer, data.text_columns, recipe.max_seq_length, recipe.pad_to_max_length, recipe.preprocessing_num_workers
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {split: encode(rows) for split, rows in data.evaluation.items()}
    held_out = next(iter(evaluation.values()))

    def trainer_for(arm, model, rows=None, teacher=None, **settings):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=replace(args, output_dir=run.folder(arm), push_to_hub=False, **settings),
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            teacher_processing_class=hfdistill.load_tokenizer(name) if teacher is not None and name else None,
            compute_metrics=hfdistill.metric_function(metric),
        )
        check_launch(trainer.accelerator)
        return trainer

    alone = {"task_weight": 1.0, "objective": None, "schedules": None, **dict.fromkeys(hfdistill.TEACHER_WEIGHTS, 0.0)}
    if name is None or recipe.teacher_training:
        run.say(f"Teacher: {len(teacher_rows)} labelled texts")
        teacher_arm = run.finish("teacher", trainer_for("teacher", teacher, teacher_rows, **{**alone, **(recipe.teacher_training or {})}))
    else:
        run.say("Teacher: measured as it is")
        teacher_arm = run.measure("teacher", trainer_for("teacher", teacher, **alone))
    teacher = teacher_arm.model
    if not data.is_regression:
        refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same labels; control on all labels of the teacher ----
    def student(seed):
        set_seed(seed)
        if recipe.model_name_or_path is not None:
            return AutoModelForSequenceClassification.from_pretrained(
                recipe.model_name_or_path,
                revision=recipe.model_revision,
                cache_dir=recipe.cache_dir,
                trust_remote_code=recipe.trust_remote_code,
                **labels,
            )
        return hfdistill.build_student(
            teacher,
            num_hidden_layers=recipe.student_layers or max(teacher.config.num_hidden_layers // 2, 1),
            seed=seed,
            layer_map="uniform" if args.layer_map in ("random", "similar", "original", "skip") else args.layer_map,
            copy_weights=recipe.student_init == "teacher",
            **(recipe.student_config or {}),
        )

    mixed = concatenate_datasets([labelled, transfer]) if len(transfer) else labelled
    arms = {"alone": [], "control": [], "distilled": []}
    for seed in recipe.seeds:
        if recipe.baselines:
            run.say(f"Seed {seed}: student alone, {len(labelled)} labelled texts")
            arms["alone"].append(run.finish(f"alone_{seed}", trainer_for(f"alone_{seed}", student(seed), labelled, seed=seed, **alone)))
        if recipe.baselines and len(transfer):
            run.say(f"Seed {seed}: control, student on the teacher's {len(teacher_rows)} labelled texts")
            arms["control"].append(
                run.finish(f"control_{seed}", trainer_for(f"control_{seed}", student(seed), teacher_rows, seed=seed, **alone))
            )
        run.say(f"Seed {seed}: student distilled, {len(labelled)} labelled and {len(transfer)} unlabelled texts")
        arms["distilled"].append(
            run.finish(f"distilled_{seed}", trainer_for(f"distilled_{seed}", student(seed), mixed, teacher, seed=seed))
        )

    # ---- What came out ----
    baselines = {}
    if recipe.baselines and headline == "accuracy":
        run.say("Baselines without a neural network")
        baselines = linear_baselines(data)
    published = arms["distilled"][0]
    run.say("Sizes and latencies")
    results = hfdistill.compare_arms(
        data.description,
        headline,
        recipe.seeds,
        teacher_arm,
        arms,
        tokenizer.pad([held_out[0]], return_tensors="pt"),
        teacher_arm.seconds,
        baselines,
        sha,
        " ".join(["accelerate launch", *sys.argv]),
    )
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


GLUE_METRICS = hfdistill.GLUE_METRICS
LIMITS = """A demonstration: the task is topical, and logistic regression on word counts beats every model of this size on the same labels.
Docstrings of the same module lie on both sides of the split, and near-duplicates are not grouped."""


def label_config(data):
    names = dict(enumerate(data.label_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def load_data(recipe):
    files = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
    files = {split: path for split, path in files.items() if path}
    if not (recipe.task_name or recipe.dataset_name or files):
        return hfdistill.load_embedded(recipe.labelled_rows)
    return hfdistill.load_named(
        recipe.task_name,
        recipe.dataset_name,
        recipe.dataset_config_name,
        files,
        recipe.text_column_names,
        recipe.label_column_name,
        recipe.labelled_rows,
        recipe.max_train_samples,
        recipe.max_eval_samples,
        cache_dir=recipe.cache_dir,
    )


def linear_baselines(data):
    """Accuracy of TF-IDF + logistic regression on the student's labels, on the teacher's, and of the majority class."""
    test = next(iter(data.evaluation.values()))
    texts = {
        id(split): [" ".join(row) for row in zip(*(split[column] for column in data.text_columns))]
        for split in (test, data.labelled, data.teacher_train)
    }

    def accuracy(split):
        guesses = hfdistill.tfidf_logistic_regression(texts[id(split)], split["label"], texts[id(test)])
        return float((guesses == test["label"]).mean())

    values = {"tfidf_logreg": accuracy(data.labelled)}
    if len(data.transfer):
        values["tfidf_logreg_teacher_labels"] = accuracy(data.teacher_train)
    return {**values, "majority": hfdistill.majority_share(test["label"])}


def refuse_weak_teacher(teacher, allowed):
    """A teacher that has learnt nothing has nothing to teach."""
    right = float((teacher.logits.argmax(-1) == teacher.labels).mean())
    majority = hfdistill.majority_share(teacher.labels)
    if right <= majority and not allowed:
        raise ValueError(
            f"The teacher is right on {right:.3f} of the held-out rows, and always answering the most frequent label on {majority:.3f}: "
            "the student "
            "would learn nothing from it. Fine-tune the teacher on this task (teacher_training), check that its labels are in the order "
            "of the data, or "
            "pass --allow_weak_teacher true."
        )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
