#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots]"]
# ///
"""Distil a pre-trained language model as DistilBERT was: soft targets, the model's own task and the cosine of last hidden states.

    accelerate launch recipes/masked_lm.py --config recipes/configs/masked_lm/stdlib_bert_triple.yaml

trains a masked (or, `--language_model causal`, a causal) teacher or takes one, trains the student alone and under the teacher
with the same steps for every seed, and writes to `output_dir`: the distilled student of the first seed (loads with plain
Transformers), `results.json`, `results.png` and a model card. BERT -> DistilBERT, RoBERTa -> DistilRoBERTa and GPT-2 -> DistilGPT-2
differ in their configs only. Without data flags the embedded corpus is used, which needs no network.
"""

from dataclasses import dataclass

import hfdistill
from hfdistill import recipe_field as _
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class MaskedLanguageModelArguments(hfdistill.RecipeArguments):
    """Text, masks, student and teacher of a language model run; everything else is in `DistillationTrainingArguments`."""

    language_model: str = _("masked", "masked (BERT, RoBERTa) or causal (GPT-2).", choices=["masked", "causal"])
    student_type: str = _(
        "same", "same: the teacher's class; distilbert: a student of BERT without segment embeddings.", choices=["same", "distilbert"]
    )
    dataset_name: list[str] = _(list, "Data sets on the Hub, joined; each 'name', 'name:configuration' or 'name:configuration@revision'.")
    dataset_config_name: str | None = _(None, "Configuration of a single dataset_name.")
    dataset_probabilities: list[float] | None = _(
        None, "Draw documents from several dataset_name with these probabilities, instead of one data set after another."
    )
    train_file: list[str] = _(list, "Training text: txt, csv, tsv, json, jsonl or parquet files.")
    validation_file: str | None = _(None, "Held-out text, as train_file. Default: a part of the training text.")
    text_column_name: str = _("text", "Column of the text.")
    sample_by: str = _(
        "line", "What a document of a txt file is: a line, a paragraph, or the file.", choices=["line", "paragraph", "document"]
    )
    validation_split_percentage: float = _(10.0, "Share of the documents held out where there is no validation part.")
    streaming: bool = _(False, "Read and tokenise on the fly, for text that does not fit; needs max_steps.")
    shuffle_buffer: int = _(10_000, "Rows that a stream is shuffled among.")
    streamed_validation_documents: int = _(1000, "Documents held out at the beginning of a stream without a validation part.")
    max_seq_length: int = _(128, "Tokens per row, special ones included.")
    line_by_line: bool = _(False, "One document (or piece of one) a row, instead of packed rows without padding.")
    packing: bool = _(False, "line_by_line: lay the rows of a training batch side by side, each read alone, instead of padding them.")
    min_row_tokens: int = _(12, "line_by_line: drop shorter rows, special tokens counted.")
    max_unknown: float = _(0.5, "line_by_line: drop rows with at least that share of unknown tokens.")
    mlm_probability: float = _(0.15, "Share of tokens that are masked.")
    teacher_mlm_probability: float | None = _(None, "The same while a teacher is trained here. Default: mlm_probability.")
    whole_word_masking: bool = _(False, "Mask whole words.")
    frequency_smoothing: float | None = _(None, "Mask a token with a probability proportional to count^-s; 0.7 in DistilBERT.")
    mask_seed: int = _(0, "Seed of the masks, the same for every arm; masks depend on it, the epoch and the row alone.")
    pseudo_perplexity_documents: int = _(100, "Held-out documents for the pseudo-perplexity of masked models; 0 turns it off.")


ARGUMENTS = (MaskedLanguageModelArguments, "DistillationTrainingArguments")
COUNTED_ROWS = 50_000  # or documents of a stream: what counting baselines and token frequencies are taken from


def main(recipe, args, instead=None):
    """Runs the recipe and returns the contents of `results.json`.

    `instead(run, *parts)`, where it is given, takes the place of training the students, and its value is returned; `parts` are what
    `Run.finish_students` takes up to the metric.
    """
    begin(recipe, args)
    check_recipe(recipe, args)
    causal = recipe.language_model == "causal"

    # ---- Text, tokenizer, teacher: given by name, or from scratch ----
    with args.main_process_first(desc="data"):
        corpus = load_data(recipe)
    pair = hfdistill.ModelPair(recipe, args, "causal_lm" if causal else "masked_lm")
    needs_texts = not (recipe.tokenizer_name or recipe.model_name_or_path or recipe.teacher_model_name_or_path)
    pair.complete(corpus.sample() if needs_texts else (), recipe.max_seq_length)
    tokenizer = pair.tokenizer
    if recipe.max_seq_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length={recipe.max_seq_length}, but the tokenizer's models have {tokenizer.model_max_length} positions. Set it to at "
            "most that."
        )

    if causal and not hfdistill.Capture(pair.teacher).is_causal:
        raise ValueError(
            f"language_model='causal', but {type(pair.teacher).__name__} sees the tokens it is to predict. Set model_type: gpt2 in "
            "teacher_config, name a causal teacher, or leave language_model out."
        )

    rows_of = {"packing": not recipe.line_by_line, "whole_word": recipe.whole_word_masking}
    rows_of |= {"min_row_tokens": recipe.min_row_tokens, "max_unknown": recipe.max_unknown}
    stream_of = {"streaming": recipe.streaming, "shuffle_buffer": recipe.shuffle_buffer, "seed": args.seed}
    with args.main_process_first(desc="tokenizing"):
        rows = hfdistill.encode_corpus(corpus.train, tokenizer, recipe.max_seq_length, **rows_of, **stream_of)
        held_out = hfdistill.encode_corpus(corpus.held_out, tokenizer, recipe.max_seq_length, **rows_of)
        documents = corpus.held_out.select(range(min(recipe.pseudo_perplexity_documents, len(corpus.held_out))))
        if causal or not len(documents):
            documents = None
        else:
            whole = {"packing": False, "min_row_tokens": 1, "max_unknown": 1.1}
            documents = hfdistill.encode_corpus(documents, tokenizer, recipe.max_seq_length, **whole)
    # What is counted, once over: a stream never ends.
    few = rows.select(range(0, len(rows), -(-len(rows) // COUNTED_ROWS))) if not recipe.streaming else None
    if few is None and (recipe.baselines or recipe.frequency_smoothing is not None):
        few = hfdistill.encode_corpus(corpus.sample(COUNTED_ROWS), tokenizer, recipe.max_seq_length, **rows_of)
    if causal:
        collator, asked = hfdistill.CausalCollator(tokenizer), held_out
        teacher_collator = collator
    else:
        counts = None
        if recipe.frequency_smoothing is not None:
            counts = hfdistill.count_tokens(few, len(tokenizer))
        collator, teacher_collator = (
            hfdistill.MaskingCollator(
                tokenizer,
                share,
                whole_word=recipe.whole_word_masking,
                frequency_smoothing=recipe.frequency_smoothing,
                token_counts=counts,
                seed=recipe.mask_seed,
            )
            for share in (recipe.mlm_probability, recipe.teacher_mlm_probability or recipe.mlm_probability)
        )
        plain = hfdistill.MaskingCollator(tokenizer, recipe.mlm_probability, seed=recipe.mask_seed)
        asked = plain.mask_dataset(held_out)  # once: every model, epoch and baseline is asked about the same tokens
    if recipe.packing:
        collator, teacher_collator = hfdistill.PackingCollator(collator), hfdistill.PackingCollator(teacher_collator)
    headline = "next_token_accuracy" if causal else "masked_accuracy"

    def evaluate(trainer):
        model = trainer.accelerator.unwrap_model(trainer.model)
        batch_size = args.per_device_eval_batch_size
        scores = hfdistill.language_model_scores(model, asked, collator, causal=causal, batch_size=batch_size, predictions=True)
        metrics = {f"eval_{headline}": scores["accuracy"], "eval_nll": scores["nll"], "eval_perplexity": scores["perplexity"]}
        if documents is not None:
            pseudo = hfdistill.pseudo_perplexity(model, tokenizer, documents, batch_size=batch_size)
            metrics["eval_pseudo_perplexity"] = pseudo["pseudo_perplexity"]
        return metrics, scores["predictions"], scores["labels"]

    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, corpus.fingerprint(), evaluate=evaluate)

    def trainer_for(model, arguments, rows=None, teacher=None):
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            data_collator=teacher_collator if model is pair.teacher else collator,
            train_dataset=rows,
            eval_dataset=asked,
            processing_class=tokenizer,
            teacher_processing_class=pair.teacher_tokenizer,
            compute_metrics=hfdistill.token_accuracy(headline, causal),
        )
        check_launch(trainer.accelerator)
        return trainer

    amount = "a stream of rows" if recipe.streaming else f"{len(rows)} rows"
    teacher_arm = run.finish_teacher(pair, trainer_for, rows, f"{amount} of {recipe.max_seq_length} tokens")
    value, frequent = teacher_arm.metrics[f"eval_{headline}"], hfdistill.majority_share(teacher_arm.labels)
    if value <= frequent and not recipe.allow_weak_teacher:
        raise ValueError(
            f"The teacher has {headline} {value:.3f} on held-out text, and always answering its most frequent token {frequent:.3f}: the "
            "student would learn nothing from it. Train it longer (teacher_training), or pass --allow_weak_teacher true."
        )

    # ---- Students: distilled; alone with the same rows, masks, steps and first weights ----
    def student(seed, say=None, **sizes):
        built = pair.student(seed, say, **sizes)
        return hfdistill.to_distilbert(built) if recipe.student_type == "distilbert" else built

    others = {}
    if recipe.baselines:
        others["alone"] = hfdistill.Comparison(f"student alone, {amount}", rows, hfdistill.WITHOUT_TEACHER)
    parts = (recipe, student, trainer_for, {"train": rows}, {"teacher": pair.teacher}, headline)
    if instead is not None:
        return instead(run, *parts)
    arms = run.finish_students(*parts, amount, others)

    # ---- What came out ----
    baselines = {}
    if recipe.baselines:
        run.say("Baselines that count neighbours")
        ngrams = hfdistill.NgramBaselines(few, tokenizer.all_special_ids, causal)
        baselines = ngrams.scores(asked)
        if not causal:
            baselines["trigram_told"] = ngrams.scores(asked, "original")["trigram"]
    run.say("Sizes and latencies")
    example = collator([asked[0]])
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(
        corpus.description,
        headline,
        recipe.seeds,
        teacher_arm,
        arms,
        example,
        baselines,
        sha,
        lambda own, other: float((own == other).mean()),
    )
    names = [name for name in ("perplexity", "pseudo_perplexity") if f"eval_{name}" in teacher_arm.metrics]
    measured = {"teacher": teacher_arm, "student_alone": arms.get("alone", []), "student_distilled": arms["distilled"]}
    results["further_metrics"] = {
        name: {
            arm: own.metrics[f"eval_{name}"] if arm == "teacher" else hfdistill.summarise([one.metrics[f"eval_{name}"] for one in own])
            for arm, own in measured.items()
            if own
        }
        for name in names
    }
    results["evaluation"] = {"held_out": published.metrics, "tokens": len(published.labels)}
    run.publish(published, results, limits=LIMITS if corpus.embedded else None)
    return results


LIMITS = """A demonstration: a million and a half characters of one kind of text, near-duplicates on both sides of the split. The table
says whether the models beat counting both neighbours of a token. Students that copy their teacher's weights start alike for every
seed and see the same masks: the spread over seeds is that of the order of batches and of dropout."""


def check_recipe(recipe, args):
    """Refuses what cannot be trained before anything is read."""
    if recipe.streaming and args.max_steps <= 0:
        raise ValueError("A stream has no length, so epochs are not defined. Set max_steps (3 epochs of 10,000 rows at batch 100 are 300).")
    if recipe.streaming:
        # The main process would read for all others and put their batches together, which must then be equally long.
        args.accelerator_config.dispatch_batches = False
    if recipe.packing and not recipe.line_by_line:
        raise ValueError("packing is for rows that differ in length, and without line_by_line all are full. Leave one out.")
    if recipe.packing and recipe.language_model == "causal" and args.kd_positions == "all":
        raise ValueError(
            "packing with kd_positions='all' would compare what a text says about the first token of the next one. Set "
            "kd_positions='labelled', which are all others."
        )
    if recipe.student_type == "distilbert" and recipe.use_peft:
        raise ValueError(
            "student_type='distilbert' rewrites the student's weights, and use_peft trains adapters on top of them. Leave one of both out"
        )
    if recipe.student_type == "distilbert" and (recipe.model_name_or_path or recipe.language_model == "causal"):
        raise ValueError(
            "student_type='distilbert' writes a student built from a masked BERT teacher as a DistilBERT. Leave it out for a student given "
            "by name (model_name_or_path), and for causal models."
        )
    masks = {"mlm_probability": 0.15, "whole_word_masking": False, "frequency_smoothing": None, "teacher_mlm_probability": None}
    for name, default in masks.items():
        if recipe.language_model == "causal" and getattr(recipe, name) != default:
            raise ValueError(f"--{name} {getattr(recipe, name)} is about masks, and a causal model has none. Leave it out")


def load_data(recipe):
    limits = {"max_train_documents": recipe.max_train_samples, "max_held_out_documents": recipe.max_eval_samples}
    share = recipe.validation_split_percentage / 100
    if not (recipe.dataset_name or recipe.train_file):
        if recipe.validation_file or recipe.dataset_config_name:
            raise ValueError("validation_file and dataset_config_name belong to data of your own. Pass --train_file or --dataset_name")
        return hfdistill.load_embedded_corpus(held_out=share, **limits)
    names = recipe.dataset_name
    if recipe.dataset_config_name:
        if len(names) != 1:
            raise ValueError(f"dataset_config_name belongs to one dataset_name, not to {names}. Write each as 'name:configuration'")
        names = [f"{names[0]}:{recipe.dataset_config_name}"]
    files = {split: path for split, path in (("train", recipe.train_file), ("validation", recipe.validation_file)) if path}
    return hfdistill.load_corpus(
        names,
        files,
        probabilities=recipe.dataset_probabilities,
        text_column=recipe.text_column_name,
        sample_by=recipe.sample_by,
        streaming=recipe.streaming,
        held_out=recipe.streamed_validation_documents if recipe.streaming else share,
        cache_dir=recipe.cache_dir,
        **limits,
    )


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
