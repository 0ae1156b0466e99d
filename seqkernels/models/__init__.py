"""Models written once and told whose layers to use: ``torch.nn`` or ``seqkernels.nn``."""
