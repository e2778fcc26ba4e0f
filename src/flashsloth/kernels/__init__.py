"""Quicker layers for answering: packed, quantized, compiled."""
