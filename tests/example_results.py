"""Results that keep the contract of results.json, for the tests of table, picture and card."""

from __future__ import annotations

import numpy as np
import torch

from hfdistill.report import summarise, versions


def make_results(seeds=3):
    """Results that keep the contract, with numbers of every kind that occurs."""
    student = {"parameters": 233350, "size_mb": 0.934, "latency_ms": 0.81}
    return {
        "task": "docs6",
        "metric": "accuracy",
        "seeds": list(range(seeds)),
        "teacher": {
            "accuracy": np.float64(0.717),
            "parameters": 672902,
            "size_mb": 2.69,
            "latency_ms": torch.tensor(1.7, dtype=torch.float64),
        },
        "student_alone": {"accuracy": summarise([0.40, 0.43, 0.42][:seeds]), **student},
        "student_distilled": {"accuracy": summarise([0.64, 0.63, 0.65][:seeds]), **student},
        "baselines": {"control": {"accuracy": summarise([0.69, 0.70, 0.69][:seeds]), **student}, "tfidf_logreg": 0.555},
        "agreement": np.float32(0.5),
        "gap_closed": 0.75,
        "objective": [{"name": "kd", "loss": "soft_targets", "weight": 0.5, "layer_map": ((0, 1), (1, 3))}],
        "versions": versions(),
        "config_sha256": "0" * 64,
        "command": "accelerate launch recipes/text_classification.py --output_dir /home/ana/out --hub_token SECRET",
        "seconds": {"teacher": 40.0, "alone": 10, "distilled": 12.5},
    }
