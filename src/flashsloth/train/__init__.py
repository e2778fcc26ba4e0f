"""Recipe-driven training on the transformers Trainer."""
