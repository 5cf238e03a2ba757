"""Tiny random image classifiers of every architecture family the test-suite promises, built without a network."""

from __future__ import annotations

import torch
import transformers as tf


LABELS = 3
_VIT = dict(num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8)


def _stages(scale: int) -> dict:
    return dict(hidden_sizes=[8 * scale, 16 * scale, 24 * scale, 32 * scale], depths=[1, 1, 1, 1])


# name -> (class prefix, config of size `scale`, side of the images)
VISION = {
    "vit": ("ViT", lambda s: dict(hidden_size=16 * s, num_hidden_layers=s + 1, **_VIT), 32),
    "deit": ("DeiT", lambda s: dict(hidden_size=16 * s, num_hidden_layers=s + 1, **_VIT), 32),
    "beit": ("Beit", lambda s: dict(hidden_size=16 * s, num_hidden_layers=s + 1, **_VIT), 32),
    "dinov2": ("Dinov2", lambda s: dict(hidden_size=16 * s, num_hidden_layers=s + 1, **_VIT), 32),
    "dinov2_with_registers": (
        "Dinov2WithRegisters",
        lambda s: dict(hidden_size=16 * s, num_hidden_layers=s + 1, num_register_tokens=2, **_VIT),
        32,
    ),
    "swin": (
        "Swin",
        lambda s: dict(image_size=32, patch_size=2, embed_dim=8 * s, depths=[1, 1, 2], num_heads=[2, 2, 4], window_size=4),
        32,
    ),
    "convnext": ("ConvNext", _stages, 64),
    "convnextv2": ("ConvNextV2", _stages, 64),
    "resnet": ("ResNet", lambda s: dict(embedding_size=8, layer_type="basic", **_stages(s)), 64),
    "regnet": ("RegNet", lambda s: dict(embedding_size=8, groups_width=8, **_stages(s)), 64),
    "mobilenet_v2": ("MobileNetV2", lambda s: dict(depth_multiplier=0.25 * s, image_size=64), 64),
    "efficientnet": (
        "EfficientNet",
        lambda s: dict(
            image_size=64, width_coefficient=0.25 * s, depth_coefficient=0.4, depth_divisor=8, hidden_dim=320 * s,
            initializer_range=0.3,
        ),
        64,
    ),
    "pvt": ("Pvt", lambda s: dict(image_size=64, num_attention_heads=[1, 2, 2, 4], **_stages(s)), 64),
    "levit": (
        "Levit",
        lambda s: dict(
            image_size=64, hidden_sizes=[16 * s, 24 * s, 32 * s], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
        ),
        64,
    ),
    "mobilevit": (
        "MobileViT",
        lambda s: dict(
            image_size=64,
            hidden_sizes=[16 * s, 24 * s, 32 * s],
            neck_hidden_sizes=[8 * s, 8 * s, 8 * s, 16 * s, 16 * s, 16 * s, 32],
        ),
        64,
    ),
}  # fmt: skip


def build(family: str, scale: int = 1, seed: int = 0, head: str = "ForImageClassification", **options):
    """A tiny model in eval mode with reproducible random weights; `scale` 2 is a wider one."""
    prefix, sizes, _ = VISION[family]
    config = getattr(tf, f"{prefix}Config")(**{**sizes(scale), "num_labels": LABELS, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(tf, f"{prefix}{head}")(config).eval()


def batch(side: int = 32, rows: int = 4, seed: int = 0, width: int | None = None) -> dict[str, torch.Tensor]:
    """Random images with a label and a number each."""
    g = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, side, width or side, generator=g),
        "labels": torch.arange(rows) % LABELS,
        "example_id": torch.arange(rows),
    }
