"""Structural pruning: which KV groups, query heads and FFN neurons of each layer stay, and the smaller model they make.

Modules (imported on demand, so that this package stays light), in the order of a run:
    command, config, prepare, tyr   options, what decides a result, what is refused early, the run
    plan, units, allocate           a decoder's shape and what a layer keeps; units and budgets; widths without a search
    local, levels, accumulate       pruning one projection to every width; what the next block is fed
    build, supernet, stored         all layers' levels, on disk, and read back as plans
    narrow, fitness, evolve, stages judging candidates, and the search
    slicing, layout, check          the smaller tensors, their config.json, and whether both agree
    hf_auto, configuration_crepe, modeling_crepe, configuration_decilm   widths per layer in transformers
"""
