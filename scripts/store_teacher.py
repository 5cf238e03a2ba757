#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[vision]"]
# ///
r"""Stores the answers of a recipe's teacher to its training data, without training a student.

    accelerate launch scripts/store_teacher.py masked_lm --config recipes/configs/masked_lm/stdlib_bert_triple.yaml \
        --teacher_store stores/triple

Flags and config are those of the recipe, whose teacher is trained first where it has to be. The same command again goes on where it
was stopped; the recipe with the same --teacher_store then trains without asking the teacher. `--push_store_to_hub user/name` as the
last flag uploads the folder as a data set. Where {seed} in --teacher_store gives each seed a folder, it has to be in that name too.
"""

import inspect
import sys
from pathlib import Path

import hfdistill
from hfdistill.cli import parse


def store(run, recipe, build, trainer_for, datasets, teachers, metric):
    """Stands for the training of the students: the teacher answers what each of them would be asked."""
    if recipe.stages:
        raise ValueError("Each stage has its own data and terms. Run the recipe, with a teacher_store of its own in each stage.")
    stores = {}
    for seed in recipe.seeds:  # one pass, but for data that are augmented anew for each seed
        trainer = trainer_for(build(seed), run.settings(f"store_{seed}", seed=seed), datasets["train"], teachers["teacher"])
        stores[seed] = trainer.store_teacher()
    return stores


def main(command_line):
    if not command_line or command_line[0].startswith("-"):
        raise SystemExit(__doc__)
    name, *flags = command_line
    repo_id = flags.pop() if flags[-2:-1] == ["--push_store_to_hub"] else None
    flags = flags[:-1] if repo_id else flags
    recipe = hfdistill.load_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.py")
    if "instead" not in inspect.signature(recipe.main).parameters:
        raise ValueError(
            f"The recipe {name} trains in stages, each with its own teacher, data and terms, so there is no one store to make before. Run "
            "the recipe itself, with a teacher_store of its own in each stage."
        )
    arguments = parse(recipe.ARGUMENTS, flags)
    if arguments[-1].teacher_store is None:
        raise ValueError("There is no folder to write to. Pass --teacher_store")
    several = len(arguments[0].seeds) > 1 and "{seed}" in arguments[-1].teacher_store
    if repo_id and several and "{seed}" not in repo_id:
        raise ValueError(
            f"{arguments[-1].teacher_store!r} is a folder for each of {len(arguments[0].seeds)} seeds, and {repo_id!r} one data set. Write "
            "{seed} in its name too."
        )
    stores = recipe.main(*arguments, instead=store)
    if repo_id and arguments[-1].should_save:
        for seed, stored in stores.items() if several else list(stores.items())[:1]:
            print(stored.push_to_hub(repo_id.replace("{seed}", str(seed))))
    return stores


if __name__ == "__main__":
    main(sys.argv[1:])
