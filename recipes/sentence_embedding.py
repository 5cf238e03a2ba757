#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""Distil a sentence encoder, and measure honestly what it bought.

    accelerate launch recipes/sentence_embedding.py --config recipes/configs/sentence_embedding/stdlib_bert_mse.yaml

trains a teacher on pairs of texts (or takes one, also from sentence-transformers), trains the student alone on the same pairs
and under the teacher on texts, with the same steps for every seed, and writes to `output_dir`: the distilled student of the
first seed (loads with AutoModel and with SentenceTransformer), `results.json`, `results.png` and a model card. Without data
flags the embedded task is used, which needs no network.
"""

from dataclasses import dataclass, replace

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class SentenceEmbeddingArguments(hfdistill.RecipeArguments):
    """Data, student and teacher of a sentence embedding run; everything else is in `DistillationTrainingArguments`."""

    dataset_name: str | None = _(None, "A data set on the Hub with texts to hear the teacher on.")
    dataset_config_name: str | None = _(None, "Its configuration.")
    train_file: str | None = _(None, "Training data: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = _(None, "Held-out pairs, as train_file.")
    test_file: str | None = _(None, "Held-out pairs where there is no validation_file.")
    text_column_names: list[str] = _(list, "Columns of the training data that hold texts.")
    paired: bool = _(False, "The two text columns belong together: a teacher from scratch and the student alone are trained on them.")
    evaluation_dataset_name: str | None = _(None, "A data set on the Hub with the held-out pairs. Default: that of the training data.")
    evaluation_dataset_config_name: str | None = _(None, "Its configuration.")
    evaluation_column_names: list[str] = _(list, "The two text columns of the held-out pairs.")
    score_column_name: str | None = _(
        None, "How alike the two held-out texts are. Default: 'score' where there is one; otherwise the second text is searched."
    )
    contrastive_temperature: float = _(0.05, "Temperature of the contrastive loss of a teacher from scratch and of the student alone.")
    max_seq_length: int = _(128, "Tokens per text; longer texts are cut.")


ARGUMENTS = (SentenceEmbeddingArguments, "DistillationTrainingArguments")


def main(recipe, args, instead=None):
    """Runs the recipe and returns the contents of `results.json`.

    `instead(run, *parts)`, where it is given, takes the place of training the students, and its value is returned; `parts` are what
    `Run.finish_students` takes up to the metric.
    """
    begin(recipe, args)

    # ---- Data, tokenizer, teacher: given by name, or a BERT from scratch ----
    encoder = resolve_encoder(recipe, args)
    defaults = {name: type(args).__dataclass_fields__[name].default for name in ("task_weight", *hfdistill.TEACHER_WEIGHTS)}
    args = replace(args, pooling=encoder.pooling)
    if args.objective is None and all(getattr(args, name) == default for name, default in defaults.items()):
        args = replace(args, objective=[{"loss": "hidden_mse", "signal": "pooled"}])  # base models have no logits to compare
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
    pair = hfdistill.ModelPair(recipe, args, "base").complete(data.vocabulary_texts, recipe.max_seq_length)
    if not len(data.pairs) and pair.needs_teacher_training:
        raise ValueError(
            "The teacher is to be trained, but the data has no pairs of texts that belong together. Pass --teacher_model_name_or_path "
            "with a trained sentence encoder (and no teacher_training), or --paired true where the two text columns are such pairs."
        )

    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, data.fingerprint())
    with args.main_process_first(desc="tokenizing"):
        pairs = hfdistill.encode_pairs(data.pairs, pair.tokenizer, recipe.max_seq_length, recipe.preprocessing_num_workers)
        transfer = hfdistill.encode_sentences(data.transfer["text"], pair.tokenizer, recipe.max_seq_length)
        evaluation = {
            split: hfdistill.encode_sentences([*rows["query"], *rows["document"]], pair.tokenizer, recipe.max_seq_length, number=True)
            for split, rows in data.evaluation.items()
        }
    metrics = {
        split: hfdistill.embedding_metrics(rows["score"][:] if "score" in rows.column_names else None)
        for split, rows in data.evaluation.items()
    }
    split = next(iter(evaluation))
    graded = "score" in data.evaluation[split].column_names
    headline = "spearmanr" if graded else "mrr_at_10"

    def trainer_for(model, arguments, rows=None, teacher=None):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            train_dataset=rows,
            eval_dataset=evaluation[split],
            data_collator=hfdistill.PairCollator(pair.tokenizer),
            processing_class=pair.tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
            compute_metrics=metrics[split],
        )
        check_launch(trainer.accelerator)
        return trainer

    contrastive = [{"loss": "contrastive_pairs", "temperature": recipe.contrastive_temperature}]
    alone = {**defaults, "objective": contrastive, "schedules": None}
    teacher_arm = run.finish_teacher(pair, trainer_for, pairs, f"{len(pairs)} pairs", alone)
    value, chance = teacher_arm.metrics[f"eval_{headline}"], hfdistill.chance_level(headline, len(data.evaluation[split]))
    if not value > chance and not recipe.allow_weak_teacher:
        raise ValueError(
            f"The teacher has {headline} {value:.3f} on the held-out pairs, and random order {chance:.3f}: the student would learn nothing "
            "from it. Train it longer (teacher_training), or pass --allow_weak_teacher true."
        )

    # ---- Students: distilled on texts; alone on the pairs ----
    others = {}
    if recipe.baselines and len(pairs):
        others["alone"] = hfdistill.Comparison(f"student alone, {len(pairs)} pairs", pairs, alone)
    datasets, title = {"train": transfer, "transfer": transfer, "pairs": pairs}, f"{len(transfer)} texts"
    parts = (recipe, pair.student, trainer_for, datasets, {"teacher": pair.teacher}, headline)
    if instead is not None:
        return instead(run, *parts)
    arms = run.finish_students(*parts, title, others)

    # ---- What came out ----
    baselines = hfdistill.pair_baselines(data, headline) if recipe.baselines else {}
    run.say("Sizes and latencies")
    example = pair.tokenizer.pad([evaluation[split][0]], return_tensors="pt")
    published = arms["distilled"][0]
    agreement = None if graded else hfdistill.retrieval_agreement
    results = hfdistill.compare_arms(data.description, headline, recipe.seeds, teacher_arm, arms, example, baselines, sha, agreement)
    results["evaluation"] = {}
    for name, rows in evaluation.items():
        published.trainer.compute_metrics = metrics[name]
        results["evaluation"][name] = published.trainer.evaluate(rows)
    if args.should_save:
        width = published.model.config.hidden_size
        hfdistill.save_sentence_encoder(args.output_dir, encoder.pooling, width, recipe.max_seq_length, encoder.normalize)
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration: documentation repeats words of its first sentence, and cosines of TF-IDF word vectors find it better than
encoders of this size that have seen some hundred pairs. Near-duplicates among documents are not grouped. In each of as many steps the
student alone reads two texts a row and the distilled student one."""


def resolve_encoder(recipe, args):
    """How student and teacher pool: as the teacher does where it is from sentence-transformers, else by the mean."""
    encoder = None
    if recipe.teacher_model_name_or_path:
        options = args.teacher_model_init_kwargs or {}
        encoder = hfdistill.read_sentence_encoder(recipe.teacher_model_name_or_path, options.get("revision"), recipe.cache_dir)
    if encoder is None:
        return hfdistill.SentenceEncoder("mean" if args.pooling == "auto" else args.pooling)
    if args.pooling not in ("auto", encoder.pooling):
        raise ValueError(
            f"pooling={args.pooling!r}, but the teacher {recipe.teacher_model_name_or_path!r} was trained with {encoder.pooling!r}: its "
            "vectors would not be the embeddings it was trained for. Leave pooling out."
        )
    return encoder


def load_data(recipe):
    columns = {
        "text_column_names": recipe.text_column_names,
        "paired": recipe.paired,
        "evaluation_dataset_name": recipe.evaluation_dataset_name,
        "evaluation_dataset_config_name": recipe.evaluation_dataset_config_name,
        "evaluation_column_names": recipe.evaluation_column_names,
        "score_column_name": recipe.score_column_name,
    }
    limits = {"max_train_samples": recipe.max_train_samples, "max_eval_samples": recipe.max_eval_samples}
    files = hfdistill.named_files(recipe, {**columns, "dataset_config_name": recipe.dataset_config_name})
    if files is None:
        return hfdistill.load_embedded_pairs(**limits)
    return hfdistill.load_named_pairs(
        recipe.dataset_name, recipe.dataset_config_name, files, **columns, **limits, cache_dir=recipe.cache_dir
    )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
