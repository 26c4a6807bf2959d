"""Model families: data about where stock Hugging Face models keep their parts."""
