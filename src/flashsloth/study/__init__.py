"""Studies: variants of one training recipe, trained on the same data with several seeds, measured and compared."""
