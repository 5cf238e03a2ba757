"""Every recipe as its user runs it: launched with one and with two processes, killed with SIGKILL in the middle, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
TEACHER = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
STUDENT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
MODERNBERT = {
    "model_type": "modernbert", "local_attention": 6, "layer_types": ["full_attention", "sliding_attention"],
    "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
}  # fmt: skip
STEPS, SAVE, KILL = 12, 2, 4

# recipe -> (config, Auto class of the student, changes of its own, the stage that is killed: by default the last)
RECIPES = {
    "text_classification": ("stdlib_bert_kd", "AutoModelForSequenceClassification", {}, None),
    "text_classification/stages": (
        "stdlib_bert_progressive", "AutoModelForSequenceClassification", {"student_config": {"intermediate_size": 16}}, None,
    ),
    "text_classification/assistant": ("stdlib_bert_assistant", "AutoModelForSequenceClassification", {}, None),
    "masked_lm": ("stdlib_bert_triple", "AutoModelForMaskedLM", {"student_config": None}, None),
    "tinybert": (
        "stdlib_tinybert", "AutoModelForSequenceClassification",
        {"general_teacher_training": {"max_steps": 3}, "max_corpus_documents": 300, "augmentation_copies": 1}, "general",
    ),
    "token_classification": (
        "stdlib_modernbert_kd", "AutoModelForTokenClassification", {"teacher_config": {**TEACHER, **MODERNBERT}}, None,
    ),
    "question_answering": (
        "stdlib_modernbert_kd", "AutoModelForQuestionAnswering", {"teacher_config": {**TEACHER, **MODERNBERT}}, None,
    ),
    "sentence_embedding": ("stdlib_bert_mse", "AutoModel", {}, None),
    # A ViT: two processes have other statistics of batch norm than one.
    "image_classification": (
        "digits_vit_kd", "AutoModelForImageClassification", {"teacher_config": {**TEACHER, "model_type": "vit", "patch_size": 4}}, None,
    ),
}  # fmt: skip


def small(name: str, folder: Path, rows: int = 8, dropout: float = 0.0, **changes) -> Path:
    """The shipped config with tiny models and few steps, checkpoints included, as a file of its own."""
    config, _, own, _ = RECIPES[name]
    settings = yaml.safe_load((ROOT / f"recipes/configs/{name.split('/')[0]}/{config}.yaml").read_text())
    settings |= {
        "output_dir": str(folder / "run"), "seeds": [0], "baselines": False, "teacher_config": TEACHER, "student_layers": 1,
        "student_config": STUDENT, "teacher_training": {"max_steps": 3}, "max_steps": STEPS, "per_device_train_batch_size": rows,
        "max_train_samples": 96, "max_eval_samples": 48, "save_strategy": "steps", "save_steps": SAVE, "allow_weak_teacher": True,
        "cpu_threads": 1, "vocab_size": 1000, "disable_tqdm": True, **own, **changes,
    }  # fmt: skip
    for models in ("teacher_config", "student_config"):
        dropout_entries = (settings["teacher_config"] or {}).get("model_type", "bert") in ("bert", "vit")
        if settings[models] is not None and dropout_entries:
            settings[models] = {**settings[models], "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    for stage in settings.get("stages") or []:
        stage["max_steps"] = STEPS
        stage.pop("num_train_epochs", None)
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def command(name: str, config: Path, launcher: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"recipes/accelerate/{launcher}.yaml")]
    return [*launch, str(ROOT / f"recipes/{name.split('/')[0]}.py"), "--config", str(config)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(name: str, config: Path, launcher: str = "cpu") -> None:
    done = subprocess.run(command(name, config, launcher), capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_when_distilling(name: str, config: Path) -> Path:
    """Starts the recipe and kills it, with all its children, once the distilled arm has written its checkpoint of step KILL."""
    arm = config.parent / "run/_arms/distilled_0"
    stages = [stage["name"] for stage in yaml.safe_load(config.read_text()).get("stages") or []]
    stage = RECIPES[name][3] or (stages[-1] if stages else "")
    checkpoint = f"*_{stage}/checkpoint-{KILL}" if stage else f"checkpoint-{KILL}"
    log = open(config.parent / "log.txt", "w+")
    process = subprocess.Popen(command(name, config, "cpu"), stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 400
    while not list(arm.glob(f"{checkpoint}/trainer_state.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise AssertionError(f"the run ended before it could be killed: {log.read()[-3000:]}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()
    assert not (arm / "arm.json").exists()
    return arm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_started_again_it_gives_the_same_student(name, tmp_path):
    whole, killed = (small(name, tmp_path / which, dropout=0.1) for which in ("whole", "killed"))
    start(name, whole)
    arm = kill_when_distilling(name, killed)
    finished = {path.parent.name: path.stat().st_mtime_ns for path in arm.glob("*/stage.json")}
    stages = len(list((tmp_path / "whole/run/_arms/distilled_0").glob("*/stage.json")))
    assert len(finished) == (0 if RECIPES[name][3] == "general" else max(stages - 1, 0))
    start(name, killed)
    for stage, written in finished.items():
        assert (arm / stage / "stage.json").stat().st_mtime_ns == written  # finished stages were not trained again
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    loads_in_plain_transformers(tmp_path / "killed/run", RECIPES[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_the_student_of_one(name, tmp_path):
    # Adam divides tiny gradients by their own size, and so makes steps out of rounding; with a large epsilon it does not.
    same = {"save_strategy": "no", "adam_epsilon": 1e-3}
    one, more = small(name, tmp_path / "one", rows=8, **same), {}
    start(name, one, "cpu")
    if name == "sentence_embedding":  # its teacher tells the texts of one process apart, so it is another one on two
        more = {"teacher_model_name_or_path": str(tmp_path / "one/run/_arms/teacher"), "teacher_training": None, "teacher_config": None}
    start(name, small(name, tmp_path / "two", rows=4, **same, **more), "two_cpu")
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    tables = [json.loads((tmp_path / which / "run/results.json").read_text()) for which in ("one", "two")]
    assert [table["num_processes"] for table in tables] == [1, 2]


TEXT = 'inputs = transformers.AutoTokenizer.from_pretrained(FOLDER)("Return the number of items.", return_tensors="pt")'
IMAGE = """from PIL import Image
inputs = transformers.AutoImageProcessor.from_pretrained(FOLDER)(Image.new("RGB", (8, 8)), return_tensors="pt")"""


def loads_in_plain_transformers(folder: Path, auto_class: str) -> None:
    code = f"""
import sys
sys.modules["hfdistill"] = sys.modules["peft"] = None
import transformers
model, report = transformers.{auto_class}.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
{IMAGE if "Image" in auto_class else TEXT}
print("LOADED", len(model(**inputs)))
"""
    code = code.replace("FOLDER", repr(str(folder)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0 and "LOADED" in done.stdout, done.stderr[-3000:]


def test_every_recipe_is_run():
    assert {name.split("/")[0] for name in RECIPES} == {path.stem for path in (ROOT / "recipes").glob("*.py")}
