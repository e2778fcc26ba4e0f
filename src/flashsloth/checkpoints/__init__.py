"""From a name to a folder to a model, and from one layout of weights to another."""
