"""What the model card says of a structurally pruned checkpoint, by the layout that the manifest names."""

from __future__ import annotations

from typing import Final

from ..frame import usage
from ..frame.exporter import Words

LAYOUT_WORDS: Final = {
    "uniform": Words(
        "Whole attention heads and feed-forward neurons were removed, the same number in every layer: an ordinary, "
        "smaller model that every Hugging Face reader and server loads, with nothing to install.",
        use=usage.PLAIN,
    ),
    "per-layer": Words(
        "Whole attention heads and feed-forward neurons were removed, each layer its own number. transformers (after "
        "`import crepe_deploy`) and vLLM (by itself, once crepe-deploy is installed) run it on their own layers; others"
        " refuse its model type. `crepe-deploy export --format deci` makes a folder for vLLM without crepe-deploy.",
        use=usage.OURS,
    ),
    "deci": Words(
        "Whole attention heads and feed-forward neurons were removed, each layer its own number, written in the DeciLM "
        "layout: `vllm serve DIR --trust-remote-code` (for the small configuration file beside the weights) serves it "
        "without crepe-deploy. Layers with fewer heads are padded with heads of zeros; transformers has no such model.",
        use=usage.DECI,
    ),
}
