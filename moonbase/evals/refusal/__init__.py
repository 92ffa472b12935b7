"""Was the request answered? The interface's signal, a bilingual rule set, and language models as judges: each votes,
votes are kept apart, and their errors on human labels are known (docs/refusal.md)."""
