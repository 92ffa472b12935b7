"""Proof: what lets a stranger check a published number without trusting who published it.

`canonical` writes JSON in one way only (RFC 8785); `chain` links the records and hashes them into a tree (RFC 6962);
`survey` and `manifest` say under which circumstances they were made; `signing` signs that (in-toto, DSSE, Ed25519);
`seal` makes a bundle of it, `verify` computes every number in a bundle again, `challenge` runs a random part of it
again. `levels` says how far a figure can be checked. docs/proof.md has the formats and what they do not prove.

Import from the modules (`from moonbase.evals.proof.verify import verify`): importing the package does nothing.
"""
