"""What all that measures shares: memory of the process, tables, pages and the look of plots."""
