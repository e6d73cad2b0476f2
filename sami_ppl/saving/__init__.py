"""Programs on disk: saved ones, and the files that build them."""
