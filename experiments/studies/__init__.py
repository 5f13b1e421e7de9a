"""Studies: what papers on adapters claim, asked of small models with tuned learning rates, seeds and intervals."""
