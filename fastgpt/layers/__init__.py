"""Layers of the models we serve: they own weights and call `fastgpt.ops`, nothing else."""
