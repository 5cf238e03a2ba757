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

from dataclasses import dataclass, field, replace

import hfdistill
from hfdistill.cli import check_keys, check_launch, config_sha256, parse, use_cpu_threads


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
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        set_seed,
    )

    if args.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is not needed: start the same command again, and arms that were killed go on where they were"
        )
    check_keys(recipe.teacher_config, BertConfig().to_dict(), "teacher_config")
    check_keys(recipe.teacher_training, args.to_dict().keys() - {"output_dir", "push_to_hub"}, "teacher_training")
    use_cpu_threads(args, recipe.cpu_threads)
    say = print if args.should_log else lambda *_: None

    # ---- Data, tokenizer, teacher: given by name, or a BERT from scratch ----
    say("\n== Data")
    teacher_name, student_name = recipe.teacher_model_name_or_path, recipe.model_name_or_path
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    options = {"cache_dir": recipe.cache_dir, "trust_remote_code": recipe.trust_remote_code}
    if teacher_name is not None:
        names = label_config(data) if recipe.teacher_training else {}
        teacher = hfdistill.load_teacher(teacher_name, "sequence", {**options, **names, **(args.teacher_model_init_kwargs or {})})
        data = hfdistill.match_labels(data, teacher.config)
    labels = label_config(data)
    if recipe.tokenizer_name or student_name or teacher_name:
        own = recipe.tokenizer_name or student_name or teacher_name
        tokenizer = hfdistill.load_named_part(AutoTokenizer, own, "tokenizer", **options)
    else:
        with args.main_process_first(desc="tokenizer"):
            tokenizer = hfdistill.train_wordpiece(data.vocabulary_texts, vocab_size=recipe.vocab_size, max_length=recipe.max_seq_length)
    vocabulary = len(tokenizer)
    if student_name is not None:
        student_config = hfdistill.load_named_part(AutoConfig, student_name, "student", revision=recipe.model_revision, **options)
        vocabulary = student_config.vocab_size
    if teacher_name is not None:
        teacher.config.id2label, teacher.config.label2id = labels["id2label"], labels["label2id"]
        teacher_tokenizer = hfdistill.load_tokenizer(teacher_name)
        hfdistill.resolve_vocabulary(
            vocabulary if student_name else teacher.config.vocab_size, teacher.config.vocab_size, tokenizer, teacher_tokenizer
        )
    else:
        teacher_tokenizer = tokenizer
        sizes = {"max_position_embeddings": recipe.max_seq_length, **(recipe.teacher_config or {})}
        set_seed(args.seed)
        teacher = BertForSequenceClassification(BertConfig(vocab_size=vocabulary, pad_token_id=tokenizer.pad_token_id, **labels, **sizes))

    sha = config_sha256((recipe, args))
    folders = [teacher_name, student_name, recipe.tokenizer_name]
    run = hfdistill.Run(args, hfdistill.run_fingerprint(sha, data.fingerprint(), folders), overwrite=recipe.overwrite_output_dir)
    headline = hfdistill.GLUE_METRICS[recipe.task_name][0] if recipe.task_name else "pearson" if data.is_regression else "accuracy"
    metric = hfdistill.load_metric("glue", recipe.task_name) if recipe.task_name else hfdistill.load_metric(headline)

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
            teacher_processing_class=teacher_tokenizer,
            compute_metrics=hfdistill.metric_function(metric),
        )
        check_launch(trainer.accelerator)
        return trainer

    alone = {"task_weight": 1.0, "objective": None, "schedules": None, **dict.fromkeys(hfdistill.TEACHER_WEIGHTS, 0.0)}
    if teacher_name is None or recipe.teacher_training:
        run.say(f"Teacher: {len(teacher_rows)} labelled texts")
        teacher_arm = run.finish("teacher", trainer_for("teacher", teacher, teacher_rows, **{**alone, **(recipe.teacher_training or {})}))
    else:
        run.say("Teacher: measured as it is")
        teacher_arm = run.measure("teacher", trainer_for("teacher", teacher, **alone))
    teacher = teacher_arm.model
    if not data.is_regression:
        hfdistill.refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same labels; control on all labels of the teacher ----
    layers, copied = recipe.student_layers or max(teacher.config.num_hidden_layers // 2, 1), args.layer_map
    if copied not in ("random", "similar", "original"):
        pairs = hfdistill.resolve_layer_map(copied, layers, teacher.config.num_hidden_layers)
    if copied in ("random", "similar", "original") or [s for s, _ in pairs] != list(range(layers)):
        copied = "uniform"
        if student_name is None and recipe.student_init == "teacher":
            run.say(f"Weights are copied by 'uniform': {args.layer_map!r} does not give each student block one teacher block")

    def student(seed):
        set_seed(seed)
        if student_name is not None:
            return hfdistill.load_named_part(
                AutoModelForSequenceClassification, student_name, "student", revision=recipe.model_revision, **options, **labels
            )
        copy_weights = recipe.student_init == "teacher"
        built = hfdistill.build_student(
            teacher, layers, layer_map=copied, copy_weights=copy_weights, seed=seed, **(recipe.student_config or {})
        )
        if seed == recipe.seeds[0] and copy_weights:
            run.say(f"Student from teacher: {built.copy_report}")
        return built

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
    if recipe.baselines and not data.is_regression:
        run.say("Baselines without a neural network")
        baselines = hfdistill.linear_baselines(data, lambda guesses, truth: metric.compute(predictions=guesses, references=truth)[headline])
    run.say("Sizes and latencies")
    example = tokenizer.pad([held_out[0]], return_tensors="pt")
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(data.description, headline, recipe.seeds, teacher_arm, arms, example, baselines, sha)
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration: the task is topical, and logistic regression on word counts beats every model of this size on the same labels.
Docstrings of the same module lie on both sides of the split, and near-duplicates are not grouped."""


def label_config(data):
    names = dict(enumerate(data.label_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


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
