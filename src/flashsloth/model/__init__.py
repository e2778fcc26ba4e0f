"""The FlashSloth model family. Every file here imports only torch, transformers, pillow, numpy and its siblings."""
