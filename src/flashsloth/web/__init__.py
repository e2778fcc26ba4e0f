"""A page in the browser to try a model on: `mount_page` puts it on any FastAPI application."""
