"""What `test_fuzz.py` is made of: memory layouts, the rule that results are held to, and a generator for each op."""
