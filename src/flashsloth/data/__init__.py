"""Training data: one sample format, the sources that produce it and the collator that batches it."""
