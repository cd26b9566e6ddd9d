"""What a run is worth: evaluation, baselines, the paper's tables and figures, pages."""
