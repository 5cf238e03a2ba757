"""What models are made of: where their parts live, which blocks belong together, how a student is built from a teacher."""

from .adapters import ADAPTERS, build_adapter
from .anatomy import Blocks, find_blocks, hidden_size, problem_type_of, task_of, text_config, unwrap_peft, vocabulary_size
from .layer_map import (
    LAYER_MAPS,
    increasing_assignment,
    layer_map_table,
    linear_cka,
    representative_blocks,
    resolve_layer_map,
    similar_layer_map,
)
from .student import CopyReport, build_student, copy_weights
from .width import WIDTHS


__all__ = [
    "ADAPTERS",
    "LAYER_MAPS",
    "WIDTHS",
    "Blocks",
    "CopyReport",
    "build_adapter",
    "build_student",
    "copy_weights",
    "find_blocks",
    "hidden_size",
    "increasing_assignment",
    "layer_map_table",
    "linear_cka",
    "problem_type_of",
    "representative_blocks",
    "resolve_layer_map",
    "similar_layer_map",
    "task_of",
    "text_config",
    "unwrap_peft",
    "vocabulary_size",
]
