"""The pieces of the pipeline, under one name."""

from .finetuning import (  # noqa: F401
    Branches,
    Evaluation,
    LoraStage,
    SecondStage,
    describe_finetuning,
    frozen_at,
    lora_error,
    lora_nodes,
    lora_order,
    lora_overlap,
    quadrature_errors,
    replicon,
)
from .nodes import DEEP, NodeSets, map_node_sets, node_sets, test_nodes, with_broken  # noqa: F401
from .pretraining import FirstStage, MapStage, describe_pretraining, map_errors, solve_pretraining  # noqa: F401
from .search import FEW, solve_broken, solve_symmetric  # noqa: F401
from .stage import Bars, Solved, final_status, response_gap  # noqa: F401
