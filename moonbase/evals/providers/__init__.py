"""Models for Inspect: the engine in this process (`moonbase/MODEL`) and stored real answers (`replay/DATASET:MODEL`).

`registry` is what Inspect loads through its entry point; it names both. Hosted models come from Inspect's own
providers: `endpoints` refuses those that could be answered by anybody, `provenance` reads from a log who answered.
Those two, `stored` and `weights` know nothing of Inspect and can be imported without it.
"""
