"""A traced graph made simpler by onnxscript's passes: constants folded, what does nothing removed.

`onnxscript.optimizer.optimize_ir` does the same with every rule it knows, most of them for convolutions. One of those
has a pattern with several outputs and searches the whole graph at every node, which took minutes on a model of 30
layers; here are the rules that apply to decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

RULES: Final = (
    "add_0_rule",
    "sub_0_rule",
    "mul_by_1_rule",
    "div_by_1_rule",
    "no_op_cast_rule",
    "cast_cast_rule",
    "no_op_expand_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "unsqueeze_unsqueeze_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
    "no_op_static_scatter_nd_rule",
    "no_op_dynamic_scatter_nd_rule",
)
_ROUNDS: Final = 2  # what one round folds, the next may simplify


def simplify(graph_model: Any, should_fold: Callable[[Any], bool | None]) -> None:
    """Change the onnx_ir model in place. should_fold: False for a node to keep, None for the folder's own choice."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    common.InlinePass()(graph_model)
    rewrite = RewritePass([getattr(rules, name) for name in RULES])
    for _ in range(_ROUNDS):
        fold_constants_ir(graph_model, onnx_shape_inference=True, should_fold=should_fold)
        ir.passes.Sequential(rewrite, common.RemoveUnusedNodesPass())(graph_model)
    ir.passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(graph_model)
