"""Claims, the record of a run, and the page of results."""
