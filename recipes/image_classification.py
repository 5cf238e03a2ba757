#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots,vision]"]
# ///
"""Distil an image classifier, and measure honestly what it bought.

    accelerate launch recipes/image_classification.py --config recipes/configs/image_classification/digits_resnet_kd.yaml

trains a teacher (or takes one), trains the student alone and under the teacher with the same steps for every seed, and
writes to `output_dir`: the distilled student of the first seed (loads with plain Transformers), `results.json`,
`results.png` and a model card. Without data flags the embedded digits are used, which need no network.
"""

from dataclasses import dataclass

import hfdistill
from hfdistill.cli import begin, check_launch, config_sha256, parse


@dataclass
class ImageClassificationArguments(hfdistill.ImageDataArguments):
    """Data, student and teacher of an image classification run; everything else is in `DistillationTrainingArguments`."""


ARGUMENTS = (ImageClassificationArguments, "DistillationTrainingArguments")


def main(recipe, args, instead=None):
    """Runs the recipe and returns the contents of `results.json`.

    `instead(run, *parts)`, where it is given, takes the place of training the students, and its value is returned; `parts` are what
    `Run.finish_students` takes up to the metric.
    """
    from datasets import concatenate_datasets

    begin(recipe, args)

    # ---- Data, image processors, teacher: given by name, or a ViT from scratch ----
    with args.main_process_first(desc="data"):
        data = hfdistill.load_image_data(recipe)
    pair = hfdistill.ImageModelPair(recipe, args, data.label_config)
    if pair.teacher is not None:
        data = hfdistill.match_labels(data, pair.teacher.config)
    pair.complete(data.label_config)
    sha = config_sha256((recipe, args))
    run = hfdistill.open_run(recipe, args, sha, data.fingerprint())
    metric = hfdistill.load_metric("accuracy")
    held_out = next(iter(data.evaluation.values()))
    mixed = concatenate_datasets([data.labelled, data.transfer]) if len(data.transfer) else data.labelled

    def collator(image_processor, teacher_image_processor=None, seed=args.seed):
        return hfdistill.ImageCollator(
            image_processor,
            teacher_image_processor,
            augmentation=recipe.augmentation,
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
            num_labels=len(data.label_names),
            seed=seed,
        )

    def trainer_for(model, arguments, rows=None, teacher=None):
        is_teacher = model is pair.teacher
        own = pair.teacher_image_processor if is_teacher else pair.image_processor
        trainer = hfdistill.DistillationTrainer(
            model=model,
            teacher=teacher,
            args=arguments,
            data_collator=collator(own, None if teacher is None else pair.teacher_image_processor, arguments.seed),
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=own,
            teacher_processing_class=pair.teacher_image_processor,
            compute_metrics=hfdistill.metric_function(metric),
        )
        check_launch(trainer.accelerator)
        return trainer

    teacher_arm = run.finish_teacher(pair, trainer_for, data.teacher_train, f"{len(data.teacher_train)} labelled images")
    hfdistill.refuse_weak_teacher(teacher_arm, recipe.allow_weak_teacher)

    # ---- Students: distilled; alone on the same labels; control on all labels of the teacher ----
    images = "labelled images"
    others = hfdistill.label_comparisons(data.labelled, data.transfer, data.teacher_train, images) if recipe.baselines else {}
    datasets = {"train": mixed, "labelled": data.labelled, "transfer": data.transfer, "teacher_train": data.teacher_train}
    title = f"{len(data.labelled)} labelled and {len(data.transfer)} unlabelled images"
    parts = (recipe, pair.student, trainer_for, datasets, {"teacher": pair.teacher}, "accuracy")
    if instead is not None:
        return instead(run, *parts)
    arms = run.finish_students(*parts, title, others)

    # ---- What came out ----
    baselines = {}
    if recipe.baselines and data.embedded:
        run.say("Baselines without a neural network")
        baselines = hfdistill.pixel_baselines(data)
    run.say("Sizes and latencies")
    example = collator(pair.image_processor, pair.teacher_image_processor)([held_out[0]])
    published = arms["distilled"][0]
    results = hfdistill.compare_arms(data.description, "accuracy", recipe.seeds, teacher_arm, arms, example, baselines, sha)
    results["evaluation"] = {split: published.trainer.evaluate(rows) for split, rows in data.evaluation.items()}
    run.publish(published, results, limits=LIMITS if data.embedded else None)
    return results


LIMITS = """A demonstration on 8 by 8 pixels: with all labels, simple models without a network come close to perfect, and
distillation has no room. The students see few labels on purpose."""


if __name__ == "__main__":
    main(*parse(ARGUMENTS, description=__doc__))
