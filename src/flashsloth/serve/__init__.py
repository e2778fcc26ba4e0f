"""Answer many clients at once: an engine that batches, and an OpenAI-compatible server in front of it."""
