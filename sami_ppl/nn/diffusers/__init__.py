"""Networks of Hugging Face diffusers, with the names that their parameters have in a checkpoint."""
