"""Evaluation that a stranger can check: Inspect runs it, this room says what was measured how sure it is, and
proves it.

Samples become records (`records`), records become figures (`figures`, `statistics/`), figures become a report
(`report/`) and a signed bundle (`proof/`). Inspect's part is in `tasks/` and `providers/`; nothing else imports it.
"""
