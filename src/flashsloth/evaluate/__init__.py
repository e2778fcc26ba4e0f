"""How right the answers of a model are."""
