"""HTML pages that hold everything they show and open offline."""
