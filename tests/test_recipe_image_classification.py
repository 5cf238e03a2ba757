"""The recipe through its real `main`, a few steps, on the embedded digits and on folders; its student in plain Transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import transformers
import vision_families as vision
import yaml
from PIL import Image
from recipes_under_test import ROOT, load_recipe

import hfdistill
from hfdistill.cli import parse


CONFIGS = ROOT / "recipes/configs/image_classification"
QUICK = (
    "--max_steps 2 --per_device_train_batch_size 8 --disable_tqdm true --logging_steps 1 --seeds 0 --allow_weak_teacher true "
    "--max_train_samples 24 --max_eval_samples 20 --labelled_rows 20"
).split()
VIT = {"model_type": "vit", "patch_size": 8, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
TEACHER = ["--teacher_training", json.dumps({"max_steps": 2})]


def run(*flags):
    recipe = load_recipe("image_classification")
    return recipe.main(*parse(recipe.ARGUMENTS, list(flags)))


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that the recipe runs, by the name of its arm."""
    seen, finish = {}, hfdistill.Run.finish

    def noted(self, name, trainer):
        seen[name] = trainer
        return finish(self, name, trainer)

    monkeypatch.setattr(hfdistill.Run, "finish", noted)
    return seen


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Folders of coloured 40 x 30 images, `cat` red and `dog` blue: 12 to train, 6 to measure."""
    folder, rng = tmp_path_factory.mktemp("animals"), np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for name, channel in (("cat", 0), ("dog", 2)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (30, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def loads(folder, image) -> str:
    """The label that the published student gives `image` in plain Transformers, in a process of its own."""
    code = f"""
import sys
sys.modules["hfdistill"] = None
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
model, report = AutoModelForImageClassification.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
print("ANSWER", pipeline("image-classification", {str(folder)!r})(Image.open({str(image)!r}))[0]["label"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1].removeprefix("ANSWER ")


def test_the_embedded_task(tmp_path, trainers):
    config = str(CONFIGS / "digits_resnet_kd.yaml")
    sizes = ["--teacher_config", json.dumps(RESNET), "--student_config", json.dumps({**RESNET, "hidden_sizes": [8, 8, 8]})]
    results = run("--config", config, *QUICK, *TEACHER, *sizes, "--output_dir", str(tmp_path / "run"))
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert written["metric"] == "accuracy" and "digits" in written["task"] and written["seeds"] == [0]
    assert {"control", "pixel_logreg", "pixel_logreg_teacher_labels", "majority"} == written["baselines"].keys()
    assert written["student_alone"]["steps"] == written["student_distilled"]["steps"] == 2
    assert written["teacher"]["parameters"] > written["student_distilled"]["parameters"]
    assert results["evaluation"]["test"].keys() >= {"eval_accuracy"}

    rows = trainers["distilled_0"].train_dataset
    hidden = [number for number, label in zip(rows["example_id"], rows["label"]) if label == -100]
    shown = [number for number, label in zip(rows["example_id"], rows["label"]) if label != -100]
    taught = set(trainers["teacher"].train_dataset["example_id"])
    assert len(shown) == 20 and len(hidden) == 24 and not set(hidden) & set(shown)
    assert not set(hidden) & taught  # the teacher has never seen the transfer images
    assert sorted(trainers["alone_0"].train_dataset["example_id"]) == sorted(shown)
    assert set(trainers["control_0"].train_dataset["example_id"]) == taught
    held_out = set(trainers["distilled_0"].eval_dataset["example_id"])
    assert not held_out & {*hidden, *shown, *taught}

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "results.png", "README.md"} <= names
    card = (tmp_path / "run/README.md").read_text()
    assert "pipeline_tag: image-classification" in card and 'pipeline("image-classification"' in card
    Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
    assert loads(tmp_path / "run", tmp_path / "digit.png") in list("0123456789")


def test_folders_a_given_teacher_and_another_preparation(tmp_path, animals, trainers):
    """A teacher with its own size, mean and label order; the student gets its own view of the same images."""
    config = vision.tf.ViTConfig(**{**VIT, "image_size": 16}, num_labels=2, id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1})
    vision.tf.ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path / "teacher")
    flags = [f"--train_dir={animals}/train", f"--validation_dir={animals}/validation", f"--cache_dir={tmp_path}/cache"]
    flags += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--student_config", json.dumps(RESNET), "--image_size", "32"]
    flags += [
        "--max_steps",
        "30",
        "--learning_rate",
        "5e-3",
        "--per_device_train_batch_size",
        "6",
        "--seeds",
        "0",
        "--disable_tqdm",
        "true",
    ]
    flags += ["--kd_weight", "0.0", "--logit_mse_weight", "0.001", "--task_weight", "1.0", "--allow_weak_teacher", "true"]
    flags += ["--baselines", "false", "--mixup_alpha", "0.2"]
    flags += ["--augmentation", '{"random_resized_crop": [0.5, 1.0], "horizontal_flip": 0.5}']
    results = run(*flags, "--output_dir", str(tmp_path / "run"))
    assert results["student_distilled"]["accuracy"]["mean"] == 1.0  # red and blue
    trainer = trainers["distilled_0"]
    assert trainer.model.config.id2label == {0: "dog", 1: "cat"}  # the teacher's order from then on
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[1:] == (3, 32, 32) and batch["teacher_pixel_values"].shape[1:] == (3, 16, 16)
    assert batch["soft_labels"].shape == (6, 2)
    assert loads(tmp_path / "run", animals / "validation/cat/0.png") == "cat"
    assert loads(tmp_path / "run", animals / "validation/dog/1.png") == "dog"


@pytest.mark.parametrize(
    "config", ["digits_vit_kd", "digits_resnet_fitnet", "digits_vit_resnet_kd", "digits_resnet_mobilenet_kd", "digits_resnet_deit_hard"]
)
def test_every_digits_config_trains_its_pair(config, tmp_path):
    settings = hfdistill.cli.read_yaml(str(CONFIGS / f"{config}.yaml"))
    stages = settings.get("stages") or []
    for stage in stages:
        stage["max_steps"] = 2
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(settings))
    flags = [*QUICK, *TEACHER, "--baselines", "false", "--output_dir", str(tmp_path / "run")]
    results = run("--config", str(tmp_path / "short.yaml"), *flags)
    student = json.loads((tmp_path / "run/config.json").read_text())
    wanted = settings["student_config"]
    assert student["model_type"] == wanted.get("model_type", "vit")
    assert all(student[key] == value for key, value in wanted.items())
    assert results["student_alone"] is None and 0 <= results["student_distilled"]["accuracy"]["mean"] <= 1
    if stages:
        assert [stage["name"] for stage in results["stages"]] == ["hint", "soft_targets"]
        assert results["stages"][0]["objective"][0]["loss"] == "hint"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_config", '{"hiden_size": 3}'], "unknown key 'hiden_size' in teacher_config. Did you mean 'hidden_size'"),
        (["--student_config", '{"model_type": "resnet", "depth": [1]}'], "unknown key 'depth' in student_config. Did you mean 'depths'"),
        (
            ["--student_config", '{"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeachers"]}'],
            "no model of Transformers. Did you mean 'DeiTForImageClassificationWithTeacher'",
        ),
        (["--augmentation", '{"flip": 0.5}'], "flip"),
        (["--mixup_alpha", "-1"], "mixup_alpha"),
    ],
)
def test_mistakes_stop_it_before_training(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("--config", str(CONFIGS / "digits_vit_kd.yaml"), *QUICK, *flags, "--output_dir", str(tmp_path))
    assert not (tmp_path / "_arms").exists()
