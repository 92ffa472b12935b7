"""One concern per file; the loop knows none of them."""
