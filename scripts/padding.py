#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdistill"]
# ///
"""How much of each training batch is padding: rows in any order, grouped by length, and packed.

    python scripts/padding.py

makes the batches that DistillationTrainer trains on from the embedded documentation strings, and prints the share of their positions
that hold no token, and how many positions an epoch has.
"""

import argparse
import sys
import tempfile

import hfdistill


STRATEGIES = {
    "random": ("random", False),
    "grouped by length": ("group_by_length", False),
    "packed": ("random", True),
}


def main(command_line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 32, 64], help="Texts in a batch (default: %(default)s).")
    parser.add_argument("--max_seq_length", type=int, default=128, help="Tokens per text (default: %(default)s).")
    parser.add_argument("--vocab_size", type=int, default=3000, help="Pieces of the tokenizer (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the order (default: %(default)s).")
    own = parser.parse_args(command_line)
    documents = hfdistill.load_stdlib_docs(mask_module=False)
    tokenizer = hfdistill.train_wordpiece(documents["text"], own.vocab_size)
    rows = hfdistill.encode_corpus(documents, tokenizer, own.max_seq_length, packing=False)
    print(f"{len(rows)} texts of {min(rows['length'])} to {max(rows['length'])} tokens, {sum(rows['length']) / len(rows):.1f} on average\n")
    print("| batch | order | positions | padding |\n|---|---|---|---|")
    results = {}
    for batch_size in own.batch_size:
        for name, (order, packing) in STRATEGIES.items():
            positions, tokens = count(rows, tokenizer, batch_size, order, packing, own.seed)
            results[batch_size, name] = 1 - tokens / positions
            print(f"| {batch_size} | {name} | {positions} | {1 - tokens / positions:.1%} |")
    return results


def count(rows, tokenizer, batch_size, order, packing, seed):
    """`(positions, real tokens)` of all batches of an epoch."""
    from transformers import BertConfig, BertForMaskedLM

    collator = hfdistill.MaskingCollator(tokenizer)
    small = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with tempfile.TemporaryDirectory() as folder:
        args = hfdistill.DistillationTrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=batch_size, train_sampling_strategy=order, seed=seed, kd_weight=0.0
        )
        trainer = hfdistill.DistillationTrainer(
            model=BertForMaskedLM(small),
            args=args,
            train_dataset=rows,
            data_collator=hfdistill.PackingCollator(collator) if packing else collator,
            processing_class=tokenizer,
        )
        batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    return sum(ids.numel() for ids in batches), sum(rows["length"])


if __name__ == "__main__":
    main(sys.argv[1:])
