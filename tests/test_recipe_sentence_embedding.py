"""The recipe through its real `main`, a few steps, on real text and on files; its student with AutoModel and SentenceTransformer."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file
from test_base_models import base

from hfdistill import load_embedded_pairs, save_sentence_encoder, score_embeddings, train_wordpiece
from hfdistill.cli import parse


pytestmark = pytest.mark.slow  # the file takes about a minute; tests of its parts are quick


CONFIG = str(ROOT / "recipes/configs/sentence_embedding/stdlib_bert_mse.yaml")
QUICK = ["--max_steps", "3", "--max_seq_length", "12", "--vocab_size", "600", "--seeds", "0", "--disable_tqdm", "true"]
QUICK += ["--logging_steps", "1", "--per_device_train_batch_size", "8", "--max_train_samples", "40", "--max_eval_samples", "30"]


def run(*flags, **changes):
    recipe = load_recipe("sentence_embedding")
    parsed = parse(recipe.ARGUMENTS, list(flags))
    for name, value in changes.items():
        setattr(parsed[0], name, value)
    return recipe.main(*parsed)


@pytest.fixture(scope="module")
def embedded():
    return load_embedded_pairs(max_train_samples=40, max_eval_samples=30)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, embedded):
    folder = tmp_path_factory.mktemp("runs") / "stdlib"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfdistill.load_embedded_pairs", lambda **_: embedded)
        flags = ["--config", CONFIG, *QUICK, "--output_dir", str(folder), "--allow_weak_teacher", "true"]
        flags += ["--save_strategy", "steps", "--save_steps", "2"]
        yield folder, run(*flags, teacher_training={"max_steps": 3}), lambda: run(*flags, teacher_training={"max_steps": 3})


def test_results_keep_the_contract(finished, embedded):
    folder, results, _ = finished
    written = json.loads((folder / "results.json").read_text())
    assert written["metric"] == "mrr_at_10" and written["seeds"] == [0]
    assert written["teacher"]["parameters"] > written["student_distilled"]["parameters"] == written["student_alone"]["parameters"]
    assert {*written["baselines"]} == {"tfidf_cosine", "chance"} and 0 <= written["agreement"] <= 1
    assert [(term["loss"], term["signal"], term["pooling"]) for term in written["objective"]][:1] == [("hidden_mse", "pooled", "mean")]
    steps = [written[arm]["steps"] for arm in ("teacher", "student_alone", "student_distilled")]
    assert steps == [3, 3, 3]
    for arm in ("teacher", "alone_0", "distilled_0"):
        figures = json.loads((folder / "_arms" / arm / "arm.json").read_text())["metrics"]
        with np.load(folder / "_arms" / arm / "predictions.npz") as arrays:
            assert arrays["logits"].shape[0] == 2 * len(embedded.evaluation["test"]) and arrays["labels"].tolist() == list(range(60))
            assert score_embeddings(arrays["logits"])["mrr_at_10"] == pytest.approx(figures["eval_mrr_at_10"])


def test_student_loads_where_hfdistill_cannot_be_imported(finished, embedded):
    pytest.importorskip("sentence_transformers")
    folder, _, _ = finished
    texts = [*embedded.evaluation["test"]["query"], *embedded.evaluation["test"]["document"]]
    (folder.parent / "texts.json").write_text(json.dumps(texts))
    code = f"""
import json, sys
sys.modules["hfdistill"] = None
import numpy as np
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
model, report = AutoModel.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
vectors = SentenceTransformer({str(folder)!r}, device="cpu").encode(json.load(open({str(folder.parent / "texts.json")!r})), batch_size=7)
np.save({str(folder.parent / "vectors.npy")!r}, vectors)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "_arms/distilled_0/predictions.npz") as arrays:
        np.testing.assert_allclose(np.load(folder.parent / "vectors.npy"), arrays["logits"], rtol=1e-4, atol=1e-5)


def test_arms_are_read_back_and_killed_ones_go_on_to_the_same_weights(finished, capsys):
    folder, results, again = finished
    arms = ("teacher", "alone_0", "distilled_0")
    before = {arm: load_file(folder / "_arms" / arm / "model.safetensors") for arm in arms}
    for arm in ("alone_0", "distilled_0"):  # as a kill after the second of three steps leaves it
        for path in ("arm.json", "model.safetensors"):
            (folder / "_arms" / arm / path).unlink()
        shutil.rmtree(folder / "_arms" / arm / "checkpoint-3")
    repeated = again()
    assert "teacher is finished already" in capsys.readouterr().out
    assert repeated["student_distilled"]["mrr_at_10"] == results["student_distilled"]["mrr_at_10"]
    for arm in arms:
        after = load_file(folder / "_arms" / arm / "model.safetensors")
        assert before[arm].keys() == after.keys() and all(torch.equal(before[arm][name], after[name]) for name in after)


# ---- Own data ----


def write(folder, name, rows):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    words = "one two three four five six seven eight nine ten".split()
    texts = [{"text": f"{a} {b} {a}", "other": f"{b} and {a}"} for a in words for b in words]
    graded = [{"sentence1": f"{a} and one", "sentence2": f"{a} or {b}", "score": i % 5} for i, (a, b) in enumerate(zip(words, words[1:]))]
    return {
        "train": write(tmp_path, "train.jsonl", texts),
        "validation": write(tmp_path, "validation.jsonl", graded),
        "texts": [text for row in texts for text in row.values()],
    }


@pytest.fixture
def teacher(files, tmp_path):
    """A sentence-transformers folder that pools the first token and normalises."""
    tokenizer = train_wordpiece(files["texts"], vocab_size=60, max_length=32)
    model = base("bert", 2, seed=2, vocab_size=len(tokenizer))
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_sentence_encoder(folder, "cls", 32, 12, normalize=True)
    return str(folder)


def own(files, folder, *flags):
    data = ["--train_file", files["train"], "--validation_file", files["validation"]]
    return [*data, *QUICK, "--output_dir", str(folder), "--use_cpu", "true", "--allow_weak_teacher", "true", *flags]


def test_a_teacher_from_sentence_transformers_and_graded_pairs(files, teacher, tmp_path):
    results = run(*own(files, tmp_path / "run", "--teacher_model_name_or_path", teacher))
    assert results["metric"] == "spearmanr" and results["student_alone"] is None and results["teacher"]["steps"] == 0
    assert results["baselines"]["chance"] == 0 and results["agreement"] is None
    assert results["objective"][0]["loss"] == "hidden_mse" and results["objective"][0]["pooling"] == "cls"
    modules = [module["type"].rpartition(".")[2] for module in json.loads((tmp_path / "run/modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((tmp_path / "run/1_Pooling/config.json").read_text())["pooling_mode_cls_token"]
    assert json.loads((tmp_path / "run/config.json").read_text())["num_hidden_layers"] == 1


def test_pairs_of_ones_own_give_the_student_alone(files, teacher, tmp_path):
    columns = ["--text_column_names", "text", "other", "--paired", "true", "--evaluation_column_names", "sentence1", "sentence2"]
    weights = ["--hidden_weight", "1", "--task_weight", "0", "--kd_weight", "0"]
    results = run(*own(files, tmp_path / "run", "--teacher_model_name_or_path", teacher, *columns, *weights))
    assert results["student_alone"] is not None and [term["name"] for term in results["objective"]] == ["hidden"]


def test_stages(files, teacher, tmp_path):
    columns = ["--text_column_names", "text", "other", "--paired", "true", "--evaluation_column_names", "sentence1", "sentence2"]
    stages = [
        {"name": "pairs", "data": "pairs", "teacher": "none", "objective": [{"loss": "contrastive_pairs"}], "max_steps": 2},
        {"name": "texts", "data": "transfer", "objective": [{"loss": "cosine", "signal": "pooled"}]},
    ]
    results = run(*own(files, tmp_path / "run", "--teacher_model_name_or_path", teacher, "--baselines", "false", *columns), stages=stages)
    record = json.loads((tmp_path / "run/_arms/distilled_0/arm.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["pairs", "texts"] and record["steps"] == 5
    assert results["baselines"] == {} and results["student_alone"] is None


# ---- What cannot work ----


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint is not needed"),
        (["--pooling", "mean"], "pooling='mean', but the teacher .* was trained with 'cls'"),
        (["--teacher_training", '{"max_steps": 2}'], "no pairs of texts that belong together.*--paired true"),
    ],
    ids=["resume", "pooling", "pairs"],
)
def test_what_cannot_work_is_refused_early(flags, message, files, teacher, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*own(files, tmp_path / "run", "--teacher_model_name_or_path", teacher, *flags))
    assert not (tmp_path / "run/_arms").exists()


def test_flags_of_own_data_without_data(tmp_path):
    with pytest.raises(ValueError, match="--paired True is about your own data, but none is given"):
        run("--output_dir", str(tmp_path), "--paired", "true", "--use_cpu", "true")


def test_a_teacher_no_better_than_chance_is_refused(files, teacher, tmp_path):
    rows = [{"sentence1": "one", "sentence2": "one", "score": 0}, {"sentence1": "one", "sentence2": "two three four", "score": 5}]
    files["validation"] = write(tmp_path, "reversed.jsonl", rows)
    flags = own(files, tmp_path / "run", "--teacher_model_name_or_path", teacher, "--allow_weak_teacher", "false")
    with pytest.raises(ValueError, match="spearmanr -1.000 on the held-out pairs, and random order 0.000"):
        run(*flags)
