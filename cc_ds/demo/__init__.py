"""The embedded default task: the Atlas, real facts in ten languages, and a tiny Llama made on the spot to learn them."""
