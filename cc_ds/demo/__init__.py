"""The embedded default task: the Atlas, real facts in ten languages, and a tiny Llama that learns them in minutes."""
