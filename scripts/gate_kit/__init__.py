"""What `scripts/prove_gate.py` is made of: faults, each a small entry; a workshop that puts one into a candidate and holds
that against the reference with the ordinary verification; the table of what became of them."""
