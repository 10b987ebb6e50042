"""CNN compression with hierarchical Tucker decomposition: one module, one idea (see docs and README)."""
