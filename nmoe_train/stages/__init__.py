"""The three stages of the paper: extractor, experts, gate."""
