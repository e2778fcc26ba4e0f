"""Commands that live beside the code they run."""
