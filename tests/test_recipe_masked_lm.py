"""The language model recipe through its real `main`, a few steps: masked and causal, packed and not, in memory and as a stream."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hfdistill import DistillationTrainer, resolve_layer_map
from hfdistill.cli import parse


pytestmark = pytest.mark.slow  # the file takes about a minute; tests of its parts are quick


CONFIG = str(ROOT / "recipes/configs/masked_lm/stdlib_bert_triple.yaml")
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "hidden_dropout_prob": 0.0}
SMALL_GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 16}
QUICK = {
    "max_steps": "3", "seeds": "0", "student_layers": "1", "vocab_size": "400", "max_seq_length": "24", "disable_tqdm": "true",
    "allow_weak_teacher": "true", "logging_steps": "1", "report_to": "none", "save_strategy": "no", "cpu_threads": "1",
    "pseudo_perplexity_documents": "3", "teacher_training": '{"max_steps": 2}', "teacher_config": json.dumps(SMALL),
    "per_device_train_batch_size": "8",
}  # fmt: skip


def texts(count: int = 80, seed: int = 0) -> list[str]:
    g = np.random.default_rng(seed)
    words = "to be or not that is the question whether tis nobler in mind suffer slings and arrows of outrageous fortune".split()
    return [" ".join(g.choice(words, size=g.integers(12, 40))) + "." for _ in range(count)]


def settings(*flags, **options):
    options = {**QUICK, **options}
    recipe = load_recipe("masked_lm")
    named = [part for name, value in options.items() if value is not None for part in (f"--{name}", *str(value).split("\n"))]
    return recipe, parse(recipe.ARGUMENTS, [*flags, *named])


def run(*flags, **options):
    recipe, parsed = settings(*flags, **options)
    return recipe.main(*parsed)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(texts()))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, file):
    folder = tmp_path_factory.mktemp("runs") / "triple"
    results = run("--config", CONFIG, train_file=file, output_dir=folder, seeds="0\n1", kd_positions="masked", layer_map="last")
    return folder, results


def test_results_keep_the_contract(finished):
    folder, results = finished
    written = json.loads((folder / "results.json").read_text())
    assert written["metric"] == "masked_accuracy" and written["seeds"] == [0, 1] and written["task"] == "text.txt"
    assert len(written["student_alone"]["masked_accuracy"]["values"]) == len(written["student_distilled"]["masked_accuracy"]["values"]) == 2
    assert written["student_alone"]["steps"] == written["student_distilled"]["steps"] == 3 and written["teacher"]["steps"] == 2
    assert set(written["baselines"]) == {"most_frequent", "left_bigram", "trigram", "trigram_told"}
    further = written["further_metrics"]
    assert set(further) == {"perplexity", "pseudo_perplexity"}
    for entries in further.values():
        assert entries["teacher"] > 1 and entries["student_alone"]["mean"] > 1 and len(entries["student_distilled"]["values"]) == 2
    assert written["agreement"] is not None and written["evaluation"]["tokens"] > 20


def test_the_objective_is_that_of_the_paper_and_the_card_says_where_it_holds(finished):
    folder, results = finished
    terms = {term["name"]: term for term in results["objective"]}
    assert {name: term["weight"] for name, term in terms.items()} == {"task": 2.0, "kd": 5.0, "cosine": 1.0}
    assert terms["kd"]["temperature"] == 2.0 and terms["kd"]["positions"] == "masked" and terms["cosine"]["layer_map"] == [[0, 1]]
    card = (folder / "README.md").read_text()
    assert "positions" in card and "masked" in card and "pseudo perplexity" in card and "pipeline_tag: fill-mask" in card


def test_the_student_loads_without_us(finished):
    folder, _ = finished
    student, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(student).__name__ == "DistilBertForMaskedLM" and student.config.distilled_from["layers"] == [1]
    batch = tokenizer("to be or [MASK] to be", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert student(**batch).logits.shape == (1, batch["input_ids"].size(1), len(tokenizer))


def test_every_arm_sees_the_same_masks_and_the_same_question(tmp_path, file, monkeypatch):
    seen, original = {}, DistillationTrainer.training_step

    def training_step(self, model, inputs, *rest):
        own = seen.setdefault(self.args.output_dir.rsplit("/", 1)[-1], {})
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist()):
            original_ids = tuple(i if label == -100 else label for i, label in zip(ids, labels))
            own[original_ids] = (tuple(ids), tuple(labels))
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
    teacher = json.dumps({"max_steps": 8})
    run(
        "--config", CONFIG, train_file=file, output_dir=tmp_path / "run", max_steps="8", seeds="0\n1", teacher_training=teacher,
        teacher_mlm_probability="0.15",
    )  # fmt: skip
    first, *others = seen.values()
    assert set(seen) == {"teacher", "alone_0", "distilled_0", "alone_1", "distilled_1"} and len(first) > 30
    for other in others:
        shared = first.keys() & other.keys()
        assert len(shared) > 20 and all(first[key] == other[key] for key in shared)


def test_causal_on_documents_grouped_by_length(tmp_path, file):
    folder = tmp_path / "gpt2"
    results = run(
        train_file=file, output_dir=folder, language_model="causal", line_by_line="true", train_sampling_strategy="group_by_length",
        teacher_config=json.dumps(SMALL_GPT2), kd_weight="5.0", task_weight="2.0", cosine_weight="1.0", kd_positions="all",
    )  # fmt: skip
    assert results["metric"] == "next_token_accuracy" and set(results["further_metrics"]) == {"perplexity"}
    assert set(results["baselines"]) == {"most_frequent", "left_bigram", "trigram"}
    assert results["objective"][1]["positions"] == "all"
    student = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert student.config.n_layer == 1 and student.config.eos_token_id == tokenizer.eos_token_id == 0
    scores = student(**tokenizer("to be or not", return_tensors="pt")).logits
    assert scores.size(-1) == len(tokenizer) == student.config.vocab_size > 257


def test_packed_batches_train_what_padded_ones_do(tmp_path, file, monkeypatch):
    """The same texts, masks and steps without dropout: the same student, from fewer positions."""
    students, positions = [], []
    original = DistillationTrainer.training_step

    def training_step(self, model, inputs, *rest):
        positions[-1] += inputs["input_ids"].numel()
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
    options = {"train_file": file, "line_by_line": "true", "min_row_tokens": "1", "max_seq_length": "64"}
    options["teacher_config"] = json.dumps({**SMALL, "attention_probs_dropout_prob": 0.0})
    for packing in ("false", "true"):
        positions.append(0)
        folder = tmp_path / packing
        run(output_dir=folder, packing=packing, **options)
        students.append(load_file(folder / "model.safetensors"))
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    assert positions[1] < 0.95 * positions[0]
    for options, message in (
        ({}, "packing is for rows that differ in length"),
        ({"line_by_line": "true", "language_model": "causal", "kd_positions": "all"}, "packing with kd_positions='all'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(train_file=file, output_dir=tmp_path / "refused", packing="true", **options)


def test_roberta_with_whole_words_smoothed_frequencies_and_a_stream(tmp_path, file):
    folder = tmp_path / "roberta"
    results = run(
        train_file=file, output_dir=folder, streaming="true", streamed_validation_documents="10", shuffle_buffer="20",
        whole_word_masking="true", frequency_smoothing="0.7", teacher_config=json.dumps({**SMALL, "model_type": "roberta"}),
        kd_weight="5.0", task_weight="2.0", cosine_weight="1.0", max_train_samples="60",
    )  # fmt: skip
    assert results["objective"][1]["positions"] == "all" and results["student_distilled"]["steps"] == 3
    student = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(student).__name__ == "RobertaForMaskedLM" and student.config.max_position_embeddings == 24 + 2
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<mask>"


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_killed_arm_goes_on_to_the_same_weights(tmp_path, file, streaming):
    """10 steps are more than one pass over the text, so that epochs and the second round of the stream are met."""
    options = dict(train_file=file, streaming=streaming, streamed_validation_documents="10", shuffle_buffer="16", baselines="false",
                   save_strategy="steps", save_steps="3", max_steps="10", per_device_train_batch_size="32", kd_weight="5.0",
                   cosine_weight="1.0", max_train_samples="60")  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(output_dir=whole, **options)
    shutil.copytree(whole, killed)
    arm = killed / "_arms" / "distilled_0"
    for path in [*arm.glob("checkpoint-9"), *arm.glob("checkpoint-10")]:
        shutil.rmtree(path)
    for path in (arm / "arm.json", arm / "model.safetensors", killed / "model.safetensors"):
        path.unlink()
    assert sorted(path.name for path in arm.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    run(output_dir=killed, **options)
    first, second = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_stages(tmp_path, file):
    stages = [
        {"name": "hidden", "cosine_weight": 1.0, "max_steps": 2},
        {"name": "triple", "kd_weight": 5.0, "task_weight": 2.0, "cosine_weight": 1.0, "max_steps": 3},
    ]
    recipe, (own, args) = settings(train_file=file, output_dir=tmp_path / "run", baselines="false")
    own.stages = stages
    results = recipe.main(own, args)
    assert results["student_distilled"]["steps"] == 5 and results["student_alone"] is None and results["baselines"] == {}


def test_the_embedded_corpus_is_the_default(tmp_path, monkeypatch):
    docs = Dataset.from_dict({"text": [f"{text} number {i}" for i, text in enumerate(texts())]})
    monkeypatch.setattr("hfdistill.data.corpus.load_stdlib_docs", lambda mask_module: docs)
    results = run(
        "--config", CONFIG, output_dir=tmp_path / "run", max_train_samples="100", max_eval_samples="20", pseudo_perplexity_documents="0"
    )
    assert "embedded, no network" in results["task"] and set(results["further_metrics"]) == {"perplexity"}
    assert "near-duplicates" in (tmp_path / "run" / "README.md").read_text()


def test_given_models(tmp_path, finished, file):
    """Teacher and student by name: the distilled student of another run as teacher, measured as it is."""
    folder, _ = finished
    results = run(
        train_file=file, output_dir=tmp_path / "run", teacher_model_name_or_path=folder, teacher_config=None, teacher_training=None,
        kd_weight="5.0", task_weight="2.0", cosine_weight="1.0",
    )  # fmt: skip
    assert results["teacher"]["steps"] == 0 and results["teacher"]["parameters"] == results["student_distilled"]["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume_from_checkpoint": "x"}, "not needed: start the same command again"),
        ({"streaming": "true", "max_steps": "-1"}, "Set max_steps"),
        ({"language_model": "causal", "mlm_probability": "0.3"}, "a causal model has none"),
        ({"language_model": "causal", "student_type": "distilbert"}, "for causal models"),
        ({"student_type": "distilbert", "teacher_config": json.dumps({**SMALL, "model_type": "roberta"})}, "RobertaForMaskedLM cannot be"),
        ({"teacher_training": '{"max_step": 2}'}, "unknown key 'max_step' in teacher_training"),
        ({"allow_weak_teacher": "false", "teacher_training": '{"max_steps": 1, "learning_rate": 0.0}'}, "the student would learn nothing"),
        ({"train_file": None, "validation_file": "x.txt"}, "belong to data of your own"),
        ({"train_file": None, "dataset_name": "a\nb", "dataset_config_name": "c"}, "belongs to one dataset_name"),
        ({"train_file": None, "dataset_name": "nobody/nothing"}, "could not be loaded from the Hub"),
        ({"language_model": "causal"}, "BertLMHeadModel sees the tokens it is to predict"),
    ],
)
def test_mistakes_are_named(tmp_path, file, options, message):
    with pytest.raises(ValueError, match=message):
        run(**{"train_file": file, "output_dir": tmp_path / "run", **options})


def test_rows_longer_than_the_model_are_refused(tmp_path, file, finished):
    with pytest.raises(ValueError, match="most that"):
        run(train_file=file, output_dir=tmp_path / "x", teacher_model_name_or_path=finished[0], teacher_config=None, max_seq_length="600")


@pytest.mark.parametrize("name", ["wikipedia_bookcorpus_distilbert", "openwebtext_distilroberta", "openwebtext_distilgpt2"])
def test_published_settings_are_in_the_configs(name):
    recipe = load_recipe("masked_lm")
    own, args = parse(recipe.ARGUMENTS, ["--config", str(ROOT / f"recipes/configs/masked_lm/{name}.yaml")])
    recipe.check_recipe(own, args)
    assert (args.kd_weight, args.task_weight, args.cosine_weight, args.temperature) == (5.0, 2.0, 1.0, 2.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.98, 1e-6, 0.0)
    assert (args.learning_rate, args.max_grad_norm, args.warmup_steps, args.lr_scheduler_type) == (5e-4, 5.0, 0.05, "linear")
    assert resolve_layer_map(args.layer_map, 6, 12) == list(enumerate([0, 2, 4, 7, 9, 11])) and own.student_layers == 6
    assert own.language_model == ("causal" if "gpt2" in name else "masked")
    assert (own.student_type == "distilbert") == ("distilbert" in name) and not args.accelerator_config.dispatch_batches
