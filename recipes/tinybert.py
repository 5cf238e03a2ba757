#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""TinyBERT (https://huggingface.co/papers/1909.10351): a masked language model teaches, then a fine-tuned one, on augmented text.

    accelerate launch recipes/tinybert.py --config recipes/configs/tinybert/stdlib_tinybert.yaml

trains the student of every seed in three stages (`general` on a corpus, `intermediate` and `prediction` on the task with
augmented text), and with as many steps the same student on its labels alone and on soft targets alone. To `output_dir` go the
student of the first seed (loads with plain Transformers), `results.json`, `results.png` and a model card. Without data flags the
embedded task and corpus are used, which need no network; both teachers are then trained from scratch.
"""

from dataclasses import dataclass, replace

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


# The paper: "20 epochs", "10 epochs for the challenging task of MNLI, QQP and QNLI", "50 epochs for CoLA"; 64 tokens for
# single sentences, 128 for pairs (section 4.2).
EPOCHS = {"cola": 50, "mnli": 10, "qnli": 10, "qqp": 10}
SINGLE_SENTENCES = ("cola", "sst2")

FEATURES = {"embedding_weight": 1.0, "hidden_weight": 1.0, "attention_weight": 1.0, "layer_reduction": "sum", "adapter": "shared"}
STAGES = [
    {"name": "general", "data": "corpus", "teacher": "general", **FEATURES},
    {"name": "intermediate", "data": "augmented", **FEATURES},
    {"name": "prediction", "data": "augmented", "kd_weight": 1.0, "temperature": 1.0, "num_train_epochs": 3},
]


@dataclass
class TinyBertArguments(hfdistill.TextDataArguments):
    """Task, corpus, both teachers and the student; objectives and lengths are in `stages` and `DistillationTrainingArguments`."""

    general_teacher_name_or_path: str | None = _(
        None, "Masked language model (folder or Hub id): teacher of the general stage and source of augmentation. Default: trained here."
    )
    general_teacher_training: dict | None = _(None, "Training arguments of a masked language model trained here, such as max_steps.")
    general_teacher_mlm_probability: float | None = _(None, "Share of tokens that are masked in that training. Default: 0.15.")
    corpus_dataset_names: list[str] = _(list, "Corpus of the general stage: Hub data sets, each name, name:configuration or name@revision.")
    corpus_file: str | None = _(None, "Corpus of the general stage: txt, csv, tsv, json, jsonl or parquet.")
    corpus_streaming: bool = _(False, "Never load the whole corpus; the general stage then needs max_steps.")
    corpus_seq_length: int | None = _(None, "Tokens per row of the corpus. Default: max_seq_length.")
    max_corpus_documents: int | None = _(None, "Use only that many documents of the corpus.")
    max_seq_length: int | None = _(None, "Tokens per row; longer texts are cut. Default: 64 for cola and sst2, else 128.")
    augmentation_copies: int | None = _(None, "Copies of each text at most. Default: the authors' number for a GLUE task, else 20.")
    augmentation_candidates: int = _(15, "Words of which one replaces a word.")
    augmentation_probability: float = _(0.4, "Share of the words that are replaced.")
    augmentation_cache_dir: str | None = _(None, "Folder where augmented texts are kept for other runs. Default: inside output_dir.")
    baseline_steps: int | None = _(
        None, "Steps of the students alone and on soft targets alone. Default: as many as those of all stages together."
    )


ARGUMENTS = (TinyBertArguments, "DistillationTrainingArguments")


def main(recipe, args):
    """Runs the recipe and returns the contents of `results.json`."""
    from transformers import set_seed

    begin(recipe, args)
    recipe = with_task_defaults(recipe, args)
    if recipe.prune_vocabulary:
        raise ValueError("prune_vocabulary would give the two teachers and the student different tokens. Leave it out")
    for name in ("general_teacher_training", "general_teacher_mlm_probability"):
        if getattr(recipe, name) not in (None, {}) and recipe.general_teacher_name_or_path:
            raise ValueError(
                f"{name} would have no effect: the general teacher is given by name and is not trained. Leave one of both out, in the YAML "
                "too"
            )
    teaches_general = recipe.teacher_model_name_or_path is None or recipe.augmentation_copies > 0 or uses(recipe, "teacher", "general")
    trains_general = teaches_general and recipe.general_teacher_name_or_path is None

    # ---- Data: the task, and a corpus that shares no text with its held-out part ----
    with args.main_process_first(desc="data"):
        data = hfdistill.load_text_data(recipe)
        corpus = load_corpus(recipe, data) if trains_general or uses(recipe, "data", "corpus") else None
    if data.is_multi_label:
        raise ValueError(
            "The labels are lists: TinyBERT's prediction stage is defined for one label a text (and for scores). Use "
            "recipes/text_classification.py, which takes several labels and has 'stages' too"
        )
    sha = config_sha256((recipe, args))
    texts = data.fingerprint() + (corpus.fingerprint() if corpus else "")
    corpus_length = recipe.corpus_seq_length or recipe.max_seq_length
    asked = None  # the masked tokens on which a masked language model is measured

    def measure(trainer):
        if asked is None or trainer.eval_dataset is not asked:
            output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
            return output.metrics, output.predictions, output.label_ids
        model = trainer.accelerator.unwrap_model(trainer.model)
        scores = hfdistill.language_model_scores(model, asked, trainer.data_collator)
        return {f"eval_{name}": value for name, value in scores.items()}, [], []

    run = hfdistill.open_run(recipe, args, sha, texts, evaluate=measure)
    headline = hfdistill.GLUE_METRICS[recipe.task_name][0] if recipe.task_name else "pearson" if data.is_regression else "accuracy"
    metric = hfdistill.load_metric("glue", recipe.task_name) if recipe.task_name else hfdistill.load_metric(headline)

    # ---- General teacher: a masked language model that does not know the task ----
    general, general_arm, corpus_rows = None, None, None
    if teaches_general:
        given = recipe.general_teacher_name_or_path
        own = replace(recipe, teacher_model_name_or_path=given, model_name_or_path=None, teacher_training=None)
        general = hfdistill.ModelPair(own, args, "masked_lm")
        general.complete(corpus.sample() if trains_general else (), max(corpus_length, recipe.max_seq_length))
    if corpus is not None:
        tokenizer = general.tokenizer if general else hfdistill.load_tokenizer(recipe.teacher_model_name_or_path)
        corpus_rows = hfdistill.encode_corpus(corpus.train, tokenizer, corpus_length, streaming=corpus.streaming, seed=args.seed)
        held_out_rows = hfdistill.encode_corpus(corpus.held_out, tokenizer, corpus_length)
    if trains_general:
        share = recipe.general_teacher_mlm_probability
        collator = hfdistill.MaskingCollator(general.tokenizer, 0.15 if share is None else share, seed=args.seed)
        asked = hfdistill.MaskingCollator(general.tokenizer, seed=args.seed).mask_dataset(held_out_rows)
        run.say(f"General teacher: a masked language model on {corpus.description}")
        trainer = hfdistill.DistillationTrainer(
            model=general.teacher,
            args=run.settings("general_teacher", **{**hfdistill.WITHOUT_TEACHER, **(recipe.general_teacher_training or {})}),
            data_collator=collator,
            train_dataset=corpus_rows,
            eval_dataset=asked,
            processing_class=general.tokenizer,
        )
        check_launch(trainer.accelerator)
        general_arm = run.finish("general_teacher", trainer)
        general.teacher = trainer.accelerator.unwrap_model(general_arm.model, keep_fp32_wrapper=False).eval()
        trainer.accelerator.wait_for_everyone()  # all processes read its folder now

    # ---- Task teacher: given, or the general one fine-tuned on the task ----
    if recipe.teacher_model_name_or_path is None:
        source = recipe.general_teacher_name_or_path or run.folder("general_teacher")
        tuning = recipe.teacher_training or {"max_steps": args.max_steps}
        recipe = replace(recipe, teacher_model_name_or_path=source, teacher_training=tuning)
    set_seed(args.seed)
    pair = hfdistill.ModelPair(recipe, args, "sequence", data.label_config)
    if trains_general and recipe.teacher_model_name_or_path == run.folder("general_teacher"):
        pair.teacher.config._name_or_path = ""  # a folder of this run names no model that others have
    data = hfdistill.match_labels(data, pair.teacher.config)
    pair.complete(entries=data.label_config)

    def encode(split):
        return hfdistill.encode_texts(
            split,
            pair.tokenizer,
            data.text_columns,
            recipe.max_seq_length,
            num_proc=recipe.preprocessing_num_workers,
            return_token_type_ids=pair.token_types,
        )

    with args.main_process_first(desc="tokenizing"):
        teacher_rows, labelled, transfer = encode(data.teacher_train), encode(data.labelled), encode(data.transfer)
        evaluation = {split: encode(rows) for split, rows in data.evaluation.items()}
    held_out = next(iter(evaluation.values()))

    def trainer_for(model, arguments, rows=None, teacher=None):
        from_general = general is not None and teacher is general.teacher
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=pair.tokenizer,
            teacher_processing_class=general.teacher_tokenizer if from_general else pair.teacher_tokenizer,
            compute_metrics=hfdistill.metric_function(metric),
        )
        check_launch(trainer.accelerator)
        return trainer

    teacher_arm = run.finish_teacher(pair, trainer_for, teacher_rows, f"{len(teacher_rows)} labelled texts")
    if not data.is_regression:
        hfdistill.refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Augmented text: a copy has no label, its source keeps the one it has ----
    original = join(data.labelled, data.transfer, data.text_columns)
    run.say(f"Augmentation: up to {recipe.augmentation_copies} copies of {len(original)} texts")
    with args.main_process_first(desc="augmentation"):
        more = original.remove_columns("label")
        if recipe.augmentation_copies:
            more = hfdistill.augment_texts(
                more,
                data.text_columns,
                general.teacher.to(args.device),
                general.tokenizer,
                copies=recipe.augmentation_copies,
                candidates=recipe.augmentation_candidates,
                probability=recipe.augmentation_probability,
                batch_size=args.per_device_eval_batch_size,
                seed=args.seed,
                max_length=recipe.max_seq_length,
                cache_dir=recipe.augmentation_cache_dir or run.folder("augmented"),
            )
        labels = [*original["label"], *[hidden_label(data)] * (len(more) - len(original))]
        mixed, augmented = encode(original), encode(more.select_columns(list(data.text_columns)).add_column("label", labels))
    run.say(f"Augmentation: {len(augmented)} texts")

    # ---- Students: in three stages; then alone and on soft targets alone, each with as many steps ----
    datasets = {"augmented": augmented, "train": mixed, "labelled": labelled, "transfer": transfer, "teacher_train": teacher_rows}
    if corpus_rows is not None:
        datasets["corpus"] = corpus_rows
    teachers = {"teacher": pair.teacher, **({"general": general.teacher} if general else {})}
    others = {}
    if recipe.baselines:
        steps, title = recipe.baseline_steps, f"student alone, {len(labelled)} labelled texts"
        others["alone"] = hfdistill.Comparison(title, labelled, hfdistill.WITHOUT_TEACHER, steps=steps)
        others["kd_alone"] = hfdistill.Comparison("student on soft targets alone, the same texts", augmented, {}, pair.teacher, steps)
    title = f"{len(augmented)} texts"
    arms = run.finish_students(recipe, pair.student, trainer_for, datasets, teachers, headline, title, others)

    # ---- What came out ----
    baselines = {}
    if recipe.baselines and not data.is_regression:
        run.say("Baselines without a neural network")
        baselines = hfdistill.linear_baselines(data, lambda guesses, truth: metric.compute(predictions=guesses, references=truth)[headline])
    run.say("Sizes and latencies")
    example = pair.tokenizer.pad([held_out[0]], return_tensors="pt")
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(data.description, headline, recipe.seeds, teacher_arm, arms, example, baselines, sha)
    results["augmented_texts"] = len(augmented)
    if general_arm is not None:
        results["general_teacher"] = {name: general_arm.metrics[f"eval_{name}"] for name in ("accuracy", "perplexity")}
        results["seconds"]["general_teacher"] = general_arm.seconds
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration: the task is topical, and logistic regression on word counts is hard to beat on it. Docstrings of one module
lie on both sides of the split, and near-duplicates are not grouped. The corpus of the general stage is the training part of the same
documentation and Python's language reference, a tiny part of the paper's 2,500 million words."""


def uses(recipe, key, value):
    return any(stage.get(key) == value for stage in recipe.stages)


def with_task_defaults(recipe, args):
    """`recipe` with the paper's numbers for its task where none are given."""
    task = recipe.task_name
    stages = [dict(stage) for stage in recipe.stages or STAGES]
    for stage in stages:
        if stage.get("name") == "intermediate" and not {"num_train_epochs", "max_steps"} & stage.keys() and args.max_steps <= 0:
            stage["num_train_epochs"] = EPOCHS.get(task, 20)
        # "... we use the original training set in the prediction layer distillation of STS-B" (section 4.2)
        if stage.get("name") == "prediction" and task == "stsb" and stage.get("data") == "augmented":
            stage["data"] = "train"
    copies, length = recipe.augmentation_copies, recipe.max_seq_length
    return replace(
        recipe,
        stages=stages,
        augmentation_copies=hfdistill.AUGMENTATION_COPIES.get(task, 20) if copies is None else copies,
        max_seq_length=(64 if task in SINGLE_SENTENCES else 128) if length is None else length,
    )


def hidden_label(data):
    return float("nan") if data.is_regression else -100


def join(labelled, transfer, text_columns):
    """Both as one data set with plain labels: a ClassLabel column has no place for -100."""
    from datasets import Dataset

    columns = (*text_columns, "label")
    return Dataset.from_dict({name: [*labelled[name], *(transfer[name] if len(transfer) else [])] for name in columns})


def load_corpus(recipe, data):
    """The named corpus; for the embedded task, its own training texts and Python's language reference."""
    import random

    from datasets import Dataset

    if recipe.corpus_dataset_names or recipe.corpus_file:
        return hfdistill.load_corpus(
            recipe.corpus_dataset_names or None,
            {"train": recipe.corpus_file} if recipe.corpus_file else None,
            streaming=recipe.corpus_streaming,
            held_out=1000 if recipe.corpus_streaming else 0.05,
            max_train_documents=recipe.max_corpus_documents,
            cache_dir=recipe.cache_dir,
        )
    if not data.embedded:
        raise ValueError(
            "A general stage, or a masked language model trained here, needs a corpus, and your data come without one. Pass "
            "--corpus_dataset_names or --corpus_file; or take both for granted: --general_teacher_name_or_path, --model_name_or_path "
            "with a general student such as huawei-noah/TinyBERT_General_4L_312D, and 'stages' without the general one."
        )
    texts = data.vocabulary_texts[: recipe.max_corpus_documents]
    random.Random(0).shuffle(texts)
    cut = len(texts) - len(texts) // 20
    train, held_out = (Dataset.from_dict({"text": part}) for part in (texts[:cut], texts[cut:]))
    return hfdistill.Corpus(train, held_out, "documentation of the Python standard library and language (embedded)", embedded=True)


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
