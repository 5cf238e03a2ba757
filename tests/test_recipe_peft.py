"""`--use_peft` through real recipes: adapters alone are trained and saved, what is published is plain."""

import json

import pytest
import transformers
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file

from hfdistill.cli import parse


pytestmark = pytest.mark.slow  # the file takes about a minute; tests of its parts are quick


SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "recipe, config, auto_class",
    [
        ("text_classification", "stdlib_bert_kd", "AutoModelForSequenceClassification"),
        ("sentence_embedding", "stdlib_bert_mse", "AutoModel"),
    ],
)
def test_a_lora_student_is_published_merged(recipe, config, auto_class, tmp_path):
    module = load_recipe(recipe)
    flags = (
        "--max_steps 4 --max_seq_length 12 --vocab_size 600 --seeds 0 --disable_tqdm true --per_device_train_batch_size 8 --cpu_threads 1 "
        "--max_train_samples 40 --max_eval_samples 30 --allow_weak_teacher true --save_strategy steps --save_steps 2 --learning_rate 1e-2 "
        "--use_peft true --lora_r 2 --lora_alpha 4"
    ).split()
    path = ROOT / f"recipes/configs/{recipe}/{config}.yaml"
    own, args = parse(module.ARGUMENTS, ["--config", str(path), *flags, "--output_dir", str(tmp_path)])
    own.teacher_config, own.teacher_training, own.student_config = SMALL, {"max_steps": 3}, {"hidden_size": 16, "num_attention_heads": 2}
    results = module.main(own, args)
    checkpoint = tmp_path / "_arms/distilled_0/checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    model, report = getattr(transformers, auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert results["student_distilled"]["parameters"] == sum(p.numel() for p in model.parameters())
    again = module.main(own, args)  # every arm is finished already
    metric = results["metric"]
    assert again["student_distilled"][metric] == results["student_distilled"][metric]
    assert "lora" in (tmp_path / "README.md").read_text().lower()
    assert json.loads((tmp_path / "results.json").read_text())["metric"] == metric
