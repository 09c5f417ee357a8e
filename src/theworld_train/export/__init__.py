"""Export: a checkpoint as a complete Hugging Face directory, which needs neither its run nor its bases."""
