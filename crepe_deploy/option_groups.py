"""Options in groups under `--help`: which group an option is in, the same in every command.

One table by the option's parameter name; a test holds it complete. What only one command has stands there too.
"""

from __future__ import annotations

from typing import Final

import click

GROUPS: Final = {
    "What to prune": "target sparsity granularity include exclude",
    "How to prune": (
        "method preset params recipe feed allocate permute reprune reconstruct repair rescale values remove scores"
    ),
    "How to search": (
        "widths search_samples iterations generations offspring ffn_multiple attention attention_share accumulation "
        "variant fitness refit finish optimizer proxy evaluations fit finalists kernels workers"
    ),
    "Calibration": "calib calib_field calib_samples calib_length",
    "Formats": "format onnx_flavor precision quantise layout remote_code",
    "Training": (
        "dense heal steps minutes learning_rate batch_tokens accumulate checkpointing top_k lora train holdout"
    ),
    "Text": "text text_field text_samples text_length window stride max_tokens bos",
    "Comparison": "against tasks task_dir limit update_card baseline aa",
    "Measurement": "engine points rounds threads",
    "Judgement": (
        "budgets max_rounds max_slowdown pruned names host_mismatch below_noise calibrate suggest_budgets "
        "max_perplexity_ratio context"
    ),
    "Server": "host port api_key start_timeout",
    "Running": "seed dtype device revision resume",
    "Output": "out overwrite junit markdown as_json base_model",
}
OTHER: Final = "Options"
_GROUP_OF: Final = {name: group for group, names in GROUPS.items() for name in names.split()}


class Grouped(click.Command):
    """A command whose help has its options in groups, in the order of the table."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every group that has an option."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in [*GROUPS, OTHER]}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows[_GROUP_OF.get(str(parameter.name), OTHER)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)
