#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill[bench,plots]"]
# ///
"""What a distillation step costs: hfdistill against a bare loop, the stock Trainer, and other libraries where they are installed.

    python scripts/benchmark.py                                  # all workloads, about half an hour on two cores
    python scripts/benchmark.py --workloads W1,W5 --rounds 9     # those again, more exactly
    python scripts/benchmark.py --size tiny --folder outputs/try # a minute, to see that it runs
    python scripts/benchmark.py --parts none --profile W1:masked # where the time of a step goes

Random weights, no network. `results_<processor>.json`, a Markdown table and a picture go to the folder. On a GPU everything runs there.
"""

import argparse
import sys

import hfdistill


def main(command_line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--workloads", help="Names, separated by commas: W1, W2, W3, W4, W5, bert_base (default: all).")
    parser.add_argument("--candidates", help="Names, separated by commas (default: all). The bare loop is 'bare'.")
    parser.add_argument("--parts", default="times,memory,growth,table", help="What is measured, or 'none' (default: %(default)s).")
    parser.add_argument("--size", default="full", choices=["full", "tiny"], help="Sizes of models and data (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="Measured steps of each candidate (default: %(default)s).")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch (default: all cores).")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: a GPU where there is one.")
    parser.add_argument("--bf16", choices=["true", "false"], help="bf16 autocast for all (default: on a GPU).")
    parser.add_argument("--folder", default="benchmarks", help="Where the results go (default: %(default)s).")
    parser.add_argument("--profile", help="workload:candidate pairs, separated by commas, whose operations are listed.")
    own = parser.parse_args(command_line)
    return hfdistill.run_benchmark(
        workloads=own.workloads and own.workloads.split(","),
        candidates=own.candidates and own.candidates.split(","),
        parts=[] if own.parts == "none" else own.parts.split(","),
        size=own.size,
        rounds=own.rounds,
        threads=own.threads,
        device=own.device,
        bf16=own.bf16 and own.bf16 == "true",
        folder=own.folder,
        profile=own.profile.split(",") if own.profile else (),
        command=" ".join(["python scripts/benchmark.py", *command_line]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
