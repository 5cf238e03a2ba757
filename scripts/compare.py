#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[plots,vision]"]
# ///
"""What each of several methods is worth on one task, and what it costs.

    accelerate launch scripts/compare.py --methods kd,fitnet,at,rkd,sp,crd,dkd \\
        --config recipes/configs/image_classification/digits_resnet_kd.yaml

trains the teacher, the student alone and the control once, then the student by each method with the same steps, seeds and first
weights. `comparison.json`, a table and a picture go to the output folder. The same command again goes on where it was stopped, and one
with more methods trains those. The recipe is the one of the config's folder.
"""

import argparse
import sys
from pathlib import Path

import hfdistill
from hfdistill.cli import parse


ROOT = Path(__file__).parents[1]
CONFIG = "recipes/configs/image_classification/digits_resnet_kd.yaml"


def main(command_line):
    parser = argparse.ArgumentParser(
        usage="compare.py [--FLAG VALUE ...] [FLAGS OF THE RECIPE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--methods", default="all", help="Names in the file of methods, separated by commas (default: all).")
    parser.add_argument("--config", default=CONFIG, help="YAML of a recipe (default: %(default)s).")
    parser.add_argument("--methods_file", help="YAML of methods (default: recipes/methods/<recipe>.yaml).")
    parser.add_argument("--with_kd", default="false", choices=["true", "false"], help="Add the config's soft targets to each method.")
    parser.add_argument("--memory", default="true", choices=["true", "false"], help="Measure memory too, in a process for each method.")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # such a process
    own, flags = parser.parse_known_args(command_line)
    config = Path(own.config)
    recipe = hfdistill.load_recipe(ROOT / "recipes" / f"{config.parent.name}.py")
    methods_file = own.methods_file or ROOT / "recipes" / "methods" / f"{config.parent.name}.yaml"
    methods = hfdistill.load_methods(methods_file, own.methods.split(","))
    folder = f"outputs/comparison_{config.stem}"
    arguments = parse(recipe.ARGUMENTS, ["--config", own.config, "--output_dir", folder, *flags])
    with_kd = own.with_kd == "true"
    if own.memory_of:
        return hfdistill.memory_of(recipe.main, *arguments, methods, own.memory_of, with_kd)
    child = [sys.executable, __file__, *command_line, "--memory_of"]
    return hfdistill.compare_methods(
        recipe.main,
        *arguments,
        methods,
        " ".join(["accelerate launch scripts/compare.py", *command_line]),
        with_kd,
        (lambda name: hfdistill.memory_in_a_process([*child, name])) if own.memory == "true" else None,
    )


if __name__ == "__main__":
    result = main(sys.argv[1:])
    if isinstance(result, float):
        print(result)
