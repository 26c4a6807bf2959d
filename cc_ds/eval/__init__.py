"""Evaluation by generation: tasks (rows with accepted answers), metrics, and the run over a model's three modes."""
